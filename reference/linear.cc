// Linear layer (kernels/linear.h): chunks of rows and columns on the product kernel of
// reference/gemm.h; the weight gradient is one group of reference/wgrad.h.
#include "kernels/linear.h"

#include <algorithm>
#include <numeric>

#include "reference/chunks.h"
#include "reference/gemm.h"
#include "reference/rounding.h"
#include "reference/wgrad.h"

namespace cambium::reference {

namespace {

// Runs the whole product in chunks; `whole` describes it as if it were one block.
void gemm_chunks(const GemmBlock& whole, Workers& workers) {
  if (whole.rows == 0 || whole.columns == 0) return;
  const GemmCut cut = cut_gemm({whole.rows, whole.rows, whole.columns, whole.depth});
  const int64_t row_chunks = (whole.rows + cut.row_chunk - 1) / cut.row_chunk;
  const int64_t column_chunks = (whole.columns + cut.column_chunk - 1) / cut.column_chunk;
  workers.parallel_for(row_chunks * column_chunks, [&](int64_t chunk, Scratch& scratch) {
    const int64_t row = chunk / column_chunks * cut.row_chunk;
    const int64_t column = chunk % column_chunks * cut.column_chunk;
    gemm_block(whole.part({row, std::min(cut.row_chunk, whole.rows - row), column,
                           std::min(cut.column_chunk, whole.columns - column)}),
               scratch);
  });
}

}  // namespace

void linear(const LinearArgs& a, Workers& workers) {
  const ReadF32 x(a.x_TK), w(a.w_NK), residual(a.residual_TN);
  const WriteF32 y(a.y_TN);
  GemmBlock product;
  product.rows = a.x_TK[0];
  product.columns = a.w_NK[0];
  product.depth = a.x_TK[1];
  product.a = x.data;
  product.a_stride = x.stride;
  product.b = w.data;
  product.b_stride = w.stride;
  product.b_order = OperandOrder::column_major;
  product.c = y.data;
  product.c_stride = y.stride;
  product.residual = residual.data;
  product.residual_stride = residual.stride;
  gemm_chunks(product, workers);
}

void add_bias(const AddBiasArgs& a, Workers& workers) {
  const int64_t N = a.y_TN[1];
  const ReadF32 bias(a.bias_N);
  const WriteF32 y(a.y_TN);
  for_ranges(workers, a.y_TN[0], items_per_chunk(N), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t n = 0; n < N; ++n) y.row(t)[n] += bias.data[n];
    }
  });
}

void linear_dgrad(const LinearDgradArgs& a, Workers& workers) {
  const ReadF32 d_y(a.d_y_TN), w(a.w_NK), residual(a.residual_TK);
  const WriteF32 d_x(a.d_x_TK);
  GemmBlock product;
  product.rows = a.d_y_TN[0];
  product.columns = a.w_NK[1];
  product.depth = a.d_y_TN[1];
  product.a = d_y.data;
  product.a_stride = d_y.stride;
  product.b = w.data;
  product.b_stride = w.stride;
  product.b_order = OperandOrder::depth_major;
  product.c = d_x.data;
  product.c_stride = d_x.stride;
  product.residual = residual.data;
  product.residual_stride = residual.stride;
  gemm_chunks(product, workers);
}

void linear_wgrad(const LinearWgradArgs& a, Workers& workers) {
  const int64_t T = a.d_y_TN[0];
  const ReadF32 d_y(a.d_y_TN), x(a.x_TK);
  WgradGroup group;
  group.d_y = d_y.data;
  group.d_y_stride = d_y.stride;
  group.x = x.data;
  group.x_stride = x.stride;
  group.N = a.d_y_TN[1];
  group.K = a.x_TK[1];
  group.slots = a.d_w_SNK.pointer();
  group.slot_stride = a.d_w_SNK.row_stride;
  group.mode = a.target.mode;
  group.row_end = T;
  if (group.mode == GradMode::nodes) {
    const int64_t blocks = T / a.block_tokens;
    std::vector<int32_t> leaf_block(static_cast<size_t>(blocks));
    std::vector<int64_t> leaf_row(static_cast<size_t>(blocks + 1));
    std::iota(leaf_block.begin(), leaf_block.end(), static_cast<int32_t>(a.first_block));
    for (int64_t i = 0; i <= blocks; ++i) leaf_row[i] = i * a.block_tokens;
    group.plan = plan_wgrad(a.target, {leaf_block, leaf_row}, a.d_w_SNK[0], a.present_S.pointer(),
                            a.present_S.row_stride);
  }
  wgrad_groups({&group, 1}, workers);
}

}  // namespace cambium::reference
