// Products that cuBLASLt does not take: kernels/shared_cuda_linear.cu, for kernels/linear.cu.
#pragma once

#include "kernels/linear.h"

namespace cambium::cuda {

// An operand as element (i, j) = data[i * outer_step + j * inner_step], fp32 or bf16.
struct PlainOperand {
  RawView view;
  int64_t outer_step;
  int64_t inner_step;
};

// out[i][j] = sum over k of a(i, k) b(k, j), one chain of fused multiply-adds over ascending k,
// + residual[i][j].
struct PlainProduct {
  int64_t rows, columns, depth;
  PlainOperand a, b;
  RawView residual;  // optional; may be `out`
  RawView out;
};
void plain_product(const PlainProduct& product, Stream& stream);

// Mode `nodes` of linear_wgrad (kernels/grad_target.h), every block's sum a chain over its rows.
void linear_wgrad_nodes(const LinearWgradArgs& args, Stream& stream);

}  // namespace cambium::cuda
