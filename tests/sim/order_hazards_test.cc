// Ordering hazards: launches whose order differs between two ranks are found in runs that do not
// hang, and only those.
#include "tests/sim/run_error.h"

namespace cambium::sim {
namespace {

// Two communicators of all ranks, each with its stream: a run with room for every transfer.
struct TwoGroups {
  explicit TwoGroups(RankEnvironment& given)
      : bench(given),
        other_stream(given.make_stream("other")),
        other(given.make_communicator("other", bench.members)) {}
  Ticket first() { return bench.sum(*bench.world, bench.stream, 4); }
  Ticket second() {
    return all_reduce({.communicator = *other,
                       .stream = other_stream,
                       .send = bench.send.data(),
                       .recv = received.data(),
                       .count = 4});
  }
  RankBench bench;
  Stream& other_stream;
  std::unique_ptr<Communicator> other;
  std::vector<float> received = std::vector<float>(64);
};

enum class Launches { alike, swapped_on_rank_1 };

void two_orders(RankEnvironment& environment, Launches launches) {
  TwoGroups groups(environment);
  const bool swaps = launches != Launches::alike && environment.rank() == 1;
  const Ticket one = swaps ? groups.second() : groups.first();
  const Ticket two = swaps ? groups.first() : groups.second();
  groups.bench.wait(one);
  groups.bench.wait(two);
}

RunError hazard(int ranks, Launches launches, Races races, uint64_t seed = 0) {
  return run_error({.ranks = ranks, .schedule_seed = seed, .races = races},
                   [launches](RankEnvironment& environment) { two_orders(environment, launches); });
}

TEST(OrderHazards, TwoCommunicatorsInAnotherOrderAreReportedThoughTheRunGoesOn) {
  for (uint64_t seed = 0; seed <= 5; ++seed) {
    // It does not hang.
    EXPECT_EQ(hazard(3, Launches::swapped_on_rank_1, Races::ignored, seed).message, "");
    const RunError error = hazard(3, Launches::swapped_on_rank_1, Races::detected, seed);
    EXPECT_EQ(error.exit_code, ExitCode::deadlock) << error.message;
    for (const char* text : {"ordering hazard", "all_reduce", "'world' [0,1,2]", "'other' [0,1,2]",
                             "order_hazards_test.cc:", "rank 1"}) {
      EXPECT_TRUE(error.says(text)) << text << ": " << error.message;
    }
  }
}

TEST(OrderHazards, OneOrderIsNoHazardInAnySchedule) {
  for (uint64_t seed = 0; seed <= 50; ++seed) {
    EXPECT_EQ(hazard(4, Launches::alike, Races::detected, seed).message, "");
  }
  const ClusterReport report =
      run_cluster({.ranks = 4, .races = Races::detected},
                  [](RankEnvironment& environment) { two_orders(environment, Launches::alike); });
  EXPECT_EQ(report.races.launches, 2 * 6);  // two transfers, six pairs
}

// Groups that share one rank alone cannot block each other.
TEST(OrderHazards, GroupsThatShareOneRankHaveNoOrder) {
  const RunError error =
      run_error({.ranks = 3, .races = Races::detected}, [](RankEnvironment& environment) {
        RankBench bench(environment);
        Stream& other_stream = environment.make_stream("other");
        const int rank = environment.rank();
        std::vector<float> received(8);
        std::vector<std::unique_ptr<Communicator>> groups;
        std::vector<Ticket> tickets;
        const auto sum = [&](std::vector<int> members, Stream& stream, float* to) {
          groups.push_back(environment.make_communicator(fmt::format("g{}", members[0]), members));
          tickets.push_back(all_reduce({.communicator = *groups.back(),
                                        .stream = stream,
                                        .send = bench.send.data(),
                                        .recv = to,
                                        .count = 4}));
        };
        if (rank == 2) sum({1, 2}, other_stream, received.data());
        if (rank <= 1) sum({0, 1}, bench.stream, bench.recv.data());
        if (rank == 1) sum({1, 2}, other_stream, received.data());
        for (const Ticket& ticket : tickets) bench.wait(ticket);
      });
  EXPECT_EQ(error.message, "");
}

// One exchange holds both directions; two exchanges on two streams in another order do not.
TEST(OrderHazards, MessagesOfOneExchangeStartTogether) {
  const auto run = [](bool together) {
    return run_error({.ranks = 2, .races = Races::detected}, [=](RankEnvironment& environment) {
      RankBench bench(environment);
      Stream& other_stream = environment.make_stream("other");
      const int peer = 1 - environment.rank();
      const Message out{peer, bench.send.data(), 4}, in{peer, bench.recv.data(), 4};
      std::vector<Ticket> tickets;
      const auto post = [&](Stream& stream, std::span<const Message> sends,
                            std::span<const Message> recvs) {
        tickets.push_back(exchange(
            {.communicator = *bench.world, .stream = stream, .sends = sends, .recvs = recvs}));
      };
      if (together) {
        post(bench.stream, {&out, 1}, {&in, 1});
      } else {
        post(bench.stream, {&out, 1}, {});
        post(other_stream, {}, {&in, 1});
      }
      for (const Ticket& ticket : tickets) bench.wait(ticket);
    });
  };
  EXPECT_EQ(run(true).message, "");
  EXPECT_TRUE(run(false).says("ordering hazard")) << run(false).message;
}

}  // namespace
}  // namespace cambium::sim
