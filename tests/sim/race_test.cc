// Race detection on small programs: each way to order two accesses, and what is reported without.
#include "kernels/copy.h"
#include "src/base/arena.h"
#include "tests/sim/run_error.h"

namespace cambium::sim {
namespace {

constexpr int64_t kBytes = 64;

// A rank with two streams whose ops copy bytes between blocks of an arena.
struct RaceBench {
  explicit RaceBench(RankEnvironment& given)
      : environment(given),
        arena(1 << 20, Poison::off),
        first(given.make_stream("first")),
        second(given.make_stream("second")),
        a(block()),
        b(block()),
        c(block()) {
    std::vector<int> members;
    for (int rank = 0; rank < given.ranks(); ++rank) members.push_back(rank);
    world = given.make_communicator("world", members);
  }
  Buffer block() { return arena.allocate(kBytes, MemoryClass::activations, "block"); }
  void copy(Stream& stream, const Buffer& from, const Buffer& to, int64_t bytes = kBytes,
            std::source_location site = std::source_location::current()) {
    OpContext context;
    context.stream = &stream;
    copy_bytes(
        {.from_N = {from.as<uint8_t>(), Shape(bytes)}, .to_N = {to.as<uint8_t>(), Shape(bytes)}},
        {context, site});
  }
  Ticket gather(Stream& stream, const Buffer& from, const Buffer& to) {
    return all_gather({.communicator = *world,
                       .stream = stream,
                       .send = from.data(),
                       .recv = to.data(),
                       .count = kBytes / environment.ranks(),
                       .dtype = DType::u8});
  }
  void finish() {
    environment.host().wait(first.record());
    environment.host().wait(second.record());
  }

