// Mistakes of distributed trainers as small programs (those that are mutants of the trainer are in
// tests/cli/corpus_test.cc): each is found within 1,000 seeds, and its correct twin in none: of 50
// seeds here, of 1,000 in scripts/corpus.sh.
#include "tests/sim/run_error.h"

namespace cambium::sim {
namespace {

constexpr uint64_t kMostSeeds = 1000, kSampledSeeds = 50;

template <class Body>
RunError found(const ClusterOptions& base, ExitCode want, Body&& body) {
  for (uint64_t seed = 0; seed <= kMostSeeds; ++seed) {
    ClusterOptions options = base;
    options.schedule_seed = seed;
    if (seed % 2 == 0) options.exploration = Exploration::pct;
    RunError error = run_error(options, body);
    if (error.exit_code == ExitCode::done) continue;
    EXPECT_EQ(error.exit_code, want) << "seed " << seed << ": " << error.message;
    return error;
  }
  ADD_FAILURE() << "not found within " << kMostSeeds << " seeds";
  return {};
}

template <class Body>
void expect_clean(const ClusterOptions& base, uint64_t seeds, Body&& body) {
  for (uint64_t seed = 0; seed <= seeds; ++seed) {
    ClusterOptions options = base;
    options.schedule_seed = seed;
    if (seed % 2 == 0) options.exploration = Exploration::pct;
    EXPECT_EQ(run_error(options, body).message, "") << "seed " << seed;
  }
}

enum class Order { fixed, free };

// 1 (Megatron-LM issue 1810): collectives of two communicators on two streams. Only an event makes
// every rank's device start them in one order; where it has no room for both, ranks deadlock.
void two_communicators(RankEnvironment& environment, Order order) {
  RankBench bench(environment);
  Stream& other_stream = environment.make_stream("other");
  const auto other = environment.make_communicator("other", bench.members);
  std::vector<float> second(64);
  const Ticket first = bench.sum();
  if (order == Order::fixed) other_stream.wait(first);
  const Ticket last = all_reduce({.communicator = *other,
                                  .stream = other_stream,
                                  .send = bench.send.data(),
                                  .recv = second.data(),
                                  .count = 4});
  bench.wait(first);
  bench.wait(last);
}

void find_shared_event_order(uint64_t clean_seeds) {
  const ClusterOptions options{.ranks = 3, .transfer_slots = 1};
  const RunError error = found(options, ExitCode::deadlock, [](RankEnvironment& environment) {
    two_communicators(environment, Order::free);
  });
  EXPECT_TRUE(error.says("its device has no room")) << error.message;
  expect_clean(options, clean_seeds,
               [](RankEnvironment& environment) { two_communicators(environment, Order::fixed); });
}

// 4: an all-to-all that needs the whole device beside a reduction of another group.
void cooperative_all_to_all(RankEnvironment& environment, Order order) {
  RankBench bench(environment);
  Stream& experts = environment.make_stream("experts");
  const int first = environment.rank() / 2 * 2;
  const auto expert = environment.make_communicator("expert", {first, first + 1});
  const std::vector<int64_t> rows = {2, 2};
  std::vector<float> received(64);
  const auto dispatch = [&] {
    return all_to_all_v({.communicator = *expert,
                         .stream = experts,
                         .send = bench.send.data(),
                         .recv = received.data(),
                         .send_counts = rows,
                         .recv_counts = rows});
  };
  const Ticket reduced = bench.sum();
  if (order == Order::fixed) experts.wait(reduced);
  bench.wait(dispatch());
  bench.wait(reduced);
}

void find_cooperative_all_to_all(uint64_t clean_seeds) {
  const ClusterOptions options{.ranks = 4, .transfer_slots = 1};
  found(options, ExitCode::deadlock,
        [](RankEnvironment& environment) { cooperative_all_to_all(environment, Order::free); });
  expect_clean(options, clean_seeds, [](RankEnvironment& environment) {
    cooperative_all_to_all(environment, Order::fixed);
  });
}

// 5: a ragged all-to-all and a message on one stream, in another order on the two ends.
void cross_wait(RankEnvironment& environment, Order order) {
  RankBench bench(environment);
  const std::vector<int64_t> sent = {3, 1}, received = {3, 1};
  const std::vector<int64_t> other_sent = {1, 3}, other_received = {1, 3};
  const bool is_first = environment.rank() == 0;
  const auto pipeline = environment.make_communicator("pipeline", {0, 1});
  std::vector<float> inbox(8);
  const auto dispatch = [&] {
    return all_to_all_v({.communicator = *bench.world,
                         .stream = bench.stream,
                         .send = bench.send.data(),
                         .recv = bench.recv.data(),
                         .send_counts = is_first ? sent : other_sent,
                         .recv_counts = is_first ? received : other_received});
  };
  const Message message{1 - environment.rank(), is_first ? bench.send.data() : inbox.data(), 4};
  const auto pass_on = [&] {
    return exchange({.communicator = *pipeline,
                     .stream = bench.stream,
                     .sends = {&message, is_first ? size_t{1} : 0},
                     .recvs = {&message, is_first ? 0 : size_t{1}}});
  };
  if (is_first || order == Order::fixed) {
    dispatch();
    bench.wait(pass_on());
  } else {
    pass_on();
    bench.wait(dispatch());
  }
}

void find_cross_wait(uint64_t clean_seeds) {
  const auto run = [](Order order) {
    return [order](RankEnvironment& environment) { cross_wait(environment, order); };
  };
  const RunError error = found({.ranks = 2}, ExitCode::deadlock, run(Order::free));
  EXPECT_TRUE(error.says("cycle of ranks")) << error.message;
  expect_clean({.ranks = 2}, clean_seeds, run(Order::fixed));
}

// 10: two ranks make two groups in another order, and each waits for its peer inside the first.
void find_initialization_cycle(uint64_t clean_seeds) {
  const auto run = [](Order order) {
    return [order](RankEnvironment& environment) {
      Stream& stream = environment.make_stream("comm");
      const bool swaps = order == Order::free && environment.rank() == 1;
      for (const char* name : {swaps ? "b" : "a", swaps ? "a" : "b"}) {
        const auto group = environment.make_communicator(name, {0, 1});
        environment.host().wait(barrier({.communicator = *group, .stream = stream}));
      }
    };
  };
  found({.ranks = 2}, ExitCode::deadlock, run(Order::free));
  expect_clean({.ranks = 2}, clean_seeds, run(Order::fixed));
}

TEST(Corpus, SharedEventOrderOfTwoCommunicators) { find_shared_event_order(kSampledSeeds); }
TEST(Corpus, CooperativeAllToAllBesideAReduction) { find_cooperative_all_to_all(kSampledSeeds); }
TEST(Corpus, RaggedAllToAllAndMessageWaitForEachOther) { find_cross_wait(kSampledSeeds); }
TEST(Corpus, InitializationLockCycle) { find_initialization_cycle(kSampledSeeds); }

// scripts/corpus.sh runs it.
TEST(Corpus, DISABLED_ProgramsAtAThousandSeeds) {
  find_shared_event_order(kMostSeeds);
  find_cooperative_all_to_all(kMostSeeds);
  find_cross_wait(kMostSeeds);
  find_initialization_cycle(kMostSeeds);
}

}  // namespace
}  // namespace cambium::sim
