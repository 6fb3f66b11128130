// The row products of kernels/grouped_gemm.h in plain fused multiply-adds, a warp a row: for shapes
// and dtypes that the tensor cores' kernel cannot take (extents that are no multiple of 64, fp32).
// The chains are those of the CPU reference. Slow: weights are read once per row.
#pragma once

#include "kernels/grouped_gemm.h"

namespace cambium::cuda {

void grouped_up_rows(const GroupedUpArgs& args, Stream& stream);
void grouped_down_rows(const GroupedDownArgs& args, Stream& stream);
void grouped_down_dgrad_rows(const GroupedDownDgradArgs& args, Stream& stream);
void grouped_up_dgrad_rows(const GroupedUpDgradArgs& args, Stream& stream);

}  // namespace cambium::cuda