  RankEnvironment& environment;
  Arena arena;
  Stream& first;
  Stream& second;
  Buffer a, b, c;
  std::unique_ptr<Communicator> world;
};

template <class Body>
RunError races(Body&& body) {
  RunError last;
  for (const uint64_t seed : {0, 1, 2, 3}) {
    last = run_error({.ranks = 2, .schedule_seed = seed, .races = Races::detected},
                     [&](RankEnvironment& environment) {
                       RaceBench bench(environment);
                       body(bench);
                       bench.finish();
                     });
    if (last.exit_code == ExitCode::done) continue;
    EXPECT_EQ(last.exit_code, ExitCode::verification_mismatch) << last.message;
    EXPECT_TRUE(last.says("race: nothing orders two accesses")) << last.message;
  }
  return last;
}

TEST(Races, StreamsAreOrderedByEventsAlone) {
  const auto program = [](auto&& order) {
    return races([&](RaceBench& bench) {
      bench.copy(bench.first, bench.a, bench.b);
      order(bench);
      bench.copy(bench.second, bench.b, bench.c);
    });
  };
  EXPECT_EQ(program([](RaceBench& bench) { bench.second.wait(bench.first.record()); }).message, "");
  EXPECT_EQ(program([](RaceBench& bench) {
              bench.environment.host().wait(bench.first.record());
            }).message,
            "");
  const RunError error = program([](RaceBench&) {});
  for (const char* text :
       {"of 64 bytes", "'copy_bytes' at ", "tests/sim/race_test.cc:", " (number 1 of 'rank ",
        " first') writes", "to_N", " second') reads", "from_N"}) {
    EXPECT_TRUE(error.says(text)) << text << "\n" << error.message;
  }
  // The event of an earlier task does not order a later one.
  EXPECT_NE(races([](RaceBench& bench) {
              const Event before = bench.first.record();
              bench.copy(bench.first, bench.a, bench.b);
              bench.second.wait(before);
              bench.copy(bench.second, bench.b, bench.c);
            }).exit_code,
            ExitCode::done);
}

TEST(Races, ReadsDoNotConflictAndWritesAfterReadsDo) {
  EXPECT_EQ(races([](RaceBench& bench) {
              bench.copy(bench.first, bench.a, bench.b);
              bench.copy(bench.second, bench.a, bench.c);
            }).message,
            "");
  EXPECT_NE(races([](RaceBench& bench) {
              bench.copy(bench.first, bench.a, bench.b);
              bench.copy(bench.second, bench.c, bench.a);
            }).message,
            "");
  // Bytes beside each other do not overlap.
  EXPECT_EQ(races([](RaceBench& bench) {
              bench.copy(bench.first, bench.a, bench.b, kBytes / 2);
              Buffer upper = bench.block();
              OpContext context;
              context.stream = &bench.second;
              copy_bytes({.from_N = {bench.c.as<uint8_t>(), Shape(kBytes / 2)},
                          .to_N = {bench.b.as<uint8_t>() + kBytes / 2, Shape(kBytes / 2)}},
                         context);
            }).message,
            "");
}

TEST(Races, MemoryUsedAgainTooEarly) {
  const auto program = [](bool waits) {
    return races([waits](RaceBench& bench) {
      Buffer block = bench.block();
      bench.copy(bench.first, block, bench.b);
      if (waits) bench.second.wait(bench.first.record());
      block.reset();
      const Buffer same = bench.block();
      bench.copy(bench.second, bench.c, same);
    });
  };
  EXPECT_EQ(program(true).message, "");
  EXPECT_NE(program(false).message, "");
}

TEST(Races, TransfersTouchTheirBuffersUntilTheTicket) {
  EXPECT_EQ(races([](RaceBench& bench) {
              bench.second.wait(bench.gather(bench.first, bench.a, bench.b));
              bench.copy(bench.second, bench.b, bench.a);
            }).message,
            "");
  const RunError reads = races([](RaceBench& bench) {
    bench.gather(bench.first, bench.a, bench.b);
    bench.copy(bench.second, bench.b, bench.c);
  });
  EXPECT_TRUE(reads.says("'all_gather'") && reads.says("race_test.cc:")) << reads.message;
  EXPECT_NE(races([](RaceBench& bench) {
              bench.gather(bench.first, bench.a, bench.b);
              bench.copy(bench.second, bench.c, bench.a);
            }).message,
            "");
}

// Rank 0's streams know of each other through rank 1 alone: both barriers lead there.
TEST(Races, OrderGoesThroughPeers) {
  const auto program = [](bool peer_waits) {
    return races([peer_waits](RaceBench& bench) {
      const auto other = bench.environment.make_communicator("other", {0, 1});
      bench.copy(bench.first, bench.a, bench.b);
      const Ticket one = barrier({.communicator = *bench.world, .stream = bench.first});
      if (bench.environment.rank() == 1 && peer_waits) bench.second.wait(one);
      bench.second.wait(barrier({.communicator = *other, .stream = bench.second}));
      if (bench.environment.rank() == 0) bench.copy(bench.second, bench.b, bench.c);
      bench.finish();
    });
  };
  EXPECT_EQ(program(true).message, "");
  EXPECT_TRUE(program(false).says("rank 0"));
}

TEST(Races, HostReadsWhatItDidNotWaitFor) {
  const auto program = [](bool waits) {
    return races([waits](RaceBench& bench) {
      bench.copy(bench.first, bench.a, bench.b);
      if (waits) bench.environment.host().wait(bench.first.record());
      bench.environment.host().touches({bench.b.data(), kBytes, Access::read, "result"});
    });
  };
  EXPECT_EQ(program(true).message, "");
  EXPECT_TRUE(program(false).says("tests/sim/race_test.cc:"));
}

TEST(Races, LeakedTicket) {
  const RunError error =
      run_error({.ranks = 2, .races = Races::detected}, [](RankEnvironment& environment) {
        RaceBench bench(environment);
        const Event before = bench.first.record();
        bench.gather(bench.first, bench.a, bench.b);
        environment.host().yield("the transfer completes meanwhile");
        environment.host().wait(before);
      });
  EXPECT_EQ(error.exit_code, ExitCode::internal);
  EXPECT_TRUE(error.says("leaked ticket") && error.says("race_test.cc:")) << error.message;
}

TEST(Races, WaitsAreCountedAndImpliedOnesToldApart) {
  const ClusterReport report =
      run_cluster({.ranks = 2, .races = Races::detected}, [](RankEnvironment& environment) {
        RaceBench bench(environment);
        bench.copy(bench.first, bench.a, bench.b);
        bench.second.wait(bench.first.record());
        bench.second.wait(bench.first.record());
        bench.copy(bench.second, bench.b, bench.c);
        bench.finish();
      });
  ASSERT_EQ(report.races.waits.size(), 4u);
  EXPECT_EQ(report.races.accesses, 8);
  int64_t waits = 0, implied = 0;
  for (const WaitSite& site : report.races.waits) {
    waits += site.count;
    implied += site.implied;
    EXPECT_NE(site.name.find("race_test.cc:"), std::string::npos) << site.name;
  }
  EXPECT_EQ(waits, 8);
  EXPECT_EQ(implied, 2);
}

}  // namespace
}  // namespace cambium::sim
