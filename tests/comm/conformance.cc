#include "tests/comm/conformance.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>

#include "src/base/digest.h"
#include "tests/comm/conformance_block.h"

namespace cambium::conformance {

namespace {

// One rank's run of cases over one communicator of all ranks.
class Run {
 public:
  Run(RankEnvironment& environment, const Memory& memory)
      : environment_(environment),
        memory_(memory),
        stream_(environment.make_stream("conformance")),
        other_stream_(environment.make_stream("conformance 2")) {
    world_members_.resize(static_cast<size_t>(environment.ranks()));
    std::iota(world_members_.begin(), world_members_.end(), 0);
    world_ = environment.make_communicator("world", world_members_);
  }

  void run(const Case& test);
  uint64_t hash() const { return hash_; }

 private:
  int ranks() const { return environment_.ranks(); }
  int rank() const { return environment_.rank(); }
  Block block(int64_t count) { return Block(environment_.workers(), memory_, test_.dtype, count); }
  // Made once, as making takes a network's time.
  Communicator& group(const std::string& name, const std::vector<int>& members) {
    auto& made = groups_[name];
    if (made == nullptr) made = environment_.make_communicator(name, members);
    return *made;
  }
  void await(const Ticket& ticket) { environment_.host().wait(ticket); }

  // Compares `count` received elements from `first` on with `want(i)` and hashes them.
  template <class Want>
  void expect(Block& got, int64_t first, int64_t count, const Want& want) {
    const bool guards_intact = got.fetch();
    for_elements(environment_.workers(), count, [&](int64_t i) {
      const double value = got.at(first + i);
      const auto wanted = static_cast<double>(want(i));
      if (value != wanted) {
        fail(ExitCode::verification_mismatch, "{}: rank {} element {}: got {}, expected {}",
             test_.name(), rank(), first + i, value, wanted);
      }
    });
    if (!guards_intact) {
      fail(ExitCode::verification_mismatch, "{}: rank {} wrote outside its buffer", test_.name(),
           rank());
    }
    const Digest128 digest = xxh3_128(got.elements(), static_cast<size_t>(got.bytes()));
    hash_ = (hash_ ^ digest.low) * 0x100000001b3u;
  }
  int64_t sum_at(const std::vector<int>& members, int64_t index, int64_t salt) const {
    int64_t sum = 0;
    for (const int member : members) sum += value_of(member, index, salt);
    return sum;
  }

  void all_gather();
  void reduce_scatter();
  void all_reduce(ReduceOp reduce);
  void broadcast(int root);
  template <class CountOf>
  void all_to_all(const CountOf& count_of);
  void barrier();
  void exchange_shifted(int distance);
  void exchange_pairs();
  void exchange_several();
  void exchange_partial();
  void subgroups();
  void overlapping();
  void two_streams();
  void stream_waits();
  void many_outstanding();
  // Starts an all_reduce of fresh values over `communicator` into `recv`.
  Ticket start_sum(Communicator& communicator, Stream& stream, Block& send, Block& recv,
                   int64_t salt);

