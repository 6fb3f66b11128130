// Data movement of the simulated communicator: what a Transfer does at its stream's head.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "sim/reduce.h"
#include "sim/sim_communicator.h"

namespace cambium::sim {

namespace {

constexpr int64_t kCopyChunkBytes = 256 << 10;  // a few tens of microseconds of memory bandwidth

const std::byte* at(const void* data, int64_t offset) {
  return static_cast<const std::byte*>(data) + offset;
}
std::byte* at(void* data, int64_t offset) { return static_cast<std::byte*>(data) + offset; }

void copy_bytes(void* to, const void* from, int64_t bytes, Workers& workers) {
  if (bytes == 0 || to == from) return;
  const int64_t chunks = (bytes + kCopyChunkBytes - 1) / kCopyChunkBytes;
  if (chunks == 1) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
    return;
  }
  workers.parallel_for(chunks, [&](int64_t chunk, Scratch&) {
    const int64_t begin = chunk * kCopyChunkBytes;
    std::memcpy(at(to, begin), at(from, begin),
                static_cast<size_t>(std::min(kCopyChunkBytes, bytes - begin)));
  });
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
                Workers& workers) {
  const Group& group = *transfer.group;
  std::vector<const void*> sources;
  for (const Transfer* peer : transfer.meeting->transfers) sources.push_back(peer->call.send);
  ReduceSegment segment;
  segment.dtype = transfer.call.dtype;
  segment.reduce = transfer.call.reduce;
  segment.order = group.order();
  segment.start = group.order() == ReductionOrder::ring ? (transfer.member + 1) % group.ranks() : 0;
  segment.sources = sources;
  segment.first = first;
  segment.count = count;
  segment.out = out;
  reduce_segment(segment, workers);
}

void gather(const Transfer& transfer, Workers& workers) {
  const int64_t bytes = transfer.call.count * dtype_bytes(transfer.call.dtype);
  for (const Transfer* peer : transfer.meeting->transfers) {
    copy_bytes(at(transfer.call.recv, peer->member * bytes), peer->call.send, bytes, workers);
  }
}

void gather_reduced(const Transfer& transfer, Workers& workers) {
  const CollectiveCall& call = transfer.call;
  const int64_t element = dtype_bytes(call.dtype);
  for (const Transfer* peer : transfer.meeting->transfers) {
    if (peer == &transfer) continue;
    const Segment part = segment_of(call.count, peer->member, transfer.group->ranks());
    const int64_t offset = part.first * element;
    copy_bytes(at(call.recv, offset), at(peer->call.recv, offset), part.count * element, workers);
  }
}

void collect_from_all(const Transfer& transfer, Workers& workers) {
  const int64_t element = dtype_bytes(transfer.call.dtype);
  int64_t to = 0;
  for (const Transfer* peer : transfer.meeting->transfers) {
    int64_t from = 0;
    for (int i = 0; i < transfer.member; ++i) from += peer->call.send_counts[i];
    const int64_t count = transfer.call.recv_counts[static_cast<size_t>(peer->member)];
    copy_bytes(at(transfer.call.recv, to * element), at(peer->call.send, from * element),
               count * element, workers);
    to += count;
  }
}

}  // namespace

int stages_of(CollectiveKind kind) {
  if (kind == CollectiveKind::all_reduce) return 3;
  return kind == CollectiveKind::barrier ? 1 : 2;
}

void Transfer::run_stage(int stage, Workers& workers) {
  const int64_t element = dtype_bytes(call.dtype);
  switch (call.kind) {
    case CollectiveKind::all_gather:
      if (stage == 0) gather(*this, workers);
      return;
    case CollectiveKind::reduce_scatter:
      if (stage == 0) reduce_own(*this, member * call.count, call.count, call.recv, workers);
      return;
    case CollectiveKind::all_reduce: {
      const Segment own = segment_of(call.count, member, group->ranks());
      if (stage == 0) {
        reduce_own(*this, own.first, own.count, at(call.recv, own.first * element), workers);
      }
      if (stage == 1) gather_reduced(*this, workers);
      return;
    }
    case CollectiveKind::all_to_all_v:
      if (stage == 0) collect_from_all(*this, workers);
      return;
    case CollectiveKind::broadcast:
      if (stage == 0 && member != call.root) {
        const Transfer& root = *meeting->transfers[static_cast<size_t>(call.root)];
        copy_bytes(call.recv, root.call.send, call.count * element, workers);
      }
      return;
    case CollectiveKind::barrier:
    case CollectiveKind::exchange:
      return;
  }
}

// NaN in fp32 and bf16 and an absurd value in integers, over all that the transfer will write and
// no peer still has to read.
void Transfer::poison_receive_side() {
  const int64_t element = dtype_bytes(call.dtype);
  const auto fill = [&](int64_t first, int64_t count, void* data) {
    if (count > 0)
      std::memset(at(data, first * element), 0xff, static_cast<size_t>(count * element));
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
  if (!started && group->poison() == Poison::on) poison_receive_side();
  return call.kind == CollectiveKind::exchange ? advance_exchange(workers)
                                               : advance_collective(workers);
}

bool Transfer::advance_collective(Workers& workers) {
  started = true;
  const int stages = stages_of(call.kind);
  while (stage_ < stages) {
    std::atomic<int>& missing = meeting->missing[static_cast<size_t>(stage_)];
    if (!arrived_) {
      arrived_ = true;
      if (missing.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        for (Transfer* peer : meeting->transfers) {
          if (peer != this) peer->call.stream->wake();
        }
      }
    }
    if (missing.load(std::memory_order_acquire) > 0) return false;
    run_stage(stage_, workers);
    ++stage_;
    arrived_ = false;
  }
  done = true;
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
    if (mail->missing.load(std::memory_order_acquire) > 0) {
      complete = false;
      continue;
    }
    copy_bytes(mail->received.data, mail->sent.data, mail->received.count * dtype_bytes(call.dtype),
               workers);
    mail->copied.store(true, std::memory_order_release);
    if (mail->send != this) mail->send->call.stream->wake();
  }
  for (const Mail* mail : sends) {
    if (!mail->copied.load(std::memory_order_acquire)) complete = false;
  }
  done = complete;
  return complete;
}

}  // namespace cambium::sim
