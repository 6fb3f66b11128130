#include "src/model/model.h"

#include <algorithm>
#include <map>
#include <numeric>

#include "kernels/embedding.h"
#include "kernels/qk_norm_rope.h"
#include "src/base/digest.h"
#include "src/base/fmath.h"
#include "src/base/philox.h"
#include "src/config/derive.h"
#include "src/model/context.h"
#include "src/parallel/batch_layout.h"

namespace cambium {

namespace {

constexpr int64_t kInitChunk = int64_t{1} << 22;  // elements drawn and uploaded at a time

// The ranks that dense gradients are summed over. The fault `gradient_axis`: those of an expert.
bool has_wrong_axis(const Rank& rank) {
  return std::ranges::any_of(
      rank.config.faults, [](const FaultConfig& fault) { return fault.kind == "gradient_axis"; });
}
ParamReplicas replicas_of(const Rank& rank, GroupKind kind) {
  const bool is_expert = kind == GroupKind::expert || has_wrong_axis(rank);
  if (rank.mesh.copies == 1) return {is_expert ? *rank.expert_data : *rank.data};
  return {is_expert ? *rank.expert_shard : *rank.data_shard,
          is_expert ? rank.expert_copies.get() : rank.data_copies.get()};
}

ParamGroup::ReplicaRanges dense_ranges(const Rank& rank, const BatchLayout& layout) {
  ParamGroup::ReplicaRanges ranges;
  for (const int member : has_wrong_axis(rank) ? expert_data_group(rank.mesh, rank.at)
                                               : data_group(rank.mesh, rank.at)) {
    ranges.push_back(layout.dense_ranges(member));
  }
  return ranges;
}

LayerTensors layer_tensors(const ParamGroup& dense, const ParamGroup* expert, int64_t layer) {
  LayerTensors t;
  t.attn_norm = dense.find(TensorRole::attn_norm, layer);
  t.qkv = dense.find(TensorRole::qkv, layer);
  t.q_norm = dense.find(TensorRole::q_norm, layer);
  t.k_norm = dense.find(TensorRole::k_norm, layer);
  t.attn_out = dense.find(TensorRole::attn_out, layer);
  t.mlp_norm = dense.find(TensorRole::mlp_norm, layer);
  t.router = dense.find(TensorRole::router, layer);
  t.qkv_bias = dense.find(TensorRole::qkv_bias, layer);
  t.attn_out_bias = dense.find(TensorRole::attn_out_bias, layer);
  t.mlp_gate_up = dense.find(TensorRole::mlp_gate_up, layer);
  t.mlp_down = dense.find(TensorRole::mlp_down, layer);
  t.shared_gate_up = dense.find(TensorRole::shared_gate_up, layer);
  t.shared_down = dense.find(TensorRole::shared_down, layer);
  t.shared_gate = dense.find(TensorRole::shared_gate, layer);
  if (expert == nullptr) return t;
  t.gate_up = expert->find(TensorRole::expert_gate_up, layer);
  t.down = expert->find(TensorRole::expert_down, layer);
  return t;
}

RopeTableArgs rope_args(const ModelConfig& model, int64_t positions) {
  RopeTableArgs args{.theta = model.rope_theta, .head_dim = model.head_dim, .positions = positions};
  if (model.rope_kind == RopeKind::plain) return args;
  args.factor = model.rope_factor;
  if (model.rope_kind == RopeKind::linear) return args;
  args.beta_fast = model.rope_beta_fast;
  args.beta_slow = model.rope_beta_slow;
  args.original_positions = rope_original_positions(model);
  args.attention = model.rope_attention_factor;
  if (args.attention == 0) args.attention = 0.1 * fmath::log(model.rope_factor) + 1.0;
  return args;
}

}  // namespace

int64_t Model::local_experts() const { return config_.experts / rank_.mesh.ep; }
int64_t Model::first_expert() const { return rank_.at.ep_index * local_experts(); }

Model::Model(Rank& rank, const ModelConfig& config)
    : rank_(rank), config_(config), tensors_(canonical_tensors(config)) {
  first_norm_block_.push_back(0);
  place_chunks();
  std::vector<ParamTensor> mine;
  for (const CanonicalTensor& canonical : tensors_) {
    ParamTensor tensor;
    tensor.canonical = canonical;
    tensor.first_norm_block = first_norm_block_.back();
    const int64_t blocks = (canonical.elements() + kDigestBlockElements - 1) / kDigestBlockElements;
    first_norm_block_.push_back(static_cast<int32_t>(first_norm_block_.back() + blocks));
    if (is_here(canonical)) mine.push_back(tensor);
  }
  make_groups(std::move(mine));
  embed_ = group_with(TensorRole::embed, -1);
  head_ = group_with(TensorRole::final_norm, -1);
  if (head_ != nullptr) {
    place_head();
  } else if (embed_ != nullptr && config_.tie_embeddings) {
    embed_->tie_to_head_of(static_cast<int>(rank.mesh.pp - 1));
  }
  layers_.resize(static_cast<size_t>(config_.layers));
  for (const Chunk& chunk : chunks_) {
    for (int64_t layer = chunk.layers.first; layer < chunk.layers.end; ++layer) {
      LayerPlace& place = layers_[layer];
      place.dense = group_with(TensorRole::qkv, layer);
      place.expert = group_with(TensorRole::expert_gate_up, layer);
      place.groups.push_back(place.dense);
      if (place.expert != nullptr) place.groups.push_back(place.expert);
      place.tensors = layer_tensors(*place.dense, place.expert, layer);
    }
  }
  positions_ = rank.config.train.sequence_length;
  std::vector<float> cos_SC, sin_SC;
  if (rank.is_shape_only()) {
    cos_SC.resize(static_cast<size_t>(positions_ * config_.head_dim / 2));
    sin_SC.resize(cos_SC.size());
  } else {
    rope_table(rope_args(config_, positions_), cos_SC, sin_SC);
  }
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

void Model::place_chunks() {
  const ParallelConfig& parallel = rank_.config.parallel;
  const int64_t chunks = schedule_chunks(parallel.schedule, parallel.pp, parallel.virtual_stages);
  const std::vector<LayerRange> stages = split_layers(config_.layers, parallel.pp * chunks);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t stage = schedule_stage(parallel.schedule, parallel.pp, rank_.at.pp_index, chunk);
    chunks_.push_back(
        {.layers = stages[stage], .embeds = stage == 0, .ends = stage + 1 == std::ssize(stages)});
  }
}

bool Model::is_here(const CanonicalTensor& tensor) const {
  if (tensor.is_expert() &&
      (tensor.expert < first_expert() || tensor.expert >= first_expert() + local_experts())) {
    return false;
  }
  return std::ranges::any_of(chunks_, [&](const Chunk& chunk) {
    if (tensor.role == TensorRole::embed) return chunk.embeds;
    if (tensor.layer < 0) return chunk.ends;
    return chunk.layers.first <= tensor.layer && tensor.layer < chunk.layers.end;
  });
}

// One group of each kind for all, or for each layer, the embedding and the head.
void Model::make_groups(std::vector<ParamTensor> tensors) {
  const bool by_layer = reduces_each_micro_batch(rank_.config);
  struct Unit {
    std::vector<ParamTensor> dense, gate_up, down;
  };
  std::map<int64_t, Unit> units;
  for (ParamTensor& tensor : tensors) {
    const CanonicalTensor& canonical = tensor.canonical;
    int64_t at = 0;
    if (by_layer && canonical.role != TensorRole::embed) {
      at = canonical.layer < 0 ? config_.layers + 1 : canonical.layer + 1;
    }
    Unit& unit = units[at];
    if (canonical.role == TensorRole::expert_gate_up) {
      unit.gate_up.push_back(std::move(tensor));
    } else if (canonical.role == TensorRole::expert_down) {
      unit.down.push_back(std::move(tensor));
    } else {
      unit.dense.push_back(std::move(tensor));
    }
  }
  const BatchLayout layout(rank_.config);
  ParamGroup::ReplicaRanges expert_ranges;
  for (const int member : expert_data_group(rank_.mesh, rank_.at)) {
    expert_ranges.push_back(layout.expert_ranges(member));
  }
  for (auto& [at, unit] : units) {
    groups_.push_back(std::make_unique<ParamGroup>(rank_, GroupKind::dense, std::move(unit.dense),
                                                   replicas_of(rank_, GroupKind::dense),
                                                   dense_ranges(rank_, layout)));
    // A layer's experts lie next to each other, equally strided: all gate_up, then all down.
    std::vector<ParamTensor> experts(std::move(unit.gate_up));
    experts.insert(experts.end(), unit.down.begin(), unit.down.end());
    if (experts.empty()) continue;
    groups_.push_back(std::make_unique<ParamGroup>(rank_, GroupKind::expert, std::move(experts),
                                                   replicas_of(rank_, GroupKind::expert),
                                                   expert_ranges));
  }
}

void Model::place_head() {
  if (!config_.tie_embeddings) {
    head_weights_ = head_gradient_ = {head_, head_->find(TensorRole::lm_head, -1)};
    return;
  }
  const bool apart = embed_ == nullptr;
  if (!apart) head_weights_ = head_gradient_ = {embed_, embed_->find(TensorRole::embed, -1)};
  const bool exact = rank_.config.numerics.reduction == ReductionMode::exact;
  // In fast mode both uses add to one slot, unless each sends it away when it is done.
  if (!apart && !exact && !reduces_each_micro_batch(rank_.config)) return;
  ParamTensor tensor;
  tensor.canonical = tied_head_tensor(config_);
  tied_head_ = std::make_unique<ParamGroup>(rank_, GroupKind::dense, std::vector{tensor},
                                            replicas_of(rank_, GroupKind::dense),
                                            dense_ranges(rank_, BatchLayout(rank_.config)),
                                            apart ? GroupUse::copied : GroupUse::gradients_only);
  head_gradient_ = {tied_head_.get(), tied_head_->find(TensorRole::lm_head, -1)};
  if (!apart) return embed_->tie_head(*tied_head_);
  head_weights_ = head_gradient_;
  head_->tie_to_embedding_of(0, *tied_head_);
}

void Model::pass_tied_weights() {
  if (embed_ != nullptr) embed_->pass_tied_weights();
  if (head_ != nullptr && head_ != embed_) head_->pass_tied_weights();
}

ParamGroup* Model::group_with(TensorRole role, int64_t layer) const {
  for (const auto& group : groups_) {
    if (group->find(role, layer) != nullptr) return group.get();
  }
  return nullptr;
}

void Model::prefetch_layer(int64_t layer) {
  if (layer < 0 || layer >= config_.layers || layers_[layer].dense == nullptr) return;
  for (ParamGroup* group : layers_[layer].groups) group->prefetch_weights();
}

void Model::hold_layer(int64_t layer) {
  for (ParamGroup* group : layers_[layer].groups) group->hold_weights();
}

void Model::drop_layer(int64_t layer) {
  for (ParamGroup* group : layers_[layer].groups) group->drop_weights();
}

void Model::initialize(uint64_t seed) {
  int64_t staged = 0;  // elements on their way to the device
  for (const auto& group : groups_) {
    // The fault `rng_rank`: this rank draws its experts from another seed.
    const bool wrong_seed = group->kind() == GroupKind::expert && rank_.has_init_fault("rng_rank");
    for (const ParamPiece& piece : group->stored_pieces()) {
      const CanonicalTensor& canonical = piece.tensor->canonical;
      for (int64_t done = 0; done < piece.elements; done += kInitChunk) {
        const ParamPiece part{piece.tensor, piece.first_element + done,
                              std::min(kInitChunk, piece.elements - done)};
        std::vector<float> values(static_cast<size_t>(part.elements),
                                  canonical.is_bias() ? 0.0f : 1.0f);
        if (canonical.shape.rank > 1) {
          draw_normal(values, part.first_element,
                      {wrong_seed ? seed + 1 : seed, tensor_id(canonical.name)});
        }
        group->set_weights(part, values);
        staged += part.elements;
        if (staged < kInitChunk) continue;
        rank_.finish_step();
        staged = 0;
      }
    }
    group->refresh_compute_copy();
  }
  pass_tied_weights();
}

MicroBatch Model::upload(const HostTokens& tokens, InOut<float> metric_leaf_BM) {
  MicroBatch batch;
  batch.tokens = std::ssize(*tokens.token_T);
  batch.sequence_length = tokens.sequence_length;
  batch.index = tokens.index;
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
  if (rank_.mesh.cp > 1) upload_context(tokens, batch);
  std::vector<int32_t> block_T(static_cast<size_t>(batch.tokens));
  const int64_t block_tokens = rank_.config.numerics.block_tokens;
  // Experts see the tokens of their whole group, rank by rank: blocks count on from rank to rank.
  const int64_t first_block = rank_.at.ep_index * BatchLayout(rank_.config).local_blocks();
  for (int64_t t = 0; t < batch.tokens; ++t) {
    block_T[t] = static_cast<int32_t>(first_block + t / block_tokens);
  }
  batch.token_block_T = rank_.upload(block_T, "token blocks");
  return batch;
}

void Model::upload_context(const HostTokens& tokens, MicroBatch& batch) {
  const ContextShare share = context_share(rank_);
  const int64_t S = batch.sequence_length, local_S = S / share.ranks;
  std::vector<int32_t> own_row_T(static_cast<size_t>(batch.tokens));
  std::iota(own_row_T.begin(), own_row_T.end(), 0);
  std::vector<int32_t> context_row_S(static_cast<size_t>(batch.tokens * share.ranks));
  for (int64_t row = 0; row < std::ssize(context_row_S); ++row) {
    const int64_t sequence = row / S, position = row % S;
    context_row_S[row] = static_cast<int32_t>(share.owner(position, S) * batch.tokens +
                                              sequence * local_S + share.row(position, S));
  }
  batch.own_row_T = rank_.upload(own_row_T, "own rows");
  batch.context_row_S = rank_.upload(context_row_S, "context rows");
  if (tokens.document_start_S != nullptr) {
    batch.document_start_S = rank_.upload(*tokens.document_start_S, "document starts of sequences");
  }
}

LayerContext Model::layer_context(int64_t layer, Keep keep) {
  const Shape table(positions_, config_.head_dim / 2);
  return {.rank = rank_,
          .model = config_,
          .dense = *layers_[layer].dense,
          .expert = layers_[layer].expert,
          .router = router_,
          .cos_SC = {cos_SC_.f32(), table},
          .sin_SC = {sin_SC_.f32(), table},
          .tensors = layers_[layer].tensors,
          .layer = layer,
          .keep = keep};
}

DType Model::dtype() const {
  return rank_.config.numerics.compute == ComputeType::bf16 ? DType::bf16 : DType::f32;
}

Buffer Model::real(Shape shape, const char* what) const {
  return rank_.arena.tensor(shape, dtype(), MemoryClass::activations, what);
}

void Model::enter(WorkStage stage, WorkPass pass, const MicroBatch& batch) {
  rank_.enter({stage, pass, -1, static_cast<int32_t>(batch.index)});
}

Buffer Model::embed(const MicroBatch& batch) {
  const int64_t T = batch.tokens, D = config_.hidden, V = config_.vocab;
  enter(WorkStage::embed, WorkPass::forward, batch);
  Buffer x_TD = real(Shape(T, D), "embedding");
  embed_->hold_weights();
  embedding({.w_VD = embed_->weight(*embed_->find(TensorRole::embed, -1), Shape(V, D)),
             .token_T = {batch.token_T.as<int32_t>(), Shape(T)},
             .x_TD = {x_TD.data(), dtype(), Shape(T, D)}},
            rank_.ops);
  embed_->drop_weights();
  return x_TD;
}

void Model::embed_backward(const MicroBatch& batch, const Buffer& d_x_TD) {
  const ParamTensor& tensor = *embed_->find(TensorRole::embed, -1);
  const int64_t T = batch.tokens, D = config_.hidden, V = config_.vocab;
  enter(WorkStage::embed, WorkPass::backward, batch);
  embed_->begin_micro_batch(batch.index);
  embedding_wgrad({.d_x_TD = {d_x_TD.data(), dtype(), Shape(T, D)},
                   .token_T = {batch.token_T.as<int32_t>(), Shape(T)},
                   .d_w_SVD = embed_->grad_slots(tensor, Shape(V, D)),
                   .present_SV = embed_->grad_present(tensor, V),
                   .target = embed_->grad_target(tensor),
                   .block_tokens = rank_.config.numerics.block_tokens},
                  rank_.ops);
  end_groups({embed_});
}

void Model::begin_layer(int64_t layer, const MicroBatch& batch) {
  for (ParamGroup* group : layers_[layer].groups) group->begin_micro_batch(batch.index);
}

void Model::end_layer(int64_t layer) { end_groups(layers_[layer].groups); }

void Model::end_groups(std::vector<ParamGroup*> groups) {
  for (ParamGroup* group : groups) group->end_micro_batch();
  for (ParamGroup* group : leaving_) {
    if (std::ranges::find(groups, group) == groups.end()) group->land_gradients();
  }
  leaving_ = std::move(groups);
}

}  // namespace cambium
