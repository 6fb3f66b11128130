#include "src/train/step_routing.h"

#include "src/model/context.h"
#include "src/parallel/schedule.h"

namespace cambium {

namespace {

enum TraceTable : int64_t { kChosenIds, kChosenWeights, kTraceTables };

// The layers with experts of a pipeline rank, chunk by chunk.
std::vector<int64_t> layers_with_experts(const Config& config, int64_t pp_index) {
  const ParallelConfig& parallel = config.parallel;
  const int64_t chunks = schedule_chunks(parallel.schedule, parallel.pp, parallel.virtual_stages);
  const std::vector<LayerRange> stages = split_layers(config.model.layers, parallel.pp * chunks);
  std::vector<int64_t> layers;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const LayerRange range =
        stages[schedule_stage(parallel.schedule, parallel.pp, pp_index, chunk)];
    for (int64_t layer = range.first; layer < range.end; ++layer) {
      if (!config.model.is_dense(layer)) layers.push_back(layer);
    }
  }
  return layers;
}

}  // namespace

int64_t StepRouting::micro_batch_choices() const {
  const Config& config = rank_.config;
  return layout_.micro_batch_sequences * config.train.sequence_length / layout_.mesh.cp *
         config.model.top_k;
}

void StepRouting::start_trace() {
  if (!table_.empty()) return;
  table_ = rank_.workspace(
      4 * kTraceTables * rank_.config.model.layers * layout_.micro_batches * micro_batch_choices(),
      "routing trace");
}

// Experts of this rank's tokens of a micro-batch in one layer, [T, K].
std::vector<int32_t> StepRouting::forced_ids(int64_t batch_index, int64_t micro_batch,
                                             int64_t layer) {
  const Config& config = rank_.config;
  const int64_t S = config.train.sequence_length, K = config.model.top_k;
  const ContextShare share = context_share(rank_);
  const int64_t local_S = S / share.ranks;
  std::vector<int32_t> whole;
  if (config.balance.routing == RoutingChoice::replay && !rank_.is_shape_only()) {
    if (!replayed_.has_value()) replayed_.emplace(config);
    whole = replayed_->read(
        batch_index, layer,
        {layout_.first_sequence(rank_.at.dp_index, micro_batch), layout_.micro_batch_sequences});
  }
  std::vector<int32_t> ids(static_cast<size_t>(micro_batch_choices()));
  for (int64_t i = 0; i < std::ssize(ids); ++i) {
    const int64_t t = i / K, k = i % K;
    const int64_t position = share.position(t % local_S, S);
    ids[i] = whole.empty() ? static_cast<int32_t>(even_expert(config.model, position, k))
                           : whole[(t / local_S * S + position) * K + k];
  }
  return ids;
}

void StepRouting::attach(int64_t batch_index, MicroBatch& batch) {
  const Config& config = rank_.config;
  const int64_t K = config.model.top_k, choices = micro_batch_choices();
  const std::vector<int64_t> layers = layers_with_experts(config, rank_.at.pp_index);
  const auto layer_count = static_cast<size_t>(config.model.layers);
  if (!table_.empty()) {
    batch.traced_L.resize(layer_count);
    for (const int64_t layer : layers) {
      const auto row = [&](TraceTable table) {
        return ((table * config.model.layers + layer) * layout_.micro_batches + batch.index) *
               choices;
      };
      batch.traced_L[layer] = {{table_.as<int32_t>() + row(kChosenIds), Shape(batch.tokens, K)},
                               {table_.f32() + row(kChosenWeights), Shape(batch.tokens, K)}};
    }
  }
  if (config.balance.routing == RoutingChoice::learned) return;
  const bool alike = config.balance.routing == RoutingChoice::even;
  std::vector<int32_t> forced;
  for (const int64_t layer : layers) {
    if (alike && !forced.empty()) break;
    const std::vector<int32_t> ids = forced_ids(batch_index, batch.index, layer);
    forced.insert(forced.end(), ids.begin(), ids.end());
  }
  batch.forced_index = rank_.upload(forced, "forced experts");
  batch.forced_index_LTK.resize(layer_count);
  const int32_t* from = batch.forced_index.as<int32_t>();
  for (const int64_t layer : layers) {
    batch.forced_index_LTK[layer] = {from, Shape(batch.tokens, K)};
    if (!alike) from += choices;
  }
}

