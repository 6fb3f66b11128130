// Data movement of the simulated communicator: what a Transfer does at its stream's head.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "kernels/cuda_stream.h"
#include "sim/race_detector.h"
#include "sim/reduce.h"
#include "sim/scheduler.h"
#include "sim/sim_communicator.h"
#include "sim/virtual_time.h"

namespace cambium::sim {

namespace {

constexpr int64_t kCopyChunkBytes = 256 << 10;  // a few tens of microseconds of memory bandwidth

const std::byte* at(const void* data, int64_t offset) {
  return static_cast<const std::byte*>(data) + offset;
}
std::byte* at(void* data, int64_t offset) { return static_cast<std::byte*>(data) + offset; }

// What moves a transfer's data: worker threads, or its stream's GPU, in stream order there.
struct Mover {
  Stream& stream;
  Workers& workers;
  bool on_device() const { return kHasCuda && stream.device() != nullptr; }
};

void copy_bytes(void* to, const void* from, int64_t bytes, const Mover& mover) {
  if (bytes == 0 || to == from) return;
  if constexpr (kHasCuda) {
    if (mover.on_device()) {
      return cuda::copy_async({.from = from, .to = to, .bytes = bytes}, mover.stream);
    }
  }
  const int64_t chunks = (bytes + kCopyChunkBytes - 1) / kCopyChunkBytes;
  if (chunks == 1) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
    return;
  }
  mover.workers.parallel_for(chunks, [&](int64_t chunk, Scratch&) {
    const int64_t begin = chunk * kCopyChunkBytes;
    std::memcpy(at(to, begin), at(from, begin),
                static_cast<size_t>(std::min(kCopyChunkBytes, bytes - begin)));
  });
}

void reduce(const ReduceSegment& segment, const Mover& mover) {
  if constexpr (kHasCuda) {
    if (mover.on_device()) {
      return cuda::reduce_ranks(
          {.dtype = segment.dtype,
           .combine =
               segment.reduce == ReduceOp::sum ? cuda::RankCombine::sum : cuda::RankCombine::max,
           .rounding = segment.order == ReductionOrder::ring ? cuda::RankRounding::every_rank
                                                             : cuda::RankRounding::once,
           .start = segment.start,
           .sources = segment.sources,
           .first = segment.first,
           .count = segment.count,
           .out = segment.out},
          mover.stream);
    }
  }
  reduce_segment(segment, mover.workers);
}

void fill_bytes(void* data, int64_t bytes, const Mover& mover) {
  if constexpr (kHasCuda) {
    if (mover.on_device()) return cuda::fill_async(data, 0xff, bytes, mover.stream);
  }
  std::memset(data, 0xff, static_cast<size_t>(bytes));
}

// On a GPU: later launches of `stream` follow what the peer's stream has launched up to its
// arrival.
void order_after(Stream& stream, const Stream& peer) {
  if (stream.device() != nullptr && peer.device() != nullptr) {
    stream.device()->wait_for(*peer.device());
  }
}

// The part of an all_reduce that `member` reduces: chunk `member` of `ranks` even ones.
struct Segment {
  int64_t first = 0;
  int64_t count = 0;
};
Segment segment_of(int64_t count, int member, int ranks) {
  const int64_t per_member = (count + ranks - 1) / ranks;
  const int64_t first = std::min(count, member * per_member);
  return {first, std::min(per_member, count - first)};
}

// What `member` reduces, in the group's order; chunk c of a ring starts at rank c + 1.
void reduce_own(const Transfer& transfer, int64_t first, int64_t count, void* out,
                const Mover& mover) {
  const Group& group = *transfer.group;
  std::vector<Transfer*> members = transfer.meeting->transfers;
  if (group.order() == ReductionOrder::arrival) {
    std::ranges::sort(members, {}, &Transfer::arrival_number);
  }
  std::vector<const void*> sources;
  for (const Transfer* peer : members) sources.push_back(peer->call.send);
  ReduceSegment segment;
  segment.dtype = transfer.call.dtype;
  segment.reduce = transfer.call.reduce;
  segment.order = group.order();
  segment.start = group.order() == ReductionOrder::ring ? (transfer.member + 1) % group.ranks() : 0;
  segment.sources = sources;
  segment.first = first;
  segment.count = count;
  segment.out = out;
  reduce(segment, mover);
}

void gather(const Transfer& transfer, const Mover& mover) {
  const int64_t bytes = transfer.call.count * dtype_bytes(transfer.call.dtype);
  for (const Transfer* peer : transfer.meeting->transfers) {
    copy_bytes(at(transfer.call.recv, peer->member * bytes), peer->call.send, bytes, mover);
  }
}

void gather_reduced(const Transfer& transfer, const Mover& mover) {
  const CollectiveCall& call = transfer.call;
  const int64_t element = dtype_bytes(call.dtype);
  for (const Transfer* peer : transfer.meeting->transfers) {
    if (peer == &transfer) continue;
    const Segment part = segment_of(call.count, peer->member, transfer.group->ranks());
    const int64_t offset = part.first * element;
    copy_bytes(at(call.recv, offset), at(peer->call.recv, offset), part.count * element, mover);
  }
}

void collect_from_all(const Transfer& transfer, const Mover& mover) {
  const int64_t element = dtype_bytes(transfer.call.dtype);
  int64_t to = 0;
  for (const Transfer* peer : transfer.meeting->transfers) {
    int64_t from = 0;
    for (int i = 0; i < transfer.member; ++i) from += peer->call.send_counts[i];
    const int64_t count = transfer.call.recv_counts[static_cast<size_t>(peer->member)];
    copy_bytes(at(transfer.call.recv, to * element), at(peer->call.send, from * element),
               count * element, mover);
    to += count;
  }
}

}  // namespace

