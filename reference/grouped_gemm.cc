// Grouped GEMM (kernels/grouped_gemm.h): chunks of each expert's rows and columns on the product
// kernel of reference/gemm.h, SwiGLU applied to a chunk while it is in cache.
#include "kernels/grouped_gemm.h"

#include <algorithm>
#include <vector>

#include "reference/gemm.h"
#include "reference/rounding.h"
#include "reference/swiglu_row.h"
#include "reference/wgrad.h"

namespace cambium::reference {

namespace {

// Down dgrad needs whole rows of g for its dot product, so it cuts rows only.
constexpr int64_t kDgradRows = 128;

std::span<const int32_t> checked_offsets(const In<int32_t>& expert_offset_e1, int64_t R) {
  const std::span offsets(expert_offset_e1.pointer(), static_cast<size_t>(expert_offset_e1[0]));
  CHECK_EQ(offsets.front(), 0);
  CHECK_EQ(offsets.back(), R);
  CHECK(std::is_sorted(offsets.begin(), offsets.end()));
  return offsets;
}

// A part of one expert's product; rows are counted over all experts.
struct ExpertPart {
  int64_t expert = 0;
  GemmPart part;
};

// Parts of every expert's [rows, columns] product, cut by `cut_rows(rows)` -> GemmCut.
template <class CutRows>
std::vector<ExpertPart> expert_parts(std::span<const int32_t> offsets, int64_t columns,
                                     CutRows&& cut_rows) {
  std::vector<ExpertPart> parts;
  for (size_t x = 0; x + 1 < offsets.size(); ++x) {
    const int64_t end = offsets[x + 1], rows = end - offsets[x];
    if (rows == 0 || columns == 0) continue;
    const GemmCut cut = cut_rows(rows);
    for (int64_t row = offsets[x]; row < end; row += cut.row_chunk) {
      for (int64_t column = 0; column < columns; column += cut.column_chunk) {
        parts.push_back({static_cast<int64_t>(x),
                         {row, std::min(cut.row_chunk, end - row), column,
                          std::min(cut.column_chunk, columns - column)}});
      }
    }
  }
  return parts;
}

// Runs `product` (B = expert 0's weights) over the parts, with each expert's own weights.
void grouped_product(const GemmBlock& product, std::span<const int32_t> offsets,
                     int64_t expert_stride, Workers& workers) {
  const std::vector<ExpertPart> parts = expert_parts(offsets, product.columns, [&](int64_t rows) {
    return cut_gemm({rows, product.rows, product.columns, product.depth});
  });
  workers.parallel_for(static_cast<int64_t>(parts.size()), [&](int64_t chunk, Scratch& scratch) {
    GemmBlock block = product.part(parts[chunk].part);
    block.b += parts[chunk].expert * expert_stride;
    gemm_block(block, scratch);
  });
}

// Rows of A that lie where `index` says.
void check_rows(const In<int32_t>& index, const ReadF32& rows) {
  for (int64_t r = 0; !index.empty() && r < index[0]; ++r) {
    CHECK(index.pointer()[r] >= 0 && index.pointer()[r] < rows.count);
  }
}

// The part's rows of A side by side, where its product wants them.
void gather_a(const ReadF32& rows, const In<int32_t>& index, const GemmPart& part, GemmBlock& block,
              Scratch& scratch) {
  if (index.empty()) return;
  float* to = scratch.floats(kFirstFreeSlot, part.rows * block.depth);
  for (int64_t r = 0; r < part.rows; ++r) {
    std::copy_n(rows.row(index.pointer()[part.row + r]), block.depth, to + r * block.depth);
  }
  block.a = to;
  block.a_stride = block.depth;
}

void round_block(float* data, int64_t stride, int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < columns; ++i) {
      data[row * stride + i] = round_to_bf16(data[row * stride + i]);
    }
  }
}

}  // namespace

