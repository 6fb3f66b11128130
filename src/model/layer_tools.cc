// Helpers that the stages of a layer share.
#include "src/model/layer_tools.h"

#include "kernels/combine.h"
#include "kernels/copy.h"
#include "kernels/leaf_fold.h"
#include "kernels/linear.h"

namespace cambium {

int64_t metric_columns(const Config& config) {
  const bool exact = config.numerics.reduction == ReductionMode::exact;
  return exact ? 1 + kLayerMetrics * config.model.layers : int64_t{kMetricColumns};
}

int64_t metric_column(const Config& config, MetricColumn column, int64_t layer) {
  const bool exact = config.numerics.reduction == ReductionMode::exact;
  return column + (exact && column != kMetricLoss ? kLayerMetrics * layer : 0);
}

DType LayerContext::dtype() const {
  return rank.config.numerics.compute == ComputeType::bf16 ? DType::bf16 : DType::f32;
}

void LayerContext::enter(WorkStage stage, WorkPass pass, int64_t micro_batch) const {
  rank.environment.place = {stage, pass, static_cast<int16_t>(layer),
                            static_cast<int32_t>(micro_batch)};
}

Buffer LayerContext::real(Shape shape, const char* what) const {
  return rank.arena.tensor(shape, dtype(), MemoryClass::activations, what);
}

In<Real> LayerContext::in(const Buffer& buffer, Shape shape, int64_t stride) const {
  return {buffer.data(), dtype(), shape, stride};
}

Out<Real> LayerContext::out(const Buffer& buffer, Shape shape, int64_t stride) const {
  return {buffer.data(), dtype(), shape, stride};
}

In<Real> gain(const LayerContext& c, const ParamTensor* tensor) {
  if (tensor == nullptr) return {};
  return c.dense.weight(*tensor, Shape(tensor->elements));
}

void dense_wgrad(const LayerContext& c, LayerGradients& g, const ParamTensor& tensor,
                 In<Real> d_y_TN, In<Real> x_TK) {
  if (g.weights == WeightGradients::later) {
    g.dense_wgrads.push_back({&tensor, d_y_TN, x_TK});
    return;
  }
  linear_wgrad({.d_y_TN = d_y_TN,
                .x_TK = x_TK,
                .d_w_SNK = c.dense.grad_slots(tensor, Shape(d_y_TN[1], x_TK[1])),
                .present_S = c.dense.grad_present(tensor, 0),
                .target = c.dense.grad_target(tensor),
                .block_tokens = c.rank.config.numerics.block_tokens},
               c.rank.ops);
}

void gain_wgrad(const LayerContext& c, LayerGradients& g, GainWgrad wgrad) {
  if (g.weights == WeightGradients::later) {
    g.gain_wgrads.push_back(std::move(wgrad));
    return;
  }
  const ParamTensor& tensor = *wgrad.tensor;
  leaf_fold({.leaf_BN = in_f32(wgrad.leaf, Shape(wgrad.rows, tensor.elements)),
             .d_w_SN = c.dense.grad_slots(tensor, Shape(tensor.elements)),
             .present_S = c.dense.grad_present(tensor, 0),
             .target = c.dense.grad_target(tensor),
             .rows_per_block = wgrad.rows_per_block},
            c.rank.ops);
}

void bias_wgrad(const LayerContext& c, LayerGradients& g, const ParamTensor& tensor,
                In<Real> d_y_TN) {
  const int64_t T = d_y_TN[0], N = d_y_TN[1];
  CHECK(d_y_TN.is_contiguous());
  Buffer leaf = floats(c, T * N, "d bias rows");
  cast_real(
      {.from_N = {d_y_TN.data, d_y_TN.dtype, Shape(T * N)}, .to_N = out_f32(leaf, Shape(T * N))},
      c.rank.ops);
  gain_wgrad(c, g, {&tensor, std::move(leaf), T, c.rank.config.numerics.block_tokens});
}

void sum_rows(const LayerContext& c, int64_t tokens, LayerState& s, const Buffer& rows,
              In<Real> residual_TD, Out<Real> out_TD) {
  const Extents x(c, tokens);
  const DispatchState& d = s.dispatch;
  const int64_t home_rows = x.P == 1 || is_exact(c) ? x.T * x.K : d.sent;
  In<int32_t> index = in_i32(s.expert.slot_row_MK, Shape(x.T, x.K));
  if (x.P > 1) {
    index = is_exact(c) ? in_i32(d.return_row_TK, Shape(x.T, x.K))
                        : in_i32(d.token_part_TP, Shape(x.T, x.P));
  }
  combine_rows({.y_RD = c.in(rows, Shape(home_rows, x.D)),
                .row_index_TK = index,
                .residual_TD = residual_TD,
                .out_TD = out_TD},
               c.rank.ops);
}

}  // namespace cambium
