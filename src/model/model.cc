#include "src/model/model.h"

#include <algorithm>

#include "kernels/cross_entropy.h"
#include "kernels/embedding.h"
#include "kernels/leaf_fold.h"
#include "kernels/linear.h"
#include "kernels/metric_sum.h"
#include "kernels/qk_norm_rope.h"
#include "kernels/rms_norm.h"
#include "src/base/digest.h"
#include "src/base/philox.h"
#include "src/parallel/batch_layout.h"

namespace cambium {

namespace {

// Rows of logits that exist at a time in fast mode: a few MB at small vocabularies, bounded at
// large. A GPU takes more, so that products fill it and weight gradients are revisited less.
constexpr int64_t kHeadChunkRows = 1024;
constexpr int64_t kHeadChunkRowsCuda = 4096;
constexpr int64_t kInitChunk = int64_t{1} << 22;  // elements drawn and uploaded at a time

int64_t head_chunk_rows(const Rank& rank) {
  return rank.config.run.device == DeviceKind::cuda ? kHeadChunkRowsCuda : kHeadChunkRows;
}

LayerTensors layer_tensors(const ModelConfig& model, const ParamGroup& dense,
                           const ParamGroup& expert, int64_t layer) {
  LayerTensors t;
  t.attn_norm = &dense.tensor(TensorRole::attn_norm, layer);
  t.qkv = &dense.tensor(TensorRole::qkv, layer);
  if (model.qk_norm != QkNorm::none) {
    t.q_norm = &dense.tensor(TensorRole::q_norm, layer);
    t.k_norm = &dense.tensor(TensorRole::k_norm, layer);
  }
  t.attn_out = &dense.tensor(TensorRole::attn_out, layer);
  t.mlp_norm = &dense.tensor(TensorRole::mlp_norm, layer);
  t.router = &dense.tensor(TensorRole::router, layer);
  t.gate_up = &expert.tensor(TensorRole::expert_gate_up, layer);
  t.down = &expert.tensor(TensorRole::expert_down, layer);
  return t;
}

}  // namespace

int64_t Model::local_experts() const { return config_.experts / rank_.mesh.ep; }
int64_t Model::first_expert() const { return rank_.at.ep_index * local_experts(); }

Model::Model(Rank& rank, const ModelConfig& config)
    : rank_(rank), config_(config), tensors_(canonical_tensors(config)) {
  first_norm_block_.push_back(0);
  std::vector<ParamTensor> dense, gate_up, down;
  for (const CanonicalTensor& canonical : tensors_) {
    ParamTensor tensor;
    tensor.canonical = canonical;
    tensor.first_norm_block = first_norm_block_.back();
    const int64_t blocks = (canonical.elements() + kDigestBlockElements - 1) / kDigestBlockElements;
    first_norm_block_.push_back(static_cast<int32_t>(first_norm_block_.back() + blocks));
    const bool mine =
        canonical.expert >= first_expert() && canonical.expert < first_expert() + local_experts();
    if (!canonical.is_expert()) dense.push_back(tensor);
    if (canonical.role == TensorRole::expert_gate_up && mine) gate_up.push_back(tensor);
    if (canonical.role == TensorRole::expert_down && mine) down.push_back(tensor);
  }
  // A layer's experts lie next to each other, equally strided: all gate_up, then all down.
  std::vector<ParamTensor> experts(std::move(gate_up));
  experts.insert(experts.end(), down.begin(), down.end());
  const BatchLayout layout(rank.config);
  ParamGroup::ReplicaRanges dense_ranges, expert_ranges;
  for (const int member : data_group(rank.mesh, rank.at)) {
    dense_ranges.push_back(layout.dense_ranges(member));
  }
  for (const int member : expert_data_group(rank.mesh, rank.at)) {
    expert_ranges.push_back(layout.expert_ranges(member));
  }
  dense_ = std::make_unique<ParamGroup>(rank, "dense", std::move(dense), *rank.data,
                                        std::move(dense_ranges));
  if (config_.tie_embeddings) dense_->tie_head(tied_head_tensor(config_));
  expert_ = std::make_unique<ParamGroup>(rank, "expert", std::move(experts), *rank.expert_data,
                                         std::move(expert_ranges));
  for (int64_t layer = 0; layer < config_.layers; ++layer) {
    layers_.push_back(layer_tensors(config_, *dense_, *expert_, layer));
  }
  positions_ = rank.config.train.sequence_length;
  std::vector<float> cos_SC, sin_SC;
  rope_table({.theta = config_.rope_theta, .head_dim = config_.head_dim, .positions = positions_},
             cos_SC, sin_SC);
  cos_SC_ = rank.upload(cos_SC, "rope cos");
  sin_SC_ = rank.upload(sin_SC, "rope sin");
  const int64_t loads = config_.layers * config_.experts;
  auto state = [&](Buffer& buffer, const char* what) {
    buffer = rank.arena.allocate(4 * loads, MemoryClass::weights, what);
    rank.zero(buffer);
  };
  state(router_.count_LE, "expert loads");
  const BalanceConfig& balance = rank.config.balance;
  if (balance.bias_update_rate > 0) state(router_.select_bias_LE, "selection bias");
  if (balance.loss == BalanceLoss::global_batch_lagged) {
    state(router_.fraction_LE, "lagged expert loads");
  }
  if (balance.loss == BalanceLoss::global_batch) state(router_.global_fraction_E, "expert loads");
}

// Elements [first, ...) of a tensor's initial weights, drawn by all worker threads.
void Model::draw_normal(std::vector<float>& values, int64_t first, const TensorSeed& seed) const {
  constexpr int64_t kPart = 1 << 16;  // about a millisecond of one core
  const int64_t count = std::ssize(values);
  rank_.environment.workers().parallel_for((count + kPart - 1) / kPart, [&](int64_t part,
                                                                            Scratch&) {
    const int64_t at = part * kPart;
    fill_normal(values.data() + at, static_cast<uint64_t>(first + at), std::min(kPart, count - at),
                static_cast<float>(config_.init_std), seed.seed, seed.tensor);
  });
}

void Model::initialize(uint64_t seed) {
  int64_t staged = 0;  // elements on their way to the device
  for (ParamGroup* group : {dense_.get(), expert_.get()}) {
    // The fault `rng_rank`: this rank draws its experts from another seed.
    const bool wrong_seed = group == expert_.get() && rank_.has_init_fault("rng_rank");
    for (const ParamTensor& tensor : group->tensors()) {
      const uint64_t tensor_seed = wrong_seed ? seed + 1 : seed;
      for (int64_t first = 0; first < tensor.elements; first += kInitChunk) {
        std::vector<float> values(
            static_cast<size_t>(std::min(kInitChunk, tensor.elements - first)), 1.0f);
        if (tensor.canonical.shape.rank > 1) {
          draw_normal(values, first, {tensor_seed, tensor_id(tensor.canonical.name)});
        }
        group->set_weights(tensor, first, values);
        staged += std::ssize(values);
        if (staged < kInitChunk) continue;
        rank_.finish_step();
        staged = 0;
      }
    }
    group->refresh_compute_copy();
  }
}

MicroBatch Model::upload(const HostTokens& tokens, InOut<float> metric_leaf_BM) {
  MicroBatch batch;
  batch.tokens = std::ssize(*tokens.token_T);
  batch.sequence_length = tokens.sequence_length;
  batch.first_block = tokens.first_block;
  batch.balance_gradient_scale = tokens.balance_gradient_scale;
  batch.z_gradient_scale = tokens.z_gradient_scale;
  batch.metric_leaf_BM = metric_leaf_BM;
  CHECK_LE(batch.sequence_length, positions_);
  batch.token_T = rank_.upload(*tokens.token_T, "tokens");
  batch.target_T = rank_.upload(*tokens.target_T, "targets");
  batch.position_T = rank_.upload(*tokens.position_T, "positions");
  if (tokens.document_start_T != nullptr) {
    batch.document_start_T = rank_.upload(*tokens.document_start_T, "document starts");
  }
  std::vector<int32_t> block_T(static_cast<size_t>(batch.tokens));
  const int64_t block_tokens = rank_.config.numerics.block_tokens;
  for (int64_t t = 0; t < batch.tokens; ++t) {
    block_T[t] = static_cast<int32_t>(tokens.first_block + t / block_tokens);
  }
  batch.token_block_T = rank_.upload(block_T, "token blocks");
  return batch;
}

LayerContext Model::layer_context(int64_t layer, Keep keep) {
  const Shape table(positions_, config_.head_dim / 2);
  return {.rank = rank_,
          .model = config_,
          .dense = *dense_,
          .expert = *expert_,
          .router = router_,
          .cos_SC = {cos_SC_.f32(), table},
          .sin_SC = {sin_SC_.f32(), table},
          .tensors = layers_[layer],
          .layer = layer,
          .keep = keep};
}

Buffer Model::embed(const MicroBatch& batch) {
  const LayerContext c = layer_context(0);
  const int64_t T = batch.tokens, D = config_.hidden, V = config_.vocab;
  Buffer x_TD = c.real(Shape(T, D), "embedding");
  embedding({.w_VD = dense_->weight(dense_->tensor(TensorRole::embed), Shape(V, D)),
             .token_T = {batch.token_T.as<int32_t>(), Shape(T)},
             .x_TD = c.out(x_TD, Shape(T, D))},
            rank_.ops);
  return x_TD;
}

Buffer Model::layer_forward(const MicroBatch& batch, int64_t layer, Buffer x_TD, LayerState& state,
                            Keep keep) {
  const LayerContext c = layer_context(layer, keep);
  attend_forward(c, batch, std::move(x_TD), state);
  dispatch_forward(c, batch, state);
  expert_forward(c, batch, state);
  if (keep == Keep::recomputing) return {};
  combine_forward(c, batch, state);
  return aggregate_forward(c, batch, state);
}

Buffer Model::layer_backward(const MicroBatch& batch, int64_t layer, Buffer d_out_TD,
                             LayerState& state) {
  const LayerContext c = layer_context(layer);
  LayerGradients gradients;
  gradients.d_out_TD = std::move(d_out_TD);
  aggregate_backward(c, batch, state, gradients);
  expert_backward_input(c, state, gradients);
  dispatch_backward(c, state, gradients);
  expert_backward_weight(c, state, gradients);
  return attend_backward(c, batch, state, gradients);
}

void Model::train_micro_batch(const MicroBatch& batch) {
  std::vector<LayerState> states(static_cast<size_t>(config_.layers));
  Buffer x_TD = embed(batch);
  const bool recompute = rank_.config.recompute.mode == RecomputeMode::full_layer;
  const auto drop_all_but_input = [&](LayerState& state) {
    Buffer input_TD = std::move(state.x_TD);
    state = LayerState{};
    return input_TD;
  };
  for (int64_t layer = 0; layer < config_.layers; ++layer) {
    LayerState& state = states[layer];
    x_TD = layer_forward(batch, layer, std::move(x_TD), state,
                         recompute ? Keep::nothing : Keep::for_backward);
    if (recompute) state.x_TD = drop_all_but_input(state);
  }
  Buffer d_x_TD = head_forward_backward(batch, x_TD);
  for (int64_t layer = config_.layers - 1; layer >= 0; --layer) {
    if (recompute) {
      Buffer input_TD = drop_all_but_input(states[layer]);
      layer_forward(batch, layer, std::move(input_TD), states[layer], Keep::recomputing);
    }
    d_x_TD = layer_backward(batch, layer, std::move(d_x_TD), states[layer]);
    states[layer] = LayerState{};
  }
  const LayerContext c = layer_context(0);
  const ParamTensor& embed_tensor = dense_->tensor(TensorRole::embed);
  const int64_t T = batch.tokens, D = config_.hidden, V = config_.vocab;
  embedding_wgrad({.d_x_TD = c.in(d_x_TD, Shape(T, D)),
                   .token_T = {batch.token_T.as<int32_t>(), Shape(T)},
                   .d_w_SVD = dense_->grad_slots(embed_tensor, Shape(V, D)),
                   .present_SV = dense_->grad_present(embed_tensor, V),
                   .target = dense_->target(),
                   .first_block = batch.first_block,
                   .block_tokens = rank_.config.numerics.block_tokens},
                  rank_.ops);
}

void Model::evaluate_micro_batch(const MicroBatch& batch, float* logits_TV) {
  Buffer x_TD = embed(batch);
  for (int64_t layer = 0; layer < config_.layers; ++layer) {
    LayerState state;
    x_TD = layer_forward(batch, layer, std::move(x_TD), state, Keep::nothing);
  }
  head_evaluate(batch, x_TD, logits_TV);
}

// In fast mode the logits exist chunk by chunk; in exact mode the weight gradient is one call, so
// that its blocks meet in one tree, and the gradients of all logits are kept.
Buffer Model::head_forward_backward(const MicroBatch& batch, const Buffer& x_TD) {
  const LayerContext c = layer_context(0);
  OpContext& ops = rank_.ops;
  const int64_t T = batch.tokens, D = config_.hidden, V = config_.vocab;
  const int64_t block = rank_.config.numerics.block_tokens;
  const ParamTensor& norm = dense_->tensor(TensorRole::final_norm);
  const ParamGroup::HeadGradient head = dense_->head_gradient();
  const In<Real> w_VD = dense_->weight(dense_->head_weights(), Shape(V, D));
  const In<Real> gain_D = dense_->weight(norm, Shape(D));
  const Buffer normed = c.real(Shape(T, D), "final normed");
  const Buffer rstd = rank_.activation(4 * T, "final norm rstd");
  rms_norm({.x_TD = c.in(x_TD, Shape(T, D)),
            .gain_D = gain_D,
            .y_TD = c.out(normed, Shape(T, D)),
            .rstd_T = {rstd.f32(), Shape(T)},
            .epsilon = static_cast<float>(config_.norm_epsilon)},
           ops);
  const bool exact = rank_.config.numerics.reduction == ReductionMode::exact;
  const int64_t chunk = exact ? T : std::min(T, head_chunk_rows(rank_));
  const Buffer logits = c.real(Shape(chunk, V), "logits");
  const Buffer loss = rank_.activation(4 * T, "token losses");
  const Buffer d_normed = c.real(Shape(T, D), "d final normed");
  const int64_t row_bytes = D * dtype_bytes(c.dtype());
  for (int64_t first = 0; first < T; first += chunk) {
    const int64_t rows = std::min(chunk, T - first);
    const In<Real> x(normed.as<std::byte>() + first * row_bytes, c.dtype(), Shape(rows, D));
    linear({.x_TK = x, .w_NK = w_VD, .y_TN = c.out(logits, Shape(rows, V))}, ops);
    cross_entropy({.logits_TV = c.in(logits, Shape(rows, V)),
                   .target_T = {batch.target_T.as<int32_t>() + first, Shape(rows)},
                   .loss_T = {loss.f32() + first, Shape(rows)},
                   .d_logits_TV = c.out(logits, Shape(rows, V))},
                  ops);
    linear_dgrad(
        {.d_y_TN = c.in(logits, Shape(rows, V)),
         .w_NK = w_VD,
         .d_x_TK = {d_normed.as<std::byte>() + first * row_bytes, c.dtype(), Shape(rows, D)}},
        ops);
    linear_wgrad({.d_y_TN = c.in(logits, Shape(rows, V)),
                  .x_TK = x,
                  .d_w_SNK = head.group.grad_slots(head.tensor, Shape(V, D)),
                  .present_S = head.group.grad_present(head.tensor, 0),
                  .target = head.group.target(),
                  .first_block = batch.first_block,
                  .block_tokens = block},
                 ops);
  }
  metric_sum(
      {.value_N = {loss.f32(), Shape(T)}, .leaf_BM = batch.metric_leaf_BM, .column = kMetricLoss},
      ops);
  const Buffer leaf = rank_.activation(4 * (T / block) * D, "d gain leaves");
  Buffer d_x_TD = c.real(Shape(T, D), "d last layer output");
  rms_norm_backward({.d_y_TD = c.in(d_normed, Shape(T, D)),
                     .x_TD = c.in(x_TD, Shape(T, D)),
                     .gain_D = gain_D,
                     .rstd_T = {rstd.f32(), Shape(T)},
                     .d_x_TD = c.out(d_x_TD, Shape(T, D)),
                     .d_gain_leaf_BD = {leaf.f32(), Shape(T / block, D)},
                     .block_tokens = block},
                    ops);
  leaf_fold({.leaf_BN = {leaf.f32(), Shape(T / block, D)},
             .d_w_SN = dense_->grad_slots(norm, Shape(D)),
             .present_S = dense_->grad_present(norm, 0),
             .target = dense_->target(),
             .first_block = batch.first_block},
            ops);
  return d_x_TD;
}

void Model::head_evaluate(const MicroBatch& batch, const Buffer& x_TD, float* logits_TV) {
  const LayerContext c = layer_context(0);
  OpContext& ops = rank_.ops;
  const int64_t T = batch.tokens, D = config_.hidden, V = config_.vocab;
  const In<Real> w_VD = dense_->weight(dense_->head_weights(), Shape(V, D));
  const Buffer normed = c.real(Shape(T, D), "final normed");
  const Buffer rstd = rank_.activation(4 * T, "final norm rstd");
  rms_norm({.x_TD = c.in(x_TD, Shape(T, D)),
            .gain_D = dense_->weight(dense_->tensor(TensorRole::final_norm), Shape(D)),
            .y_TD = c.out(normed, Shape(T, D)),
            .rstd_T = {rstd.f32(), Shape(T)},
            .epsilon = static_cast<float>(config_.norm_epsilon)},
           ops);
  const Buffer loss = rank_.activation(4 * T, "token losses");
  const int64_t chunk = logits_TV != nullptr ? T : std::min(T, head_chunk_rows(rank_));
  const Buffer logits = rank_.activation(4 * chunk * V, "logits");
  for (int64_t first = 0; first < T; first += chunk) {
    const int64_t rows = std::min(chunk, T - first);
    const Out<float> chunk_logits(logits_TV != nullptr ? logits_TV : logits.f32(), Shape(rows, V));
    linear({.x_TK = {normed.as<std::byte>() + first * D * dtype_bytes(c.dtype()), c.dtype(),
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
