// The communicator: the seam between the trainer and what carries its data.
//
// Seven calls, each with one args struct: all_gather, reduce_scatter, all_reduce, all_to_all_v,
// broadcast, barrier, and exchange (sends and receives as one group, the only point-to-point).
// Every call is asynchronous: it queues the transfer on `stream` and returns a ticket, an Event
// that a stream (`stream.wait(ticket)`) or the host (`host.wait(ticket)`) waits on. Send buffers
// must keep their values, and receive buffers are undefined, until the ticket completes; a ticket
// completes only when its peers have posted and transferred.
//
// Matching: the n-th call of a communicator on one rank meets the n-th on every other; for
// exchange, the n-th message from a source to a destination. Op, reduce op, dtype, counts (pairwise
// for all_to_all_v) and root must agree: the first difference is an Error with exit code 22 that
// names both call sites. The simulator compares every call as it is posted. Between processes
// (`nccl`) a difference shows when the transfer stalls, counts of all_to_all_v are not compared,
// and a call of no element may complete before its peers post. Nothing above this header knows
// which implementation runs.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <source_location>
#include <span>
#include <string>
#include <vector>

#include "src/base/stream.h"
#include "src/base/view.h"

namespace cambium {

enum class CollectiveKind {
  all_gather,
  reduce_scatter,
  all_reduce,
  all_to_all_v,
  broadcast,
  barrier,
  exchange
};
constexpr int kCollectiveKinds = 7;
const char* collective_name(CollectiveKind kind);

enum class ReduceOp : uint8_t { sum, max };

using Ticket = Event;

// One message of an exchange.
struct Message {
  int peer = 0;
  void* data = nullptr;  // const for sends
  int64_t count = 0;     // elements
};

// What one rank posts: the union of all calls' arguments, and their signature.
struct CollectiveCall {
  CollectiveKind kind = CollectiveKind::barrier;
  ReduceOp reduce = ReduceOp::sum;
  DType dtype = DType::u8;
  int64_t count = 0;  // elements per rank of the smaller side; 0 for v-counts
  int root = 0;
  const void* send = nullptr;
  void* recv = nullptr;
  std::vector<int64_t> send_counts;  // all_to_all_v: elements to each rank, packed in rank order
  std::vector<int64_t> recv_counts;
  std::vector<Message> sends;  // exchange
  std::vector<Message> recvs;
  Stream* stream = nullptr;
  std::source_location site;
};

// Bytes and calls by kind. Sent bytes count what leaves this rank for another one.
struct CommTotals {
  int64_t calls = 0;
  int64_t sent_bytes = 0;
  int64_t received_bytes = 0;
};

// One rank's membership in a group. `rank()` is the index within the group.
class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual Ticket post(CollectiveCall call) = 0;
  int rank() const { return rank_; }
  int ranks() const { return ranks_; }
  const std::string& name() const { return name_; }
  const CommTotals& totals(CollectiveKind kind) const { return totals_[static_cast<int>(kind)]; }

 protected:
  Communicator(std::string name, int rank, int ranks)
      : name_(std::move(name)), rank_(rank), ranks_(ranks) {}
  // Refuses absent buffers and sides that overlap other than in place; counts the bytes.
  void check_call(const CollectiveCall& call);
  std::string name_;
  int rank_ = 0;
  int ranks_ = 1;
  std::array<CommTotals, kCollectiveKinds> totals_{};

 private:
  void count_bytes(const CollectiveCall& call);
};

// Every rank's `count` elements, concatenated in rank order into recv [ranks * count].
// In place when send == recv + rank * count.
struct AllGatherArgs {
  Communicator& communicator;
  Stream& stream;
  const void* send = nullptr;
  void* recv = nullptr;
  int64_t count = 0;
  DType dtype = DType::f32;
  std::source_location site = std::source_location::current();
};

// Reduces send [ranks * count] over ranks; this rank keeps its `count` elements.
struct ReduceScatterArgs {
  Communicator& communicator;
  Stream& stream;
  const void* send = nullptr;
  void* recv = nullptr;
  int64_t count = 0;
  DType dtype = DType::f32;
  ReduceOp reduce = ReduceOp::sum;
  std::source_location site = std::source_location::current();
};

// Reduces `count` elements over ranks into every rank's recv (may equal send).
struct AllReduceArgs {
  Communicator& communicator;
  Stream& stream;
  const void* send = nullptr;
  void* recv = nullptr;
  int64_t count = 0;
  DType dtype = DType::f32;
  ReduceOp reduce = ReduceOp::sum;
  std::source_location site = std::source_location::current();
};

// send_counts[r] elements go to rank r, recv_counts[r] come from it, both packed in rank order.
struct AllToAllVArgs {
  Communicator& communicator;
  Stream& stream;
  const void* send = nullptr;
  void* recv = nullptr;
  std::span<const int64_t> send_counts;
  std::span<const int64_t> recv_counts;
  DType dtype = DType::f32;
  std::source_location site = std::source_location::current();
};

// The root's `count` elements to every rank's `data`.
struct BroadcastArgs {
  Communicator& communicator;
  Stream& stream;
  void* data = nullptr;
  int64_t count = 0;
  DType dtype = DType::f32;
  int root = 0;
  std::source_location site = std::source_location::current();
};

struct BarrierArgs {
  Communicator& communicator;
  Stream& stream;
  std::source_location site = std::source_location::current();
};

struct ExchangeArgs {
  Communicator& communicator;
  Stream& stream;
  std::span<const Message> sends;
  std::span<const Message> recvs;
  DType dtype = DType::f32;
  std::source_location site = std::source_location::current();
};

Ticket all_gather(const AllGatherArgs& args);
Ticket reduce_scatter(const ReduceScatterArgs& args);
Ticket all_reduce(const AllReduceArgs& args);
Ticket all_to_all_v(const AllToAllVArgs& args);
Ticket broadcast(const BroadcastArgs& args);
Ticket barrier(const BarrierArgs& args);
Ticket exchange(const ExchangeArgs& args);

}  // namespace cambium
