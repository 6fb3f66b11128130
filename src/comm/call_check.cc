#include "src/comm/call_check.h"

#include <algorithm>

#include "fmt/format.h"

namespace cambium {

namespace {

bool reduces(CollectiveKind kind) {
  return kind == CollectiveKind::reduce_scatter || kind == CollectiveKind::all_reduce;
}

bool has_count(CollectiveKind kind) {
  return kind != CollectiveKind::all_to_all_v && kind != CollectiveKind::barrier &&
         kind != CollectiveKind::exchange;
}

const char* reduce_name(ReduceOp reduce) { return reduce == ReduceOp::sum ? "sum" : "max"; }

int64_t sum_of(const std::vector<int64_t>& counts) {
  int64_t sum = 0;
  for (const int64_t count : counts) sum += count;
  return sum;
}

struct Range {
  const std::byte* begin = nullptr;
  int64_t bytes = 0;
};

Range send_range(const CollectiveCall& call, int ranks) {
  int64_t elements = call.count;
  if (call.kind == CollectiveKind::reduce_scatter) elements *= ranks;
  if (call.kind == CollectiveKind::all_to_all_v) elements = sum_of(call.send_counts);
  return {static_cast<const std::byte*>(call.send), elements * dtype_bytes(call.dtype)};
}

Range recv_range(const CollectiveCall& call, int ranks) {
  int64_t elements = call.count;
  if (call.kind == CollectiveKind::all_gather) elements *= ranks;
  if (call.kind == CollectiveKind::all_to_all_v) elements = sum_of(call.recv_counts);
  return {static_cast<const std::byte*>(call.recv), elements * dtype_bytes(call.dtype)};
}

// A programming mistake that any implementation would turn into wrong data: absent buffers, or
// send and receive sides that overlap other than in place.
void check_buffers(const CollectiveCall& call, int member, int ranks) {
  if (call.kind == CollectiveKind::barrier || call.kind == CollectiveKind::exchange) return;
  const auto complain = [&](const char* what) {
    fail(ExitCode::internal, "{}: {}: {}", describe_site(call.site), describe_call(call), what);
  };
  const Range send = send_range(call, ranks);
  const Range recv = recv_range(call, ranks);
  if (send.bytes < 0 || recv.bytes < 0) complain("a count is negative");
  if (send.bytes > 0 && send.begin == nullptr) complain("the send buffer is null");
  if (recv.bytes > 0 && recv.begin == nullptr) complain("the receive buffer is null");
  if (call.kind == CollectiveKind::broadcast || send.bytes == 0 || recv.bytes == 0) return;
  const int64_t own = call.count * member * dtype_bytes(call.dtype);
  const bool in_place =
      (call.kind == CollectiveKind::all_reduce && send.begin == recv.begin) ||
      (call.kind == CollectiveKind::all_gather && send.begin == recv.begin + own) ||
      (call.kind == CollectiveKind::reduce_scatter && recv.begin == send.begin + own);
  const bool apart = send.begin + send.bytes <= recv.begin || recv.begin + recv.bytes <= send.begin;
  if (!in_place && !apart) complain("send and receive buffers overlap");
}

}  // namespace

std::string call_difference(const CollectiveCall& a, const CollectiveCall& b) {
  if (a.kind != b.kind) {
    return fmt::format("op {} vs {}", collective_name(a.kind), collective_name(b.kind));
  }
  if (reduces(a.kind) && a.reduce != b.reduce) {
    return fmt::format("reduce op {} vs {}", reduce_name(a.reduce), reduce_name(b.reduce));
  }
  if (a.kind != CollectiveKind::barrier && a.dtype != b.dtype) {
    return fmt::format("dtype {} vs {}", dtype_name(a.dtype), dtype_name(b.dtype));
  }
  if (has_count(a.kind) && a.count != b.count) {
    return fmt::format("count {} vs {}", a.count, b.count);
  }
  if (a.kind == CollectiveKind::broadcast && a.root != b.root) {
    return fmt::format("root {} vs {}", a.root, b.root);
  }
  return "";
}

bool same_call_site(const CollectiveCall& a, const CollectiveCall& b) {
  return a.site.line() == b.site.line() && a.site.column() == b.site.column() &&
         std::string_view(a.site.file_name()) == b.site.file_name();
}

std::string describe_site(const std::source_location& site) {
  std::string_view file = site.file_name();  // as the compiler was given it: build/cpu/../../src
  while (file.starts_with("../")) file.remove_prefix(3);
  return fmt::format("{}:{}", file, site.line());
}

std::string describe_call(const CollectiveCall& call) {
  std::string text = collective_name(call.kind);
  if (reduces(call.kind)) text += fmt::format(" {}", reduce_name(call.reduce));
  if (call.kind != CollectiveKind::barrier) text += fmt::format(" {}", dtype_name(call.dtype));
  if (has_count(call.kind)) text += fmt::format(" count {}", call.count);
  if (call.kind == CollectiveKind::broadcast) text += fmt::format(" root {}", call.root);
  return text;
}

std::string describe_ranks(const std::vector<int>& ranks) {
  constexpr size_t kMostShown = 16;
  std::string text;
  for (size_t i = 0; i < std::min(ranks.size(), kMostShown); ++i) {
    text += fmt::format("{}{}", i == 0 ? "[" : ",", ranks[i]);
  }
  if (ranks.size() > kMostShown) text += fmt::format(",.. {} ranks", ranks.size());
  return text + "]";
}

void check_members(const std::string& name, const std::vector<int>& members, JobPlace place) {
  std::vector<int> sorted = members;
  std::sort(sorted.begin(), sorted.end());
  const bool valid = !sorted.empty() && sorted.front() >= 0 && sorted.back() < place.ranks &&
                     std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end() &&
                     std::binary_search(sorted.begin(), sorted.end(), place.rank);
  if (valid) return;
  fail(ExitCode::internal,
       "communicator '{}' {}: members must be distinct ranks below {} and include rank {}", name,
       describe_ranks(members), place.ranks, place.rank);
}

void Communicator::check_call(const CollectiveCall& call) {
  CHECK(call.stream != nullptr);
  check_buffers(call, rank_, ranks_);
  count_bytes(call);
}

// What leaves and enters this rank when every byte travels once: reductions are done where their
// segment lives, all_reduce is a reduce_scatter and an all_gather.
void Communicator::count_bytes(const CollectiveCall& call) {
  const int64_t element = dtype_bytes(call.dtype);
  const int64_t peers = ranks_ - 1;
  int64_t sent = 0;
  int64_t received = 0;
  switch (call.kind) {
    case CollectiveKind::all_gather:
    case CollectiveKind::reduce_scatter:
      sent = received = call.count * peers;
      break;
    case CollectiveKind::all_reduce: {
      const int64_t per_member = (call.count + ranks_ - 1) / ranks_;
      const int64_t first = std::min(call.count, rank_ * per_member);
      const int64_t own = std::min(per_member, call.count - first);
      sent = received = call.count - own + own * peers;
      break;
    }
    case CollectiveKind::all_to_all_v:
      sent = sum_of(call.send_counts) - call.send_counts[static_cast<size_t>(rank_)];
      received = sum_of(call.recv_counts) - call.recv_counts[static_cast<size_t>(rank_)];
      break;
    case CollectiveKind::broadcast:
      (call.root == rank_ ? sent : received) = call.count * (call.root == rank_ ? peers : 1);
      break;
    case CollectiveKind::exchange:
      for (const Message& message : call.sends) sent += message.peer == rank_ ? 0 : message.count;
      for (const Message& message : call.recvs) {
        received += message.peer == rank_ ? 0 : message.count;
      }
      break;
    case CollectiveKind::barrier:
      break;
  }
  CommTotals& totals = totals_[static_cast<size_t>(call.kind)];
  ++totals.calls;
  totals.sent_bytes += sent * element;
  totals.received_bytes += received * element;
}

}  // namespace cambium