int stages_of(CollectiveKind kind) {
  if (kind == CollectiveKind::all_reduce) return 3;
  return kind == CollectiveKind::barrier ? 1 : 2;
}

void Transfer::run_stage(int stage, Workers& workers) {
  const Mover mover{*call.stream, workers};
  for (const Transfer* peer : meeting->transfers) order_after(*call.stream, *peer->call.stream);
  const int64_t element = dtype_bytes(call.dtype);
  switch (call.kind) {
    case CollectiveKind::all_gather:
      if (stage == 0) gather(*this, mover);
      return;
    case CollectiveKind::reduce_scatter:
      if (stage == 0) reduce_own(*this, member * call.count, call.count, call.recv, mover);
      return;
    case CollectiveKind::all_reduce: {
      const Segment own = segment_of(call.count, member, group->ranks());
      if (stage == 0) {
        reduce_own(*this, own.first, own.count, at(call.recv, own.first * element), mover);
      }
      if (stage == 1) gather_reduced(*this, mover);
      return;
    }
    case CollectiveKind::all_to_all_v:
      if (stage == 0) collect_from_all(*this, mover);
      return;
    case CollectiveKind::broadcast:
      if (stage == 0 && member != call.root) {
        const Transfer& root = *meeting->transfers[static_cast<size_t>(call.root)];
        copy_bytes(call.recv, root.call.send, call.count * element, mover);
      }
      return;
    case CollectiveKind::barrier:
    case CollectiveKind::exchange:
      return;
  }
}

// NaN in fp32 and bf16 and an absurd value in integers, over all that the transfer will write and
// no peer still has to read.
void Transfer::poison_receive_side(Workers& workers) {
  const Mover mover{*call.stream, workers};
  const int64_t element = dtype_bytes(call.dtype);
  const auto fill = [&](int64_t first, int64_t count, void* data) {
    if (count > 0) fill_bytes(at(data, first * element), count * element, mover);
  };
  const bool in_place = call.recv == call.send;
  const int64_t ranks = group->ranks();
  switch (call.kind) {
    case CollectiveKind::all_gather:
      if (call.send != at(call.recv, member * call.count * element)) {
        fill(0, ranks * call.count, call.recv);
      } else {
        fill(0, member * call.count, call.recv);
        fill((member + 1) * call.count, (ranks - member - 1) * call.count, call.recv);
      }
      return;
    case CollectiveKind::reduce_scatter:
      if (call.recv != at(call.send, member * call.count * element)) fill(0, call.count, call.recv);
      return;
    case CollectiveKind::all_reduce:
      if (!in_place) fill(0, call.count, call.recv);
      return;
    case CollectiveKind::all_to_all_v:
      fill(0, std::reduce(call.recv_counts.begin(), call.recv_counts.end()), call.recv);
      return;
    case CollectiveKind::broadcast:
      if (member != call.root) fill(0, call.count, call.recv);
      return;
    case CollectiveKind::exchange:
      for (const Message& message : call.recvs) fill(0, message.count, message.data);
      return;
    case CollectiveKind::barrier:
      return;
  }
}

