#include "src/parallel/param_group.h"

#include <algorithm>
#include <array>

#include "kernels/copy.h"
#include "src/parallel/batch_layout.h"

namespace cambium {

namespace {

constexpr int64_t kBlock = kTableBlockElements;

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

DType moment_dtype(const Config& config) {
  return config.optimizer.state_dtype == ComputeType::bf16 ? DType::bf16 : DType::f32;
}

}  // namespace

bool reduces_each_micro_batch(const Config& config) {
  const Sharding sharding = config.parallel.sharding;
  const bool exact = config.numerics.reduction == ReductionMode::exact;
  return sharding == Sharding::zero2 || sharding == Sharding::full ||
         (exact && config.parallel.cp > 1);
}

ParamGroup::ParamGroup(Rank& rank, GroupKind kind, std::vector<ParamTensor> tensors,
                       ParamReplicas replicas, const ReplicaRanges& ranges, GroupUse use)
    : rank_(rank), kind_(kind), tensors_(std::move(tensors)), replicas_(replicas), use_(use) {
  shards_ = replicas_.shard.ranks();
  if (replicas_.copies != nullptr) {
    copies_ = replicas_.copies->ranks();
    copy_ = replicas_.copies->rank();
  }
  CHECK_EQ(std::ssize(ranges), shards_ * copies_);
  flushes_each_ = reduces_each_micro_batch(rank.config) && shards_ > 1;
  total_blocks_ = BatchLayout(rank.config).total_blocks;
  for (ParamTensor& tensor : tensors_) {
    tensor.elements = tensor.canonical.elements();
    tensor.flags = tensor.canonical.role == TensorRole::embed ? tensor.canonical.shape[0] : 1;
    tensor.offset = padded_;
    tensor.first_flag = flags_;
    padded_ += round_up(tensor.elements, kBlock);
    flags_ += tensor.flags;
  }
  padded_ = round_up(std::max<int64_t>(padded_, 1), kBlock * shards_ * copies_);
  const bool replicated = rank.config.parallel.sharding == Sharding::none;
  owned_ = pieces_in(owned_first(), owned_first() + owned_elements());
  shard_ = pieces_in(shard_first(), shard_first() + shard_elements());
  optimized_ = replicated ? pieces_in(0, padded_) : shard_;
  stored_ = is_full() ? shard_ : pieces_in(0, padded_);
  state_first_ = replicated ? 0 : shard_first();
  stored_first_ = is_full() ? shard_first() : 0;
  if (use_ != GroupUse::gradients_only) allocate_weights();
  if (use_ == GroupUse::trained) {
    allocate_moments();
    upload_block_table();
  }
  if (is_exact()) plan_forests(ranges);
}

void ParamGroup::allocate_weights() {
  const int64_t stored_elements = is_full() ? shard_elements() : padded_;
  Arena& arena = rank_.arena;
  weights_ = arena.allocate(4 * stored_elements, MemoryClass::weights, "fp32 weights");
  rank_.zero(weights_);
  if (rank_.config.numerics.compute == ComputeType::bf16) {
    compute_ = arena.allocate(2 * stored_elements, MemoryClass::weights, "bf16 weights");
  }
}

void ParamGroup::allocate_moments() {
  const int64_t moment_bytes = state_elements() * dtype_bytes(moment_dtype(rank_.config));
  for (Buffer& moment : moments_) {
    moment = rank_.arena.allocate(moment_bytes, MemoryClass::optimizer, "AdamW moment");
    rank_.zero(moment);
  }
}

void ParamGroup::upload_block_table() {
  std::vector<int32_t> table(static_cast<size_t>(padded_ / kBlock * kBlockColumns), 0);
  for (const ParamTensor& tensor : tensors_) {
    const bool decays = rank_.config.optimizer.decay == DecayRule::all ||
                        tensor.canonical.decay_kind() == DecayKind::matrix;
    for (int64_t at = 0; at < tensor.elements; at += kBlock) {
      int32_t* row = table.data() + (tensor.offset + at) / kBlock * kBlockColumns;
      row[kBlockElements] = static_cast<int32_t>(std::min(kBlock, tensor.elements - at));
      row[kBlockCanonical] = static_cast<int32_t>(tensor.first_norm_block + at / kBlock);
      row[kBlockDecays] = decays ? 1 : 0;
    }
  }
  block_table_ =
      rank_.upload(table.data(), 4 * std::ssize(table), MemoryClass::workspace, "block table");
}

BlockTable ParamGroup::block_table(int64_t flat_offset, int64_t elements) const {
  CHECK_EQ(flat_offset % kBlock, 0);
  BlockTable table{.block_BC = {block_table_.as<int32_t>() + flat_offset / kBlock * kBlockColumns,
                                Shape(elements / kBlock, int64_t{kBlockColumns})}};
  for (const ParamPiece& piece : pieces_in(flat_offset, flat_offset + elements)) {
    table.elements += piece.elements;
  }
  return table;
}

int64_t ParamGroup::state_elements() const {
  return rank_.config.parallel.sharding == Sharding::none ? padded_ : shard_elements();
}

InOut<Real> ParamGroup::moment(Moment which, int64_t flat_offset, int64_t elements) const {
  const DType dtype = moment_dtype(rank_.config);
  const int64_t first_byte = (flat_offset - state_first_) * dtype_bytes(dtype);
  return {moments_[which].as<std::byte>() + first_byte, dtype, Shape(elements)};
}

// Who holds which nodes when, for the whole of a step: the same every step.
void ParamGroup::plan_forests(const ReplicaRanges& ranges) {
  plan_node_tables(ranges[copy_ * shards_ + replicas_.shard.rank()]);
  std::vector<std::vector<ForestNode>> held_by_copy;
  for (int64_t copy = 0; copy < copies_; ++copy) {
    std::vector<Flush> flushes = plan_copy(std::span(ranges).subspan(copy * shards_, shards_));
    std::vector<ForestNode>& held = held_by_copy.emplace_back(flushes.back().merges.held);
    for (size_t i = 0; flushes_each_ && i < held.size(); ++i) {
      held[i].slot = static_cast<int32_t>(i);
    }
    if (copy == copy_) flushes_ = std::move(flushes);
  }
  for (const Flush& flush : flushes_) {
    held_rows_ = std::max<int64_t>(held_rows_, std::ssize(flush.merges.held));
  }
  if (copies_ > 1) flushes_.push_back(plan_flush(std::move(held_by_copy), nullptr));
}

// The journeys within one copy.
std::vector<ParamGroup::Flush> ParamGroup::plan_copy(
    std::span<const std::vector<std::vector<BlockRange>>> ranges) const {
  const size_t micro_batches = ranges.front().size();
  std::vector<GradForest> forests(ranges.size(), GradForest(total_blocks_));
  std::vector<Flush> flushes;
  for (size_t micro = 0; micro < micro_batches; ++micro) {
    std::vector<std::vector<ForestNode>> nodes;
    for (size_t replica = 0; replica < ranges.size(); ++replica) {
      GradForest& forest = forests[replica];
      if (flushes_each_) forest = GradForest(total_blocks_);
      forest.add(ranges[replica][micro]);
      nodes.push_back(forest.nodes());
    }
    if (!flushes_each_ && micro + 1 < micro_batches) continue;
    flushes.push_back(plan_flush(std::move(nodes), flushes.empty() ? nullptr : &flushes.back()));
  }
  return flushes;
}

ParamGroup::Flush ParamGroup::plan_flush(std::vector<std::vector<ForestNode>> nodes,
                                         const Flush* before) const {
  Flush flush;
  std::vector<ForestNode> rows;
  if (nodes.size() == 1) {
    rows = nodes[0];  // they stay in their slots
    flush.rows = slot_count_;
  } else {
    if (before != nullptr) {
      for (const ForestNode& node : before->merges.held) {
        rows.push_back({node.range, static_cast<int32_t>(rows.size())});
      }
    }
    flush.held_before = std::ssize(rows);
    size_t most = 0;
    for (const auto& sender : nodes) most = std::max(most, sender.size());
    for (size_t j = 0; j < most; ++j) {
      for (const auto& sender : nodes) {
        if (j >= sender.size()) continue;
        rows.push_back({sender[j].range, static_cast<int32_t>(rows.size())});
      }
    }
    flush.rows = std::ssize(rows);
  }
  flush.merges = plan_merges(total_blocks_, std::move(rows));
  flush.nodes = std::move(nodes);
  return flush;
}

// What weight gradients of this rank's micro-batches do with its slots.
void ParamGroup::plan_node_tables(const std::vector<std::vector<BlockRange>>& ranges) {
  std::vector<int32_t> table;
  GradForest forest(total_blocks_);
  slot_count_ = 0;
  first_node_.push_back(0);
  for (const std::vector<BlockRange>& micro_batch : ranges) {
    if (flushes_each_) forest = GradForest(total_blocks_);
    for (const NodePlan& plan : forest.add(micro_batch)) {
      CHECK_LE(std::ssize(plan.folds), kMaxFold);
      std::array<int32_t, kNodeColumns> columns;
      columns.fill(-1);
      columns[kNodeFirstBlock] = static_cast<int32_t>(plan.first_arrival);
      columns[kNodeEndBlock] = static_cast<int32_t>(plan.first_arrival + plan.range.count());
      columns[kNodeDestination] = plan.destination;
      columns[kNodeFoldCount] = static_cast<int32_t>(plan.folds.size());
      std::copy(plan.folds.begin(), plan.folds.end(), columns.begin() + kNodeFirstFold);
      table.insert(table.end(), columns.begin(), columns.end());
    }
    slot_count_ = std::max<int64_t>(slot_count_, forest.slots());
    first_node_.push_back(std::ssize(table) / kNodeColumns);
  }
  node_tables_ =
      rank_.upload(table.data(), 4 * std::ssize(table), MemoryClass::workspace, "node tables");
}

const ParamTensor* ParamGroup::find(TensorRole role, int64_t layer) const {
  for (const ParamTensor& tensor : tensors_) {
    if (tensor.canonical.role == role && tensor.canonical.layer == layer) return &tensor;
  }
  return nullptr;
}

void ParamGroup::prefetch_weights() {
  if (!is_full() || !gathered_.empty()) return;
  const bool bf16 = !compute_.empty();
  const DType dtype = bf16 ? DType::bf16 : DType::f32;
  gathered_ = rank_.arena.allocate(padded_ * dtype_bytes(dtype), MemoryClass::communication,
                                   "gathered weights");
  rank_.comm_waits_for_compute();
  gathering_ = all_gather({.communicator = replicas_.shard,
                           .stream = rank_.comm,
                           .send = bf16 ? compute_.data() : weights_.data(),
                           .recv = gathered_.data(),
                           .count = shard_elements(),
                           .dtype = dtype});
}

void ParamGroup::hold_weights() {
  if (!is_full()) return;
  prefetch_weights();
  if (holders_++ == 0) rank_.compute_waits(gathering_);
}

void ParamGroup::drop_weights() {
  if (!is_full()) return;
  CHECK_GE(holders_, 1);
  if (--holders_ == 0) gathered_.reset();
}

In<Real> ParamGroup::weight(const ParamTensor& tensor, Shape shape, int64_t stride) const {
  if (is_full()) CHECK_GE(holders_, 1);
  const Buffer& whole = is_full() ? gathered_ : compute_.empty() ? weights_ : compute_;
  if (compute_.empty()) return {whole.f32() + tensor.offset, DType::f32, shape, stride};
  return {whole.as<uint16_t>() + tensor.offset, DType::bf16, shape, stride};
}

int64_t ParamGroup::expert_stride(const ParamTensor& tensor) {
  return round_up(tensor.elements, kBlock);
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

GradTarget ParamGroup::grad_target(const ParamTensor& tensor, int64_t tensors) {
  if (is_exact()) return target_;
  const int64_t first = &tensor - tensors_.data();
  const uint8_t is_written = written_[first];
  for (int64_t i = first; i < first + tensors; ++i) {
    CHECK_EQ(written_[i], is_written);
    written_[i] = 1;
  }
  return {.mode = is_written != 0 ? GradMode::accumulate : GradMode::store};
}

void ParamGroup::zero_unwritten() {
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (written_[i] != 0) continue;
    auto* slot = slots_.as<uint8_t>() + 4 * tensors_[i].offset;
    zero_bytes({.to_N = {slot, Shape(4 * tensors_[i].elements)}}, rank_.ops);
  }
}

// In fast mode the first contributions fill the slot but for the padding between tensors, which
// collectives carry.
void ParamGroup::open_slots() {
  written_.assign(tensors_.size(), 0);
  if (slots_.empty()) {
    slots_ =
        rank_.arena.allocate(4 * padded_ * slot_count_, MemoryClass::gradients, "gradient slots");
    if (!is_exact()) return rank_.zero(slots_);
    present_ =
        rank_.arena.allocate(flags_ * slot_count_, MemoryClass::gradients, "gradient presence");
  }
}

void ParamGroup::begin_step() {
  if (tied_head_ != nullptr) tied_head_->begin_step();
  for (Buffer* buffer :
       {&reduced_, &reduced_flags_, &crossed_, &shard_gradient_, &full_gradient_}) {
    buffer->reset();
  }
  gradient_ = nullptr;
  flushed_ = 0;
  target_ = GradTarget{};
  if (!flushes_each_) return open_slots();
  if (!held_.empty()) return;
  // Fast mode: the sum so far, and where the next micro-batch's arrives; both always present.
  const int64_t rows = is_exact() ? held_rows_ : 2;
  held_ =
      rank_.arena.allocate(4 * shard_elements() * rows, MemoryClass::gradients, "gradient shard");
  held_flags_ = is_exact() ? rank_.arena.allocate(flags_ * rows, MemoryClass::gradients,
                                                  "gradient shard presence")
                           : rank_.upload(std::vector<uint8_t>(2, 1), "gradient shard presence");
}

void ParamGroup::begin_micro_batch(int64_t micro_batch) {
  land_gradients();
  if (flushes_each_) open_slots();
  if (!is_exact()) return;
  const int64_t first = first_node_[micro_batch];
  target_.mode = GradMode::nodes;
  target_.total_blocks = total_blocks_;
  target_.node_table_NC = {node_tables_.as<int32_t>() + first * kNodeColumns,
                           Shape(first_node_[micro_batch + 1] - first, kNodeColumns)};
}

void ParamGroup::end_micro_batch() {
  if (!flushes_each_) return;
  if (!is_exact()) return flush_fast();
  flush_exact(flushes_[flushed_++]);
  slots_.reset();
  present_.reset();
}

float* ParamGroup::gradient(int64_t flat_offset) const {
  CHECK(gradient_ != nullptr);
  return gradient_ + flat_offset;
}

void ParamGroup::scale_gradient(float factor) {
  for (const ParamPiece& piece : optimized_) {
    scale_values(
        {.value_N = {gradient(piece.flat_offset()), Shape(piece.elements)}, .factor = factor},
        rank_.ops);
  }
}

void ParamGroup::flip_weight() {
  const Shape one(int64_t{1});
  scale_values({.value_N = {weights(owned_.front().flat_offset()), one}, .factor = -1.0f},
               rank_.ops);
}

void ParamGroup::gather_weights() {
  const Sharding sharding = rank_.config.parallel.sharding;
  if (shards_ > 1 && (sharding == Sharding::zero1 || sharding == Sharding::zero2)) {
    rank_.comm_waits_for_compute();
    rank_.compute_waits(all_gather({.communicator = replicas_.shard,
                                    .stream = rank_.comm,
                                    .send = weights_.f32() + shard_first(),
                                    .recv = weights_.data(),
                                    .count = shard_elements()}));
    refresh_compute_copy();
  }
  pass_tied_weights();
}

void ParamGroup::set_weights(const ParamPiece& piece, const std::vector<float>& values) {
  const int64_t bytes = 4 * std::ssize(values);
  CHECK_EQ(std::ssize(values), piece.elements);
  const Buffer staged = rank_.upload(values, "weights to set");
  copy_bytes({.from_N = {staged.as<uint8_t>(), Shape(bytes)},
              .to_N = {reinterpret_cast<uint8_t*>(weights(piece.flat_offset())), Shape(bytes)}},
             rank_.ops);
}

void ParamGroup::refresh_compute_copy() {
  if (compute_.empty()) return;
  const int64_t elements = weights_.size_bytes() / 4;
  cast_real({.from_N = {weights_.f32(), DType::f32, Shape(elements)},
             .to_N = {compute_.data(), DType::bf16, Shape(elements)}},
            rank_.ops);
}

}  // namespace cambium
