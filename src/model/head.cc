// The model's end: final norm, vocabulary head and loss, and their gradients.
#include "kernels/cross_entropy.h"
#include "kernels/leaf_fold.h"
#include "kernels/linear.h"
#include "kernels/metric_sum.h"
#include "kernels/rms_norm.h"
#include "src/model/model.h"

namespace cambium {

namespace {

// Rows of logits that exist at a time in fast mode: a few MB at small vocabularies, bounded at
// large. A GPU takes more, so that products fill it and weight gradients are revisited less.
constexpr int64_t kHeadChunkRows = 1024;
constexpr int64_t kHeadChunkRowsCuda = 4096;

int64_t head_chunk_rows(const Rank& rank) {
  return rank.config.run.device == DeviceKind::cuda ? kHeadChunkRowsCuda : kHeadChunkRows;
}

}  // namespace

// In fast mode the logits exist chunk by chunk; in exact mode the weight gradient is one call, so
// that its blocks meet in one tree, and the gradients of all logits are kept.
Buffer Model::head_forward_backward(const MicroBatch& batch, const Buffer& x_TD) {
  OpContext& ops = rank_.ops;
  const int64_t T = batch.tokens, D = config_.hidden, V = config_.vocab;
  const int64_t block = rank_.config.numerics.block_tokens;
  const ParamTensor& norm = *head_->find(TensorRole::final_norm, -1);
  const HeadWeights& head = head_gradient_;
  const In<Real> w_VD = head_weights_.group->weight(*head_weights_.tensor, Shape(V, D));
  const In<Real> gain_D = head_->weight(norm, Shape(D));
  const Buffer normed = real(Shape(T, D), "final normed");
  const Buffer rstd = rank_.activation(4 * T, "final norm rstd");
  rms_norm({.x_TD = {x_TD.data(), dtype(), Shape(T, D)},
            .gain_D = gain_D,
            .y_TD = {normed.data(), dtype(), Shape(T, D)},
            .rstd_T = {rstd.f32(), Shape(T)},
            .epsilon = static_cast<float>(config_.norm_epsilon)},
           ops);
  const bool exact = rank_.config.numerics.reduction == ReductionMode::exact;
  const int64_t chunk = exact ? T : std::min(T, head_chunk_rows(rank_));
  const Buffer logits = real(Shape(chunk, V), "logits");
  const Buffer loss = rank_.activation(4 * T, "token losses");
  const Buffer d_normed = real(Shape(T, D), "d final normed");
  const int64_t row_bytes = D * dtype_bytes(dtype());
  for (int64_t first = 0; first < T; first += chunk) {
    const int64_t rows = std::min(chunk, T - first);
    const In<Real> x(normed.as<std::byte>() + first * row_bytes, dtype(), Shape(rows, D));
    linear({.x_TK = x, .w_NK = w_VD, .y_TN = {logits.data(), dtype(), Shape(rows, V)}}, ops);
    cross_entropy({.logits_TV = {logits.data(), dtype(), Shape(rows, V)},
                   .target_T = {batch.target_T.as<int32_t>() + first, Shape(rows)},
                   .loss_T = {loss.f32() + first, Shape(rows)},
                   .d_logits_TV = {logits.data(), dtype(), Shape(rows, V)}},
                  ops);
    linear_dgrad(
        {.d_y_TN = {logits.data(), dtype(), Shape(rows, V)},
         .w_NK = w_VD,
         .d_x_TK = {d_normed.as<std::byte>() + first * row_bytes, dtype(), Shape(rows, D)}},
        ops);
    linear_wgrad({.d_y_TN = {logits.data(), dtype(), Shape(rows, V)},
                  .x_TK = x,
                  .d_w_SNK = head.group->grad_slots(*head.tensor, Shape(V, D)),
                  .present_S = head.group->grad_present(*head.tensor, 0),
                  .target = head.group->grad_target(*head.tensor),
                  .block_tokens = block},
                 ops);
  }
  metric_sum(
      {.value_N = {loss.f32(), Shape(T)}, .leaf_BM = batch.metric_leaf_BM, .column = kMetricLoss},
      ops);
  const Buffer leaf = rank_.activation(4 * (T / block) * D, "d gain leaves");
  Buffer d_x_TD = real(Shape(T, D), "d last layer output");
  rms_norm_backward({.d_y_TD = {d_normed.data(), dtype(), Shape(T, D)},
                     .x_TD = {x_TD.data(), dtype(), Shape(T, D)},
                     .gain_D = gain_D,
                     .rstd_T = {rstd.f32(), Shape(T)},
                     .d_x_TD = {d_x_TD.data(), dtype(), Shape(T, D)},
                     .d_gain_leaf_BD = {leaf.f32(), Shape(T / block, D)},
                     .block_tokens = block},
                    ops);
  leaf_fold({.leaf_BN = {leaf.f32(), Shape(T / block, D)},
             .d_w_SN = head_->grad_slots(norm, Shape(D)),
             .present_S = head_->grad_present(norm, 0),
             .target = head_->grad_target(norm)},
            ops);
  return d_x_TD;
}

void Model::head_evaluate(const MicroBatch& batch, const Buffer& x_TD, float* logits_TV) {
  OpContext& ops = rank_.ops;
  const int64_t T = batch.tokens, D = config_.hidden, V = config_.vocab;
  const In<Real> w_VD = head_weights_.group->weight(*head_weights_.tensor, Shape(V, D));
  const Buffer normed = real(Shape(T, D), "final normed");
  const Buffer rstd = rank_.activation(4 * T, "final norm rstd");
  rms_norm({.x_TD = {x_TD.data(), dtype(), Shape(T, D)},
            .gain_D = head_->weight(*head_->find(TensorRole::final_norm, -1), Shape(D)),
            .y_TD = {normed.data(), dtype(), Shape(T, D)},
            .rstd_T = {rstd.f32(), Shape(T)},
            .epsilon = static_cast<float>(config_.norm_epsilon)},
           ops);
  const Buffer loss = rank_.activation(4 * T, "token losses");
  const int64_t chunk = logits_TV != nullptr ? T : std::min(T, head_chunk_rows(rank_));
  const Buffer logits = rank_.activation(4 * chunk * V, "logits");
  for (int64_t first = 0; first < T; first += chunk) {
    const int64_t rows = std::min(chunk, T - first);
    const Out<float> chunk_logits(logits_TV != nullptr ? logits_TV : logits.f32(), Shape(rows, V));
    linear({.x_TK = {normed.as<std::byte>() + first * D * dtype_bytes(dtype()), dtype(),
                     Shape(rows, D)},
            .w_NK = w_VD,
            .y_TN = chunk_logits},
           ops);
    cross_entropy({.logits_TV = {chunk_logits.pointer(), DType::f32, Shape(rows, V)},
                   .target_T = {batch.target_T.as<int32_t>() + first, Shape(rows)},
                   .loss_T = {loss.f32() + first, Shape(rows)}},
                  ops);
  }
  if (batch.metric_leaf_BM.empty()) return;
  metric_sum(
      {.value_N = {loss.f32(), Shape(T)}, .leaf_BM = batch.metric_leaf_BM, .column = kMetricLoss},
      ops);
}

}  // namespace cambium