void grouped_up(const GroupedUpArgs& a, Workers& workers) {
  const int64_t R = a.h_RF[0], D = a.x_RD[1], F = a.h_RF[1];
  const std::span<const int32_t> offsets = checked_offsets(a.expert_offset_e1, R);
  const ReadF32 x(a.x_RD), w(a.w_up_eND);
  check_rows(a.row_token_R, x);
  const WriteF32 gate_up(a.gate_up_RN), h(a.h_RF);
  GemmBlock gate;
  gate.rows = R;
  gate.columns = F;
  gate.depth = D;
  gate.a = x.data;
  gate.a_stride = a.row_token_R.empty() ? x.stride : 0;  // gathered part by part
  gate.b = w.data;
  gate.b_stride = D;
  gate.b_order = OperandOrder::column_major;
  gate.c = gate_up.data;
  gate.c_stride = gate_up.stride;
  GemmBlock up = gate;
  up.b += F * D;
  up.c += F;
  const std::vector<ExpertPart> parts = expert_parts(offsets, F, [&](int64_t rows) {
    return cut_gemm({rows, R, F, 2 * D});  // a column is a gate column and an up column
  });
  workers.parallel_for(static_cast<int64_t>(parts.size()), [&](int64_t chunk, Scratch& scratch) {
    const GemmPart& part = parts[chunk].part;
    GemmBlock halves[] = {gate.part(part), up.part(part)};
    gather_a(x, a.row_token_R, part, halves[0], scratch);
    halves[1].a = halves[0].a;
    halves[1].a_stride = halves[0].a_stride;
    for (GemmBlock& block : halves) {
      block.b += parts[chunk].expert * w.stride;
      gemm_block(block, scratch);
      if (a.gate_up_RN.dtype == DType::bf16) {
        round_block(block.c, block.c_stride, block.rows, block.columns);
      }
    }
    for (int64_t row = part.row; row < part.row + part.rows; ++row) {
      const float* from = gate_up.row(row) + part.column;
      swiglu_row(from, from + F, h.row(row) + part.column, part.columns);
    }
  });
}

void grouped_down(const GroupedDownArgs& a, Workers& workers) {
  const ReadF32 h(a.h_RF), w(a.w_down_eDF);
  const WriteF32 y(a.y_RD);
  GemmBlock product;
  product.rows = a.h_RF[0];
  product.columns = a.y_RD[1];
  product.depth = a.h_RF[1];
  product.a = h.data;
  product.a_stride = h.stride;
  product.b = w.data;
  product.b_stride = a.h_RF[1];
  product.b_order = OperandOrder::column_major;
  product.c = y.data;
  product.c_stride = y.stride;
  product.row_scale = a.weight_R.pointer();
  grouped_product(product, checked_offsets(a.expert_offset_e1, product.rows), w.stride, workers);
}

void grouped_down_dgrad(const GroupedDownDgradArgs& a, Workers& workers) {
  const int64_t R = a.gate_up_RN[0], D = a.d_y_RD[1], F = a.w_down_eDF[2];
  const std::span<const int32_t> offsets = checked_offsets(a.expert_offset_e1, R);
  const ReadF32 d_y(a.d_y_RD), w(a.w_down_eDF), gate_up(a.gate_up_RN);
  check_rows(a.row_token_R, d_y);
  const WriteF32 d_gate_up(a.d_gate_up_RN), weighted_h(a.weighted_h_RF);
  GemmBlock product;  // g = d_y W_down, into the place of d_gate
  product.rows = R;
  product.columns = F;
  product.depth = D;
  product.a = d_y.data;
  product.a_stride = a.row_token_R.empty() ? d_y.stride : 0;
  product.b = w.data;
  product.b_stride = F;
  product.c = d_gate_up.data;
  product.c_stride = d_gate_up.stride;
  const std::vector<ExpertPart> parts = expert_parts(offsets, F, [&](int64_t rows) {
    return GemmCut{std::min(rows, kDgradRows), F};
  });
  workers.parallel_for(static_cast<int64_t>(parts.size()), [&](int64_t chunk, Scratch& scratch) {
    const GemmPart& part = parts[chunk].part;
    GemmBlock block = product.part(part);
    gather_a(d_y, a.row_token_R, part, block, scratch);
    block.b += parts[chunk].expert * w.stride;
    gemm_block(block, scratch);
    for (int64_t row = part.row; row < part.row + part.rows; ++row) {
      DownDgradRow values;
      values.gate = gate_up.row(row);
      values.up = values.gate + F;
      values.weight = a.weight_R.empty() ? 1.0f : a.weight_R.pointer()[row];
      values.d_gate = d_gate_up.row(row);
      values.d_up = values.d_gate + F;
      values.weighted_h = weighted_h.row(row);
      const float d_weight = down_dgrad_row(values, F);
      if (!a.d_weight_R.empty()) a.d_weight_R.pointer()[row] = d_weight;
    }
  });
}