  RankEnvironment& environment_;
  Case test_;
  Memory memory_;
  Stream& stream_;
  Stream& other_stream_;
  std::vector<int> world_members_;
  std::unique_ptr<Communicator> world_;
  std::map<std::string, std::unique_ptr<Communicator>> groups_;
  uint64_t hash_ = 0xcbf29ce484222325u;
};

void Run::all_gather() {
  const int64_t count = test_.count;
  Block recv = block(count * ranks());
  Block apart = block(count);
  const bool in_place = test_.placement == Placement::in_place;
  Block& send = in_place ? recv : apart;
  const int64_t first = in_place ? rank() * count : 0;
  send.fill(first, count, rank(), 1);
  await(cambium::all_gather({.communicator = *world_,
                             .stream = stream_,
                             .send = send.data(first),
                             .recv = recv.data(),
                             .count = count,
                             .dtype = test_.dtype}));
  for (int peer = 0; peer < ranks(); ++peer) {
    expect(recv, peer * count, count, [&](int64_t i) { return value_of(peer, i, 1); });
  }
}

void Run::reduce_scatter() {
  const int64_t count = test_.count;
  Block send = block(count * ranks());
  Block apart = block(count);
  const bool in_place = test_.placement == Placement::in_place;
  Block& recv = in_place ? send : apart;
  const int64_t first = in_place ? rank() * count : 0;
  for (int peer = 0; peer < ranks(); ++peer) send.fill(peer * count, count, rank(), 10 + peer);
  await(cambium::reduce_scatter({.communicator = *world_,
                                 .stream = stream_,
                                 .send = send.data(),
                                 .recv = recv.data(first),
                                 .count = count,
                                 .dtype = test_.dtype}));
  expect(recv, first, count, [&](int64_t i) { return sum_at(world_members_, i, 10 + rank()); });
}

void Run::all_reduce(ReduceOp reduce) {
  Block send = block(test_.count);
  Block apart = block(test_.count);
  Block& recv = test_.placement == Placement::in_place ? send : apart;
  send.fill(0, test_.count, rank(), 2);
  await(cambium::all_reduce({.communicator = *world_,
                             .stream = stream_,
                             .send = send.data(),
                             .recv = recv.data(),
                             .count = test_.count,
                             .dtype = test_.dtype,
                             .reduce = reduce}));
  expect(recv, 0, test_.count, [&](int64_t i) {
    if (reduce == ReduceOp::sum) return sum_at(world_members_, i, 2);
    int64_t most = 0;
    for (const int peer : world_members_) most = std::max(most, value_of(peer, i, 2));
    return most;
  });
}

void Run::broadcast(int root) {
  Block data = block(test_.count);
  data.fill(0, test_.count, rank(), 3);
  await(cambium::broadcast({.communicator = *world_,
                            .stream = stream_,
                            .data = data.data(),
                            .count = test_.count,
                            .dtype = test_.dtype,
                            .root = root}));
  expect(data, 0, test_.count, [&](int64_t i) { return value_of(root, i, 3); });
}

template <class CountOf>
void Run::all_to_all(const CountOf& count_of) {
  std::vector<int64_t> send_counts, recv_counts;
  for (int peer = 0; peer < ranks(); ++peer) {
    send_counts.push_back(count_of(rank(), peer));
    recv_counts.push_back(count_of(peer, rank()));
  }
  Block send = block(std::accumulate(send_counts.begin(), send_counts.end(), int64_t{0}));
  Block recv = block(std::accumulate(recv_counts.begin(), recv_counts.end(), int64_t{0}));
  int64_t first = 0;
  for (int peer = 0; peer < ranks(); ++peer) {
    send.fill(first, send_counts[static_cast<size_t>(peer)], rank(), 20 + peer);
    first += send_counts[static_cast<size_t>(peer)];
  }
  await(all_to_all_v({.communicator = *world_,
                      .stream = stream_,
                      .send = send.data(),
                      .recv = recv.data(),
                      .send_counts = send_counts,
                      .recv_counts = recv_counts,
                      .dtype = test_.dtype}));
  first = 0;
  for (int peer = 0; peer < ranks(); ++peer) {
    const int64_t count = recv_counts[static_cast<size_t>(peer)];
    expect(recv, first, count, [&](int64_t i) { return value_of(peer, i, 20 + rank()); });
    first += count;
  }
}

void Run::barrier() {
  for (int i = 0; i < 3; ++i) {
    await(cambium::barrier({.communicator = *world_, .stream = stream_}));
  }
}

// Sends to the rank `distance` further on and receives from the one as far back.
void Run::exchange_shifted(int distance) {
  Block send = block(test_.count);
  Block recv = block(test_.count);
  const int to = (rank() + distance) % ranks();
  const int from = (rank() - distance % ranks() + ranks()) % ranks();
  for (int round = 0; round < 3; ++round) {
    send.fill(0, test_.count, rank(), round);
    const Message sent{to, send.data(), test_.count};
    const Message received{from, recv.data(), test_.count};
    await(exchange({.communicator = *world_,
                    .stream = stream_,
                    .sends = {&sent, 1},
                    .recvs = {&received, 1},
                    .dtype = test_.dtype}));
    expect(recv, 0, test_.count, [&](int64_t i) { return value_of(from, i, round); });
  }
}

// Even ranks send to the next rank only; the last of an odd number takes no part.
void Run::exchange_pairs() {
  const int peer = rank() ^ 1;
  if (peer >= ranks()) return;
  Block data = block(test_.count);
  const Message message{peer, data.data(), test_.count};
  ExchangeArgs args{.communicator = *world_, .stream = stream_, .sends = {}, .recvs = {}};
  args.dtype = test_.dtype;
  if (rank() < peer) {
    data.fill(0, test_.count, rank(), 4);
    args.sends = {&message, 1};
  } else {
    args.recvs = {&message, 1};
  }
  await(exchange(args));
  expect(data, 0, test_.count, [&](int64_t i) { return value_of(std::min(rank(), peer), i, 4); });
}

void Run::exchange_several() {
  const int to = (rank() + 1) % ranks();
  const int from = (rank() + ranks() - 1) % ranks();
  constexpr int kMessages = 3;
  Block send = block(test_.count * kMessages + kMessages);
  Block recv = block(test_.count * kMessages + kMessages);
  std::vector<Message> sends, recvs;
  for (int message = 0; message < kMessages; ++message) {
    const int64_t first = test_.count * message;
    send.fill(first, test_.count, rank(), message);
    sends.push_back({to, send.data(first), test_.count});
    recvs.push_back({from, recv.data(first), test_.count});
  }
  await(exchange({.communicator = *world_,
                  .stream = stream_,
                  .sends = sends,
                  .recvs = recvs,
                  .dtype = test_.dtype}));
  for (int message = 0; message < kMessages; ++message) {
    expect(recv, test_.count * message, test_.count,
           [&](int64_t i) { return value_of(from, i, message); });
  }
}

// Rank 1 receives from ranks 0 and 2 in one call; rank 2 sends only after it has heard from rank 0,
// which speaks to it only after its message to rank 1 was taken.
void Run::exchange_partial() {
  Block data = block(2 * test_.count);
  const auto post = [&](std::vector<Message> sends, std::vector<Message> recvs) {
    await(exchange({.communicator = *world_,
                    .stream = stream_,
                    .sends = sends,
                    .recvs = recvs,
                    .dtype = test_.dtype}));
  };
  data.fill(0, 2 * test_.count, rank(), 5);
  if (rank() == 0) {
    post({{1, data.data(), test_.count}}, {});
    post({{2, data.data(), test_.count}}, {});
  } else if (rank() == 1) {
    post({}, {{0, data.data(), test_.count}, {2, data.data(test_.count), test_.count}});
    expect(data, 0, test_.count, [&](int64_t i) { return value_of(0, i, 5); });
    expect(data, test_.count, test_.count, [&](int64_t i) { return value_of(0, i, 5); });
  } else if (rank() == 2) {
    post({}, {{0, data.data(), test_.count}});
    post({{1, data.data(), test_.count}}, {});
  }
}

Ticket Run::start_sum(Communicator& communicator, Stream& stream, Block& send, Block& recv,
                      int64_t salt) {
  send.fill(0, test_.count, rank(), salt);
  return cambium::all_reduce({.communicator = communicator,
                              .stream = stream,
                              .send = send.data(),
                              .recv = recv.data(),
                              .count = test_.count,
                              .dtype = test_.dtype});
}

void Run::subgroups() {
  std::vector<int> members;
  for (int peer = rank() % 2; peer < ranks(); peer += 2) members.push_back(peer);
  Communicator& half = group("half", members);
  Block send = block(test_.count);
  Block recv = block(test_.count);
  await(start_sum(half, stream_, send, recv, 6));
  expect(recv, 0, test_.count, [&](int64_t i) { return sum_at(members, i, 6); });
}

void Run::overlapping() {
  const int columns = ranks() % 2 == 0 ? 2 : 1;
  std::vector<int> row, column;
  for (const int peer : world_members_) {
    if (peer / columns == rank() / columns) row.push_back(peer);
    if (peer % columns == rank() % columns) column.push_back(peer);
  }
  Communicator& row_group = group("row", row);
  Communicator& column_group = group("column", column);
  Block send_a = block(test_.count), recv_a = block(test_.count);
  Block send_b = block(test_.count), recv_b = block(test_.count);
  Block send_c = block(test_.count), recv_c = block(test_.count);
  start_sum(row_group, stream_, send_a, recv_a, 7);
  start_sum(*world_, stream_, send_b, recv_b, 8);
  await(start_sum(column_group, stream_, send_c, recv_c, 9));
  expect(recv_a, 0, test_.count, [&](int64_t i) { return sum_at(row, i, 7); });
  expect(recv_b, 0, test_.count, [&](int64_t i) { return sum_at(world_members_, i, 8); });
  expect(recv_c, 0, test_.count, [&](int64_t i) { return sum_at(column, i, 9); });
}

void Run::two_streams() {
  Communicator& other = group("other", world_members_);
  Block send_a = block(test_.count), recv_a = block(test_.count);
  Block send_b = block(test_.count), recv_b = block(test_.count);
  // Odd ranks post in the other order: the streams are independent.
  Ticket a, b;
  if (rank() % 2 == 0) a = start_sum(*world_, stream_, send_a, recv_a, 10);
  b = start_sum(other, other_stream_, send_b, recv_b, 11);
  if (rank() % 2 == 1) a = start_sum(*world_, stream_, send_a, recv_a, 10);
  await(b);
  expect(recv_b, 0, test_.count, [&](int64_t i) { return sum_at(world_members_, i, 11); });
  await(a);
  expect(recv_a, 0, test_.count, [&](int64_t i) { return sum_at(world_members_, i, 10); });
}

// sum on one stream -> gather on the other -> gather on the first.
void Run::stream_waits() {
  Communicator& other = group("other", world_members_);
  const int64_t count = test_.count;
  Block send = block(count), sum = block(count);
  Block once = block(count * ranks()), last = block(count);
  const Ticket summed = start_sum(*world_, stream_, send, sum, 12);
  other_stream_.wait(summed);
  const Ticket gathered = cambium::all_gather({.communicator = other,
                                               .stream = other_stream_,
                                               .send = sum.data(),
                                               .recv = once.data(),
                                               .count = count,
                                               .dtype = test_.dtype});
  stream_.wait(gathered);
  await(cambium::all_reduce({.communicator = *world_,
                             .stream = stream_,
                             .send = once.data((ranks() - 1) * count),
                             .recv = last.data(),
                             .count = count,
                             .dtype = test_.dtype,
                             .reduce = ReduceOp::max}));
  expect(last, 0, count, [&](int64_t i) { return sum_at(world_members_, i, 12); });
}

void Run::many_outstanding() {
  constexpr int kCalls = 50;
  Block send = block(test_.count), recv = block(test_.count * ranks());
  send.fill(0, test_.count, rank(), 13);
  Ticket last;
  for (int call = 0; call < kCalls; ++call) {
    last = cambium::all_gather({.communicator = *world_,
                                .stream = stream_,
                                .send = send.data(),
                                .recv = recv.data(),
                                .count = test_.count,
                                .dtype = test_.dtype});
  }
  await(last);
  expect(recv, 0, test_.count, [&](int64_t i) { return value_of(0, i, 13); });
}

void Run::run(const Case& test) {
  CHECK_EQ(environment_.ranks(), test.ranks);
  test_ = test;
  const int64_t count = test_.count;
  const auto even = [&](int, int) { return count; };
  const auto ragged = [&](int from, int to) { return (from * 3 + to * 5) % 4 * count / 2; };
  const auto zero = [&](int from, int to) { return from == 0 || to == 0 ? 0 : count; };
  switch (test_.subject) {
    case Subject::all_gather:
      all_gather();
      break;
    case Subject::reduce_scatter:
      reduce_scatter();
      break;
    case Subject::all_reduce_sum:
      all_reduce(ReduceOp::sum);
      break;
    case Subject::all_reduce_max:
      all_reduce(ReduceOp::max);
      break;
    case Subject::broadcast_first:
      broadcast(0);
      break;
    case Subject::broadcast_last:
      broadcast(ranks() - 1);
      break;
    case Subject::all_to_all_even:
      all_to_all(even);
      break;
    case Subject::all_to_all_ragged:
      all_to_all(ragged);
      break;
    case Subject::all_to_all_zero_rank:
      all_to_all(zero);
      break;
    case Subject::barrier:
      barrier();
      break;
    case Subject::exchange_ring:
      exchange_shifted(1);
      break;
    case Subject::exchange_self:
      exchange_shifted(0);
      break;
    case Subject::exchange_pairs:
      exchange_pairs();
      break;
    case Subject::exchange_several:
      exchange_several();
      break;
    case Subject::exchange_partial:
      exchange_partial();
      break;
    case Subject::subgroups:
      subgroups();
      break;
    case Subject::overlapping:
      overlapping();
      break;
    case Subject::two_streams:
      two_streams();
      break;
    case Subject::stream_waits:
      stream_waits();
      break;
    case Subject::many_outstanding:
      many_outstanding();
      break;
  }
}

constexpr const char* kSubjectNames[] = {
    "all_gather",      "reduce_scatter",   "all_reduce_sum",   "all_reduce_max",
    "broadcast_first", "broadcast_last",   "all_to_all_even",  "all_to_all_ragged",
    "all_to_all_zero", "barrier",          "exchange_ring",    "exchange_pairs",
    "exchange_self",   "exchange_several", "exchange_partial", "subgroups",
    "overlapping",     "two_streams",      "stream_waits",     "many_outstanding",
};

bool supports_in_place(Subject subject) {
  return subject == Subject::all_gather || subject == Subject::reduce_scatter ||
         subject == Subject::all_reduce_sum || subject == Subject::all_reduce_max;
}

}  // namespace

std::string Case::name() const {
  return fmt::format("{}_{}_x{}_on{}{}", kSubjectNames[static_cast<int>(subject)],
                     dtype_name(dtype), count, ranks,
                     placement == Placement::in_place ? "_in_place" : "");
}

std::vector<Case> all_cases(int most_ranks) {
  constexpr DType kDTypes[] = {DType::f32, DType::bf16, DType::i32, DType::i64, DType::u8};
  constexpr int64_t kCounts[] = {0, 1, 13, 4096, 20011};
  std::vector<Case> cases;
  for (const int ranks : {1, 2, 3, 4, 8}) {
    if (ranks > most_ranks) break;
    for (int subject = 0; subject <= static_cast<int>(Subject::many_outstanding); ++subject) {
      Case test{static_cast<Subject>(subject), ranks, DType::f32, 13, Placement::apart};
      if (test.subject == Subject::exchange_partial && ranks < 3) continue;
      const bool composite = test.subject >= Subject::exchange_partial;
      if (test.subject == Subject::barrier) {
        cases.push_back(test);
        continue;
      }
      for (const DType dtype : kDTypes) {
        for (const int64_t count : kCounts) {
          // Composite cases are about order, not about data; bf16 and f32 see the large count.
          if (composite && (count > 4096 || dtype == DType::i32)) continue;
          if (count > 4096 && dtype != DType::f32 && dtype != DType::bf16) continue;
          test.dtype = dtype;
          test.count = count;
          test.placement = Placement::apart;
          cases.push_back(test);
          if (!supports_in_place(test.subject)) continue;
          test.placement = Placement::in_place;
          cases.push_back(test);
        }
      }
    }
  }
  return cases;
}

std::vector<Case> large_cases(int ranks, int64_t most_bytes) {
  std::vector<Case> cases;
  for (const Subject subject :
       {Subject::all_gather, Subject::reduce_scatter, Subject::all_reduce_sum,
        Subject::broadcast_first, Subject::all_to_all_even, Subject::exchange_ring}) {
    const bool wide = subject == Subject::reduce_scatter || subject == Subject::all_to_all_even;
    for (const DType dtype : {DType::f32, DType::bf16}) {
      for (int64_t bytes = 1 << 20; bytes <= most_bytes; bytes *= 32) {
        const int64_t count = bytes / dtype_bytes(dtype) / (wide ? ranks : 1);
        cases.push_back({subject, ranks, dtype, count, Placement::apart});
      }
    }
  }
  return cases;
}

Memory host_memory() {
  return {[](int64_t bytes) {
            return std::shared_ptr<void>(std::malloc(static_cast<size_t>(bytes)), std::free);
          },
          [](const void* from, void* to, int64_t bytes) {
            std::memcpy(to, from, static_cast<size_t>(bytes));
          }};
}

uint64_t run_cases(RankEnvironment& environment, std::span<const Case> cases,
                   const Memory& memory) {
  Run run(environment, memory);
  for (const Case& test : cases) run.run(test);
  return run.hash();
}

}  // namespace cambium::conformance
