// How a group's gradients are summed over its replicas: to the owners of their shards, and between
// the copies of the state (src/parallel/param_group.h).
#include <algorithm>

#include "kernels/copy.h"
#include "kernels/grad_merge.h"
#include "src/parallel/param_group.h"

namespace cambium {

namespace {

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

void ParamGroup::reduce_gradients() {
  sum_over_replicas();
  if (tied_head_ != nullptr || tied_peer_ >= 0) add_tied_gradient();
  if (copies_ > 1 && is_exact()) {
    shard_gradient_ = gather_gradient(*replicas_.copies, owned_first(), owned_elements());
    gradient_ = shard_gradient_.f32() - shard_first();
  }
  // A tied head's shards are not cut where the embedding's are: every rank gets the whole.
  const bool whole = use_ != GroupUse::trained || rank_.config.parallel.sharding == Sharding::none;
  const bool is_whole = shards_ == 1 || (!is_exact() && !flushes_each_ &&
                                         rank_.config.parallel.sharding == Sharding::none);
  if (whole && !is_whole) {
    full_gradient_ = gather_gradient(replicas_.shard, shard_first(), shard_elements());
    gradient_ = full_gradient_.f32();
  }
}

// Exact: of what this rank owns. Fast: of its shard, or everything with sharding none.
void ParamGroup::sum_over_replicas() {
  land_gradients();
  if (flushes_each_) {
    gradient_ = held_.f32() - shard_first();
  } else if (!is_exact()) {
    reduce_fast_at_end();
  } else if (shards_ > 1) {
    flush_exact(flushes_.front());
  } else if (copies_ == 1) {
    merge(flushes_.front(), {slots_.f32(), present_.as<uint8_t>(), padded_}, owned_);
  }
  if (copies_ > 1) cross_copies();
}

// The embedding's own sum, then the head's, which may come from another rank.
void ParamGroup::add_tied_gradient() {
  if (tied_head_ != nullptr) tied_head_->reduce_gradients();
  rank_.compute_waits(rank_.comm.record());
  if (tied_head_ != nullptr && tied_peer_ >= 0) return send_tied_gradient();
  Buffer arrived;
  if (tied_peer_ >= 0) arrived = receive_tied_gradient();
  const float* head = tied_head_ != nullptr ? tied_head_->gradient(0) : arrived.f32();
  for (const ParamPiece& piece : is_exact() ? owned_ : optimized_) {
    if (piece.tensor->canonical.role != TensorRole::embed) continue;
    add_values({.sum_N = {gradient(piece.flat_offset()), Shape(piece.elements)},
                .addend_N = {head + piece.first_element, Shape(piece.elements)}},
               rank_.ops);
  }
}

// NOTE: the step's pass_tied_weights waits for it, as the weights come later in the same stream.
void ParamGroup::send_tied_gradient() {
  const Message message{tied_peer_, tied_head_->gradient(0), tied_head_->tensors()[0].elements};
  rank_.pipe.wait(rank_.compute.record());
  exchange({.communicator = *rank_.pipeline, .stream = rank_.pipe, .sends = {&message, 1}});
}

Buffer ParamGroup::receive_tied_gradient() {
  const int64_t elements = find(TensorRole::embed, -1)->elements;
  Buffer arrived = rank_.arena.allocate(4 * elements, MemoryClass::gradients, "head's gradient");
  const Message message{tied_peer_, arrived.data(), elements};
  rank_.pipe.wait(rank_.compute.record());
  rank_.compute_waits(
      exchange({.communicator = *rank_.pipeline, .stream = rank_.pipe, .recvs = {&message, 1}}));
  return arrived;
}

// Both sides store the same part: all of it, or with `full` a shard of a group of its own.
void ParamGroup::pass_tied_weights() {
  if (tied_peer_ < 0) return;
  const bool receives = tied_head_ != nullptr;
  const ParamGroup& holder = receives ? *tied_head_ : *this;
  const ParamTensor& tensor = receives ? holder.tensors_[0] : *find(TensorRole::embed, -1);
  const Message message{tied_peer_,
                        holder.weights(is_full() ? holder.shard_first() : tensor.offset),
                        is_full() ? holder.shard_elements() : tensor.elements};
  const std::span<const Message> none, one(&message, 1);
  rank_.pipe.wait(rank_.compute.record());
  rank_.compute_waits(exchange({.communicator = *rank_.pipeline,
                                .stream = rank_.pipe,
                                .sends = receives ? none : one,
                                .recvs = receives ? one : none}));
  if (receives) tied_head_->refresh_compute_copy();
}

// The parts of `holders`, of which this rank's begins at flat offset `first`.
Buffer ParamGroup::gather_gradient(Communicator& holders, int64_t first, int64_t elements) {
  Buffer gathered = rank_.arena.allocate(4 * elements * holders.ranks(), MemoryClass::gradients,
                                         "gathered gradient");
  rank_.comm_waits_for_compute();
  all_gather({.communicator = holders,
              .stream = rank_.comm,
              .send = gradient(first),
              .recv = gathered.data(),
              .count = elements});
  return gathered;
}

// What this copy's ranks summed, over all copies: one sum, or nodes to their owners.
void ParamGroup::cross_copies() {
  if (!is_exact()) {
    rank_.comm_waits_for_compute();
    all_reduce({.communicator = *replicas_.copies,
                .stream = rank_.comm,
                .send = gradient(shard_first()),
                .recv = gradient(shard_first()),
                .count = shard_elements()});
    return;
  }
  NodeRows from{slots_.f32(), present_.as<uint8_t>(), padded_};
  if (shards_ > 1) {
    const Buffer& rows = flushes_each_ ? held_ : reduced_;
    const Buffer& flags = flushes_each_ ? held_flags_ : reduced_flags_;
    from = {rows.f32() - shard_first(), flags.as<uint8_t>(), shard_elements()};
  }
  const Flush& flush = flushes_.back();
  Arena& arena = rank_.arena;
  crossed_ = arena.allocate(4 * owned_elements() * flush.rows, MemoryClass::communication,
                            "gradient nodes of copies");
  const Buffer flags = arena.allocate(flags_ * flush.rows, MemoryClass::communication, "presence");
  const NodeRows rows{crossed_.f32() - owned_first(), flags.as<uint8_t>(), owned_elements()};
  receive_nodes(*replicas_.copies, flush, from, shard_first(), rows);
  merge(flush, rows, owned_);
}

void ParamGroup::reduce_fast_at_end() {
  zero_unwritten();
  gradient_ = slots_.f32();
  if (shards_ == 1) return;
  rank_.comm_waits_for_compute();
  if (rank_.config.parallel.sharding == Sharding::none) {
    all_reduce({.communicator = replicas_.shard,
                .stream = rank_.comm,
                .send = slots_.data(),
                .recv = slots_.data(),
                .count = padded_});
    return;
  }
  reduced_ = rank_.arena.allocate(4 * shard_elements(), MemoryClass::communication,
                                  "reduced gradient shard");
  reduce_scatter({.communicator = replicas_.shard,
                  .stream = rank_.comm,
                  .send = slots_.data(),
                  .recv = reduced_.data(),
                  .count = shard_elements()});
  gradient_ = reduced_.f32() - shard_first();
}

void ParamGroup::flush_fast() {
  const int64_t shard = shard_elements(), row = flushed_ == 0 ? 0 : 1;
  zero_unwritten();
  rank_.comm_waits_for_compute();
  leaving_ = reduce_scatter({.communicator = replicas_.shard,
                             .stream = rank_.comm,
                             .send = slots_.data(),
                             .recv = held_.f32() + row * shard,
                             .count = shard});
  is_leaving_ = true;
}

// The micro-batch's sum joins that of the earlier ones.
void ParamGroup::land_gradients() {
  if (!is_leaving_) return;
  const int64_t shard = shard_elements();
  rank_.compute_waits(leaving_);
  is_leaving_ = false;
  slots_.reset();
  if (flushed_++ == 0) return;
  grad_merge({.slots_SGN = {held_.f32(), Shape(2, 1, shard), shard},
              .present_SG = {held_flags_.as<uint8_t>(), Shape(2, 1)},
              .group_stride = shard,
              .left_slot = 0,
              .right_slot = 1,
              .destination_slot = 0},
             rank_.ops);
}

// Nodes, not sums, travel: the owner of a shard receives every rank's nodes of it, merges what it
// can and, when nothing more comes, finishes the canonical tree.
void ParamGroup::flush_exact(const Flush& flush) {
  const int64_t shard = shard_elements();
  Arena& arena = rank_.arena;
  Buffer rows =
      arena.allocate(4 * shard * flush.rows, MemoryClass::communication, "received gradient nodes");
  Buffer flags = arena.allocate(flags_ * flush.rows, MemoryClass::communication, "presence");
  const auto copy = [&](const Buffer& from, const Buffer& to, int64_t bytes, int64_t from_row,
                        int64_t to_row) {
    copy_bytes({.from_N = {from.as<uint8_t>() + from_row * bytes, Shape(bytes)},
                .to_N = {to.as<uint8_t>() + to_row * bytes, Shape(bytes)}},
               rank_.ops);
  };
  for (int64_t row = 0; row < flush.held_before; ++row) {
    copy(held_, rows, 4 * shard, row, row);
    copy(held_flags_, flags, flags_, row, row);
  }
  const NodeRows merged{rows.f32() - shard_first(), flags.as<uint8_t>(), shard};
  receive_nodes(replicas_.shard, flush, {slots_.f32(), present_.as<uint8_t>(), padded_}, 0, merged);
  merge(flush, merged, shard_);
  if (!flushes_each_) {
    reduced_ = std::move(rows);
    reduced_flags_ = std::move(flags);
    return;
  }
  for (size_t i = 0; i < flush.merges.held.size(); ++i) {
    const int64_t row = flush.merges.held[i].slot;
    copy(rows, held_, 4 * shard, row, static_cast<int64_t>(i));
    copy(flags, held_flags_, flags_, row, static_cast<int64_t>(i));
  }
}

// Every sender's nodes from flat offset `first` on, a part to each.
void ParamGroup::receive_nodes(Communicator& senders, const Flush& flush, const NodeRows& from,
                               int64_t first, const NodeRows& rows) {
  const int64_t part = rows.stride, ranks = senders.ranks();
  const std::vector<ForestNode>& mine = flush.nodes[senders.rank()];
  size_t most = 0;
  for (const auto& nodes : flush.nodes) most = std::max(most, nodes.size());
  const Buffer gathered = rank_.arena.allocate(flags_ * ranks * static_cast<int64_t>(most),
                                               MemoryClass::communication, "gathered presence");
  rank_.comm_waits_for_compute();
  int64_t row = flush.held_before;
  std::vector<int64_t> flag_sources;
  for (size_t j = 0; j < most; ++j) {
    std::vector<int64_t> send_counts(ranks, 0), recv_counts(ranks, 0);
    const int64_t slot = j < mine.size() ? mine[j].slot : 0;
    if (j < mine.size()) std::fill(send_counts.begin(), send_counts.end(), part);
    float* recv = rows.data + first + part * senders.rank() + row * part;
    for (int64_t r = 0; r < ranks; ++r) {
      if (j >= flush.nodes[r].size()) continue;
      recv_counts[r] = part;
      ++row;
      flag_sources.push_back((static_cast<int64_t>(j) * ranks + r) * flags_);
    }
    all_to_all_v({.communicator = senders,
                  .stream = rank_.comm,
                  .send = from.data + first + slot * from.stride,
                  .recv = recv,
                  .send_counts = send_counts,
                  .recv_counts = recv_counts});
    rank_.compute_waits(
        all_gather({.communicator = senders,
                    .stream = rank_.comm,
                    .send = from.flags + slot * flags_,
                    .recv = gathered.as<uint8_t>() + static_cast<int64_t>(j) * ranks * flags_,
                    .count = flags_,
                    .dtype = DType::u8}));
  }
  CHECK_EQ(row, flush.rows);
  for (size_t i = 0; i < flag_sources.size(); ++i) {
    const int64_t to = flush.held_before + static_cast<int64_t>(i);
    copy_bytes({.from_N = {gathered.as<uint8_t>() + flag_sources[i], Shape(flags_)},
                .to_N = {rows.flags + to * flags_, Shape(flags_)}},
               rank_.ops);
  }
}

// After the last flush the root's row becomes the gradient: zeros where nothing is present.
void ParamGroup::merge(const Flush& flush, const NodeRows& rows,
                       const std::vector<ParamPiece>& pieces) {
  const bool is_last = &flush == &flushes_.back();
  const int64_t root = is_last ? flush.merges.root(total_blocks_) : 0;
  for (const ParamPiece& piece : pieces) {
    for (const FlagRun& run : flag_runs(piece)) {
      const InOut<float> slots(rows.data + piece.tensor->offset + run.first_element,
                               Shape(flush.rows, run.groups, run.group_elements), rows.stride);
      const InOut<uint8_t> present(rows.flags + piece.tensor->first_flag + run.first_flag,
                                   Shape(flush.rows, run.groups), flags_);
      for (const MergeStep& step : flush.merges.steps) {
        grad_merge({.slots_SGN = slots,
                    .present_SG = present,
                    .group_stride = run.group_elements,
                    .left_slot = step.left,
                    .right_slot = step.right,
                    .destination_slot = step.left},
                   rank_.ops);
      }
      if (!is_last) continue;
      grad_finish({.slots_SGN = slots,
                   .present_SG = present,
                   .gradient_GN = {slots.pointer() + root * rows.stride,
                                   Shape(run.groups, run.group_elements)},
                   .group_stride = run.group_elements,
                   .slot = root},
                  rank_.ops);
    }
  }
  if (is_last) gradient_ = rows.data + root * rows.stride;
}

}  // namespace cambium