void grouped_up_dgrad(const GroupedUpDgradArgs& a, Workers& workers) {
  const ReadF32 d_gate_up(a.d_gate_up_RN), w(a.w_up_eND);
  const WriteF32 d_x(a.d_x_RD);
  GemmBlock product;
  product.rows = a.d_gate_up_RN[0];
  product.columns = a.d_x_RD[1];
  product.depth = a.d_gate_up_RN[1];
  product.a = d_gate_up.data;
  product.a_stride = d_gate_up.stride;
  product.b = w.data;
  product.b_stride = a.d_x_RD[1];
  product.c = d_x.data;
  product.c_stride = d_x.stride;
  grouped_product(product, checked_offsets(a.expert_offset_e1, product.rows), w.stride, workers);
}

void grouped_wgrad(const GroupedWgradArgs& a, Workers& workers) {
  const int64_t R = a.rows(), e = a.d_w_SeNK[1];
  const std::span<const int32_t> offsets = checked_offsets(a.expert_offset_e1, R);
  const ReadF32 d_y(a.d_y_RN), x(a.x_RK);
  check_rows(a.d_y_token_R, d_y);
  check_rows(a.x_token_R, x);
  std::vector<WgradGroup> groups(static_cast<size_t>(e));
  std::vector<int32_t> leaf_block;
  std::vector<int64_t> leaf_row;
  for (int64_t expert = 0; expert < e; ++expert) {
    WgradGroup& group = groups[expert];
    group.d_y = d_y.data;
    group.d_y_stride = d_y.stride;
    group.x = x.data;
    group.x_stride = x.stride;
    group.d_y_row = a.d_y_token_R.pointer();
    group.x_row = a.x_token_R.pointer();
    group.N = a.d_y_RN[1];
    group.K = a.x_RK[1];
    group.slots = a.d_w_SeNK.pointer() + expert * a.expert_stride;
    group.slot_stride = a.d_w_SeNK.row_stride;
    group.mode = a.target.mode;
    group.row_begin = offsets[expert];
    group.row_end = offsets[expert + 1];
    if (group.mode != GradMode::nodes) continue;
    const int32_t* row_block = a.row_block_R.pointer();
    leaf_block.clear();
    leaf_row.clear();
    for (int64_t row = group.row_begin; row < group.row_end; ++row) {
      if (!leaf_block.empty() && leaf_block.back() == row_block[row]) continue;
      if (!leaf_block.empty() && leaf_block.back() > row_block[row]) {
        fail(
            ExitCode::verification_mismatch,
            "grouped_wgrad: row {} of expert {} is of block {} after block {}: the routing sort is "
            "not stable by (token, k)",
            row, expert, row_block[row], leaf_block.back());
      }
      leaf_block.push_back(row_block[row]);
      leaf_row.push_back(row);
    }
    leaf_row.push_back(group.row_end);
    group.plan = plan_wgrad(a.target, {leaf_block, leaf_row}, a.d_w_SeNK[0],
                            a.present_Se.pointer() + expert, a.present_Se.row_stride);
  }
  wgrad_groups(groups, workers);
}

}  // namespace cambium::reference
