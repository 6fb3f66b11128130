// Which kernels run, and how a product is cut into chunks (reference/gemm.h says what is promised
// and why).
#include "reference/gemm.h"

#include <algorithm>

#include "reference/product_kernels.h"

namespace cambium::reference {

namespace {

constexpr int64_t kRowUnit = 12;  // a multiple of any tile's rows

}  // namespace

const ProductKernels& product_kernels() {
  static const bool is_wide =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512cd");
  return is_wide ? kAvx512Products : kAvx2Products;
}

void gemm_block(const GemmBlock& block, Scratch& scratch) {
  product_kernels().gemm_block(block, scratch);
}

GemmBlock GemmBlock::part(const GemmPart& part) const {
  GemmBlock result = *this;
  result.rows = part.rows;
  result.columns = part.columns;
  result.a += part.row * a_stride;
  result.b += part.column * (b_order == OperandOrder::depth_major ? 1 : b_stride);
  result.c += part.row * c_stride + part.column;
  if (row_scale != nullptr) result.row_scale += part.row;
  if (residual != nullptr) result.residual += part.row * residual_stride + part.column;
  return result;
}

GemmCut cut_gemm(const GemmExtent& extent) {
  const int64_t row_flops = 2 * extent.columns * extent.depth;
  const int64_t wanted =
      std::clamp(row_flops * extent.op_rows / kChunksPerOp, kMinChunkFlops, kMaxChunkFlops);
  auto half = [](int64_t count, int64_t unit) { return (count / 2 + unit - 1) / unit * unit; };
  GemmCut cut{std::min(extent.rows, kMaxChunkRows), extent.columns};
  auto flops = [&] { return 2 * cut.row_chunk * cut.column_chunk * extent.depth; };
  while (flops() > wanted && cut.column_chunk >= kMinChunkColumns) {
    cut.column_chunk = half(cut.column_chunk, kTileColumns);
  }
  while (flops() > wanted && cut.row_chunk >= 2 * kMinChunkRows) {
    cut.row_chunk = half(cut.row_chunk, kRowUnit);
  }
  return cut;
}

}  // namespace cambium::reference