bool Transfer::advance(Workers& workers) {
  if (group == nullptr) return false;  // reserved by an injected fault and not bound yet
  if (group->time() != nullptr) return group->time()->advance_transfer(*this);
  if (delay.ns > 0 && is_delayed()) return false;
  if (!started && !take_slot()) return false;
  if (!started && group->races() != nullptr) {
    group->races()->starts(*call.stream);
    arrival_clock = group->races()->arrival(*call.stream);
  }
  if (!started && group->poison() == Poison::on) poison_receive_side(workers);
  return call.kind == CollectiveKind::exchange ? advance_exchange(workers)
                                               : advance_collective(workers);
}

// A peer's arrival may wake the stream before its time.
bool Transfer::is_delayed() {
  Scheduler& scheduler = *delay.scheduler;
  if (delayed_until_ns_ == 0) {
    const int rank = group->members()[static_cast<size_t>(member)];
    delayed_until_ns_ = scheduler.delay(*call.stream, rank, delay.ns, delay.why);
  }
  return scheduler.now_ns() < delayed_until_ns_;
}

bool Transfer::take_slot() {
  DeviceSlots* slots = group->ranks() == 1 ? nullptr : group->slots(member);
  if (slots == nullptr) return true;
  if (slots->free == 0) {
    slots->waiting.push_back(call.stream);
    return false;
  }
  --slots->free;
  return holds_slot_ = true;
}

// Gives its slot back. Its peers' arrivals came before.
void Transfer::note_completed() {
  if (holds_slot_) {
    DeviceSlots& slots = *group->slots(member);
    ++slots.free;
    for (Stream* stream : std::exchange(slots.waiting, {})) stream->wake();
  }
  if (group->races() == nullptr) return;
  const auto learn = [this](const Transfer* peer) {
    if (peer != this) group->races()->learn(*call.stream, peer->arrival_clock);
  };
  if (meeting != nullptr) std::ranges::for_each(meeting->transfers, learn);
  for (const Mail* mail : sends) learn(mail->recv);
  for (const Mail* mail : recvs) learn(mail->send);
}

bool Transfer::advance_collective(Workers& workers) {
  if (!started) arrival_number = meeting->arrivals.fetch_add(1);
  started = true;
  const int stages = stages_of(call.kind);
  while (stage_ < stages) {
    std::atomic<int>& missing = meeting->missing[static_cast<size_t>(stage_)];
    if (!arrived_) {
      arrived_ = true;
      if (missing.fetch_sub(1) == 1) {
        for (Transfer* peer : meeting->transfers) {
          if (peer != this) peer->call.stream->wake();
        }
      }
    }
    if (missing.load() > 0) return false;
    if (group->moves_data()) run_stage(stage_, workers);
    ++stage_;
    arrived_ = false;
  }
  done = true;
  note_completed();
  meeting->left.fetch_add(1, std::memory_order_acq_rel);
  return true;
}

bool Transfer::advance_exchange(Workers& workers) {
  if (!started) {
    started = true;
    for (Mail* mail : sends) {
      if (mail->missing.fetch_sub(1) == 1) mail->recv->call.stream->wake();
    }
    for (Mail* mail : recvs) mail->missing.fetch_sub(1);
  }
  bool complete = true;
  for (Mail* mail : recvs) {
    if (mail->copied.load(std::memory_order_relaxed)) continue;
    if (mail->missing.load() > 0) {
      complete = false;
      continue;
    }
    order_after(*call.stream, *mail->send->call.stream);
    if (group->moves_data()) {
      copy_bytes(mail->received.data, mail->sent.data,
                 mail->received.count * dtype_bytes(call.dtype), {*call.stream, workers});
    }
    mail->copied.store(true);
    if (mail->send != this) mail->send->call.stream->wake();
  }
  for (const Mail* mail : sends) {
    if (!mail->copied.load()) complete = false;
  }
  done = complete;
  if (!complete) return false;
  note_completed();
  for (const Mail* mail : sends) order_after(*call.stream, *mail->recv->call.stream);
  return true;
}

}  // namespace cambium::sim