// The parts of the table that rank `at` fills.
std::vector<Message> StepRouting::messages(const Buffer& table, const MeshCoordinates& at) const {
  const int64_t row = layout_.micro_batches * micro_batch_choices();
  std::vector<Message> messages;
  for (int64_t part = 0; part < kTraceTables; ++part) {
    for (const int64_t layer : layers_with_experts(rank_.config, at.pp_index)) {
      const int64_t first = (part * rank_.config.model.layers + layer) * row;
      messages.push_back({0, table.as<int32_t>() + first, row});
    }
  }
  return messages;
}

TracedRouting StepRouting::collect() {
  CHECK(!table_.empty());
  const Config& config = rank_.config;
  TracedRouting routing;
  // NOTE: nothing waits for compute's table: the host knows the step, and each part, to be over.
  if (!rank_.is_first()) {
    rank_.compute_waits(exchange({.communicator = *rank_.world,
                                  .stream = rank_.comm,
                                  .sends = messages(table_, rank_.at),
                                  .dtype = DType::i32}));
    rank_.finish_step();
    return routing;
  }
  const auto values =
      static_cast<size_t>(config.model.layers * config.train.global_batch_sequences *
                          config.train.sequence_length * config.model.top_k);
  routing.expert_ids.assign(values, -1);
  routing.gate_weights.assign(values, 0.0f);
  place(table_, rank_.at, routing);
  Buffer received;
  if (rank_.world->ranks() > 1) received = rank_.workspace(table_.size_bytes(), "received trace");
  for (int peer = 1; peer < rank_.world->ranks(); ++peer) {
    const MeshCoordinates from = mesh_coordinates(rank_.mesh, peer);
    std::vector<Message> receives = messages(received, from);
    for (Message& message : receives) message.peer = peer;
    rank_.compute_waits(exchange({.communicator = *rank_.world,
                                  .stream = rank_.comm,
                                  .recvs = receives,
                                  .dtype = DType::i32}));
    place(received, from, routing);
  }
  return routing;
}

// A rank's rows go where their sequences and positions stand in the global batch.
void StepRouting::place(const Buffer& table, const MeshCoordinates& from, TracedRouting& routing) {
  const Config& config = rank_.config;
  const int64_t S = config.train.sequence_length, K = config.model.top_k;
  const int64_t B = config.train.global_batch_sequences;
  const ContextShare share{.ranks = rank_.mesh.cp, .index = from.cp_index};
  const int64_t local_S = S / share.ranks, row = micro_batch_choices();
  for (const int64_t layer : layers_with_experts(config, from.pp_index)) {
    const int64_t count = layout_.micro_batches * row;
    const auto part = [&](TraceTable of) {
      return table.as<int32_t>() + (of * config.model.layers + layer) * count;
    };
    const std::vector<int32_t> ids = rank_.read<int32_t>(part(kChosenIds), count);
    const std::vector<float> weights = rank_.read<float>(part(kChosenWeights), count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t micro_batch = i / row, t = i % row / K;
      const int64_t sequence = layout_.first_sequence(from.dp_index, micro_batch) + t / local_S;
      const int64_t position = share.position(t % local_S, S);
      const int64_t to = ((layer * B + sequence) * S + position) * K + i % K;
      routing.expert_ids[to] = ids[i];
      routing.gate_weights[to] = weights[i];
    }
  }
  rank_.finish_step();
}

}  // namespace cambium
