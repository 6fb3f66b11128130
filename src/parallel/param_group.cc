#include "src/parallel/param_group.h"

#include <algorithm>

#include "kernels/copy.h"
#include "kernels/grad_merge.h"
#include "src/base/digest.h"
#include "src/parallel/batch_layout.h"

namespace cambium {

namespace {

constexpr int64_t kBlock = kDigestBlockElements;

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// A run of a piece whose elements belong to `groups` presence flags of `group_elements` each.
struct FlagRun {
  int64_t first_element, groups, group_elements, first_flag;
};

// A piece as at most three runs: a partial row, whole rows, a partial row.
std::vector<FlagRun> flag_runs(const ParamPiece& piece) {
  const int64_t per_flag = piece.tensor->elements / piece.tensor->flags;
  std::vector<FlagRun> runs;
  int64_t at = piece.first_element;
  const int64_t end = at + piece.elements;
  while (at < end) {
    const int64_t flag = at / per_flag, within = at % per_flag;
    FlagRun run{at, 1, std::min(per_flag - within, end - at), flag};
    if (within == 0 && end - at >= per_flag) {
      run.groups = (end - at) / per_flag;
      run.group_elements = per_flag;
    }
    runs.push_back(run);
    at += run.groups * run.group_elements;
  }
  return runs;
}

}  // namespace

ParamGroup::ParamGroup(Rank& rank, std::string name, std::vector<ParamTensor> tensors,
                       Communicator& replicas, ReplicaRanges ranges, GroupUse use)
    : rank_(rank),
      name_(std::move(name)),
      tensors_(std::move(tensors)),
      replicas_(replicas),
      use_(use),
      forest_(BatchLayout(rank.config).total_blocks),
      ranges_(std::move(ranges)) {
  shards_ = replicas_.ranks();
  CHECK_EQ(std::ssize(ranges_), shards_);
  for (ParamTensor& tensor : tensors_) {
    tensor.elements = tensor.canonical.elements();
    tensor.flags = tensor.canonical.role == TensorRole::embed ? tensor.canonical.shape[0] : 1;
    tensor.offset = padded_;
    tensor.first_flag = flags_;
    padded_ += round_up(tensor.elements, kBlock);
    flags_ += tensor.flags;
  }
  padded_ = round_up(std::max<int64_t>(padded_, 1), kBlock * shards_);
  const bool replicated = rank.config.parallel.sharding == Sharding::none;
  owned_ = pieces_in(shard_first(), shard_first() + shard_elements());
  optimized_ = replicated ? pieces_in(0, padded_) : owned_;
  state_first_ = replicated ? 0 : shard_first();
  if (use_ == GroupUse::trained) allocate_state(replicated ? padded_ : shard_elements());
  if (rank.config.numerics.reduction == ReductionMode::fast) return;
  for (int64_t replica = 0; replica < shards_; ++replica) {
    GradForest forest(forest_.total_blocks());
    for (const auto& micro_batch : ranges_[replica]) forest.add(micro_batch);
    std::vector<BlockRange>& nodes = replica_nodes_.emplace_back();
    for (const ForestNode& node : forest.nodes()) nodes.push_back(node.range);
    if (replica == replicas_.rank()) slot_count_ = forest.slots();
  }
}

void ParamGroup::allocate_state(int64_t state_elements) {
  Arena& arena = rank_.arena;
  weights_ = arena.allocate(4 * padded_, MemoryClass::weights, "fp32 weights");
  moment1_ = arena.allocate(4 * state_elements, MemoryClass::optimizer, "AdamW m");
  moment2_ = arena.allocate(4 * state_elements, MemoryClass::optimizer, "AdamW v");
  for (const Buffer* buffer : {&weights_, &moment1_, &moment2_}) rank_.zero(*buffer);
  if (rank_.config.numerics.compute == ComputeType::bf16) {
    compute_ = arena.allocate(2 * padded_, MemoryClass::weights, "bf16 weights");
  }
}

void ParamGroup::tie_head(const CanonicalTensor& head) {
  CHECK(!has(TensorRole::lm_head));
  if (rank_.config.numerics.reduction == ReductionMode::fast) return;
  ParamTensor tensor;
  tensor.canonical = head;
  tied_head_ = std::make_unique<ParamGroup>(rank_, name_ + " tied head", std::vector{tensor},
                                            replicas_, ranges_, GroupUse::gradients_only);
}

bool ParamGroup::has(TensorRole role) const {
  return std::any_of(tensors_.begin(), tensors_.end(),
                     [&](const ParamTensor& tensor) { return tensor.canonical.role == role; });
}

const ParamTensor& ParamGroup::head_weights() const {
  return tensor(has(TensorRole::lm_head) ? TensorRole::lm_head : TensorRole::embed);
}

ParamGroup::HeadGradient ParamGroup::head_gradient() {
  if (tied_head_ == nullptr) return {*this, head_weights()};
  return {*tied_head_, tied_head_->tensor(TensorRole::lm_head)};
}

const ParamTensor& ParamGroup::tensor(TensorRole role, int64_t layer) const {
  for (const ParamTensor& tensor : tensors_) {
    if (tensor.canonical.role == role && tensor.canonical.layer == layer) return tensor;
  }
  fail(ExitCode::internal, "group '{}' has no tensor of role {} in layer {}", name_,
       static_cast<int>(role), layer);
}

In<Real> ParamGroup::weight(const ParamTensor& tensor, Shape shape, int64_t stride) const {
  if (compute_.empty()) return {weights_.f32() + tensor.offset, DType::f32, shape, stride};
  return {compute_.as<uint16_t>() + tensor.offset, DType::bf16, shape, stride};
}

int64_t ParamGroup::expert_stride(const ParamTensor& tensor) {
  return round_up(tensor.elements, kBlock);
}

uint16_t* ParamGroup::compute_copy(int64_t flat_offset) const {
  return compute_.empty() ? nullptr : compute_.as<uint16_t>() + flat_offset;
}

InOut<float> ParamGroup::grad_slots(const ParamTensor& tensor, Shape per_slot) const {
  Shape shape = per_slot;
  shape.rank = per_slot.rank + 1;
  CHECK_LE(shape.rank, 4);
  for (int i = shape.rank - 1; i > 0; --i) shape.extent[i] = per_slot.extent[i - 1];
  shape.extent[0] = slot_count_;
  return {slots_.f32() + tensor.offset, shape, padded_};
}

InOut<uint8_t> ParamGroup::grad_present(const ParamTensor& tensor, int64_t flags) const {
  if (present_.empty()) return {};
  const Shape shape = flags == 0 ? Shape(slot_count_) : Shape(slot_count_, flags);
  return {present_.as<uint8_t>() + tensor.first_flag, shape, flags_};
}

std::vector<ParamPiece> ParamGroup::pieces_in(int64_t first, int64_t end) const {
  std::vector<ParamPiece> pieces;
  for (const ParamTensor& tensor : tensors_) {
    const int64_t from = std::max(first, tensor.offset);
    const int64_t to = std::min(end, tensor.offset + tensor.elements);
    if (from < to) pieces.push_back({&tensor, from - tensor.offset, to - from});
  }
  return pieces;
}

void ParamGroup::begin_step() {
  if (tied_head_ != nullptr) tied_head_->begin_step();
  reduced_.reset();
  full_gradient_.reset();
  forest_.clear();
  gradient_data_ = nullptr;
  const bool exact = rank_.config.numerics.reduction == ReductionMode::exact;
  if (slots_.empty()) {
    slots_ =
        rank_.arena.allocate(4 * padded_ * slot_count_, MemoryClass::gradients, "gradient slots");
    if (exact) {
      present_ =
          rank_.arena.allocate(flags_ * slot_count_, MemoryClass::gradients, "gradient presence");
    }
  }
  if (!exact) rank_.zero(slots_);
  target_ = GradTarget{};
}

void ParamGroup::begin_micro_batch(int64_t micro_batch) {
  if (tied_head_ != nullptr) tied_head_->begin_micro_batch(micro_batch);
  if (rank_.config.numerics.reduction == ReductionMode::fast) return;
  const std::vector<NodePlan> plans = forest_.add(ranges_[replicas_.rank()][micro_batch]);
  CHECK_LE(forest_.slots(), slot_count_);
  std::vector<int32_t> table(plans.size() * kNodeColumns, -1);
  for (size_t row = 0; row < plans.size(); ++row) {
    int32_t* columns = table.data() + row * kNodeColumns;
    CHECK_LE(std::ssize(plans[row].folds), kMaxFold);
    columns[kNodeFirstBlock] = static_cast<int32_t>(plans[row].range.first);
    columns[kNodeEndBlock] = static_cast<int32_t>(plans[row].range.end);
    columns[kNodeDestination] = plans[row].destination;
    columns[kNodeFoldCount] = static_cast<int32_t>(plans[row].folds.size());
    std::copy(plans[row].folds.begin(), plans[row].folds.end(), columns + kNodeFirstFold);
  }
  node_table_ = rank_.upload(table, "node table");
  target_.mode = GradMode::nodes;
  target_.total_blocks = forest_.total_blocks();
  target_.node_table_NC = {node_table_.as<int32_t>(),
                           Shape(static_cast<int64_t>(plans.size()), kNodeColumns)};
}

float* ParamGroup::gradient(int64_t flat_offset) const {
  CHECK(gradient_data_ != nullptr);
  return const_cast<float*>(gradient_data_) + flat_offset - gradient_first_;
}

void ParamGroup::reduce_gradients() {
  if (rank_.config.numerics.reduction == ReductionMode::exact) {
    reduce_exact();
  } else {
    reduce_fast();
  }
  if (tied_head_ != nullptr) add_tied_gradient();
  // A tied head's shards are not cut where the embedding's are: every rank gets the whole.
  const bool whole =
      use_ == GroupUse::gradients_only || rank_.config.parallel.sharding == Sharding::none;
  if (!whole || shards_ == 1) return;
  if (rank_.config.numerics.reduction == ReductionMode::fast) return;  // all-reduced already
  full_gradient_ = rank_.arena.allocate(4 * padded_, MemoryClass::gradients, "whole gradient");
  rank_.comm_waits_for_compute();
  rank_.compute_waits(all_gather({.communicator = replicas_,
                                  .stream = rank_.comm,
                                  .send = gradient_data_,
                                  .recv = full_gradient_.data(),
                                  .count = shard_elements()}));
  gradient_data_ = full_gradient_.f32();
  gradient_first_ = 0;
}

// The owned pieces of the embedding: its own sum, then the head's.
void ParamGroup::add_tied_gradient() {
  tied_head_->reduce_gradients();
  for (const ParamPiece& piece : owned_) {
    if (piece.tensor->canonical.role != TensorRole::embed) continue;
    add_values({.sum_N = {gradient(piece.flat_offset()), Shape(piece.elements)},
                .addend_N = {tied_head_->gradient(piece.first_element), Shape(piece.elements)}},
               rank_.ops);
  }
}

void ParamGroup::reduce_fast() {
  gradient_data_ = slots_.f32();
  gradient_first_ = 0;
  if (shards_ == 1) return;
  rank_.comm_waits_for_compute();
  if (rank_.config.parallel.sharding == Sharding::none) {
    rank_.compute_waits(all_reduce({.communicator = replicas_,
                                    .stream = rank_.comm,
                                    .send = slots_.data(),
                                    .recv = slots_.data(),
                                    .count = padded_}));
    return;
  }
  reduced_ = rank_.arena.allocate(4 * shard_elements(), MemoryClass::communication,
                                  "reduced gradient shard");
  rank_.compute_waits(reduce_scatter({.communicator = replicas_,
                                      .stream = rank_.comm,
                                      .send = slots_.data(),
                                      .recv = reduced_.data(),
                                      .count = shard_elements()}));
  gradient_data_ = reduced_.f32();
  gradient_first_ = shard_first();
}

// Nodes, not sums, travel: the owner of a shard receives every replica's nodes of it and finishes
// the canonical tree.
void ParamGroup::reduce_exact() {
  const int64_t shard = shard_elements(), mine = std::ssize(forest_.nodes());
  CHECK_EQ(std::ssize(replica_nodes_[replicas_.rank()]), mine);
  if (shards_ == 1) {
    std::vector<BlockRange> rows(slot_count_);
    for (const ForestNode& node : forest_.nodes()) rows[node.slot] = node.range;
    merge_nodes(rows, slots_.f32(), present_.as<uint8_t>(), padded_);
    return;
  }
  std::vector<BlockRange> rows;
  size_t most = 0;
  for (const auto& nodes : replica_nodes_) most = std::max(most, nodes.size());
  int64_t total = 0;
  for (const auto& nodes : replica_nodes_) total += std::ssize(nodes);
  reduced_ = rank_.arena.allocate(4 * shard * total, MemoryClass::communication,
                                  "received gradient nodes");
  const Buffer gathered = rank_.arena.allocate(flags_ * shards_ * static_cast<int64_t>(most),
                                               MemoryClass::communication, "gathered presence");
  Buffer flags = rank_.arena.allocate(flags_ * total, MemoryClass::communication, "presence");
  rank_.comm_waits_for_compute();
  std::vector<int64_t> flag_sources;
  for (size_t j = 0; j < most; ++j) {
    std::vector<int64_t> send_counts(shards_, 0), recv_counts(shards_, 0);
    const bool have = static_cast<int64_t>(j) < mine;
    const int64_t slot = have ? forest_.nodes()[j].slot : 0;
    if (have) std::fill(send_counts.begin(), send_counts.end(), shard);
    float* recv = reduced_.f32() + std::ssize(rows) * shard;
    for (int64_t r = 0; r < shards_; ++r) {
      if (j >= replica_nodes_[r].size()) continue;
      recv_counts[r] = shard;
      rows.push_back(replica_nodes_[r][j]);
      flag_sources.push_back((static_cast<int64_t>(j) * shards_ + r) * flags_);
    }
    all_to_all_v({.communicator = replicas_,
                  .stream = rank_.comm,
                  .send = slots_.f32() + slot * padded_,
                  .recv = recv,
                  .send_counts = send_counts,
                  .recv_counts = recv_counts});
    rank_.compute_waits(
        all_gather({.communicator = replicas_,
                    .stream = rank_.comm,
                    .send = present_.as<uint8_t>() + slot * flags_,
                    .recv = gathered.as<uint8_t>() + static_cast<int64_t>(j) * shards_ * flags_,
                    .count = flags_,
                    .dtype = DType::u8}));
  }
  for (size_t row = 0; row < rows.size(); ++row) {
    copy_bytes({.from_N = {gathered.as<uint8_t>() + flag_sources[row], Shape(flags_)},
                .to_N = {flags.as<uint8_t>() + static_cast<int64_t>(row) * flags_, Shape(flags_)}},
               rank_.ops);
  }
  merge_nodes(rows, reduced_.f32() - shard_first(), flags.as<uint8_t>(), shard);
}

// `data` is the address of flat offset 0 in row 0; rows are `stride` apart. Empty ranges are unused
// rows. Leaves the total in `gradient_data_`, absent groups zero.
void ParamGroup::merge_nodes(const std::vector<BlockRange>& nodes, float* data, uint8_t* flags,
                             int64_t stride) {
  const MergePlan plan = plan_merges(forest_.total_blocks(), nodes);
  const int64_t row_count = std::ssize(nodes);
  for (const ParamPiece& piece : owned_) {
    for (const FlagRun& run : flag_runs(piece)) {
      const InOut<float> slots(data + piece.tensor->offset + run.first_element,
                               Shape(row_count, run.groups, run.group_elements), stride);
      const InOut<uint8_t> present(flags + piece.tensor->first_flag + run.first_flag,
                                   Shape(row_count, run.groups), flags_);
      for (const MergeStep& step : plan.steps) {
        grad_merge({.slots_SGN = slots,
                    .present_SG = present,
                    .group_stride = run.group_elements,
                    .left_slot = step.left,
                    .right_slot = step.right,
                    .destination_slot = step.left},
                   rank_.ops);
      }
      float* root = slots.pointer() + plan.root * stride;
      grad_finish({.slots_SGN = slots,
                   .present_SG = present,
                   .gradient_GN = {root, Shape(run.groups, run.group_elements)},
                   .group_stride = run.group_elements,
                   .slot = plan.root},
                  rank_.ops);
    }
  }
  gradient_data_ = data + plan.root * stride;
  gradient_first_ = 0;
  if (shards_ > 1) {
    gradient_data_ += shard_first();
    gradient_first_ = shard_first();
  }
}

void ParamGroup::scale_gradient(float factor) {
  for (const ParamPiece& piece : optimized_) {
    scale_values(
        {.value_N = {gradient(piece.flat_offset()), Shape(piece.elements)}, .factor = factor},
        rank_.ops);
  }
}

void ParamGroup::gather_weights() {
  if (shards_ > 1 && rank_.config.parallel.sharding != Sharding::none) {
    rank_.comm_waits_for_compute();
    rank_.compute_waits(all_gather({.communicator = replicas_,
                                    .stream = rank_.comm,
                                    .send = weights_.f32() + shard_first(),
                                    .recv = weights_.data(),
                                    .count = shard_elements()}));
    refresh_compute_copy();
  }
}

void ParamGroup::set_weights(const ParamTensor& tensor, int64_t first_element,
                             const std::vector<float>& values) {
  const int64_t bytes = 4 * std::ssize(values);
  CHECK_LE(first_element + std::ssize(values), tensor.elements);
  const Buffer staged = rank_.upload(values, "weights to set");
  copy_bytes({.from_N = {staged.as<uint8_t>(), Shape(bytes)},
              .to_N = {reinterpret_cast<uint8_t*>(weights_.f32() + tensor.offset + first_element),
                       Shape(bytes)}},
             rank_.ops);
}

void ParamGroup::refresh_compute_copy() {
  if (compute_.empty()) return;
  cast_real({.from_N = {weights_.f32(), DType::f32, Shape(padded_)},
             .to_N = {compute_.data(), DType::bf16, Shape(padded_)}},
            rank_.ops);
}

}  // namespace cambium
