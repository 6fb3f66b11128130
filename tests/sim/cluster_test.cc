// The scheduler and the environment: errors of ranks, unwinding, undefined memory, totals, orders.
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>

#include "tests/sim/run_error.h"

namespace cambium::sim {
namespace {

struct AddArgs {
  float* to;
  const float* from;
  int64_t count;
};
void add(const AddArgs& args, Workers& workers) {
  workers.parallel_for(4, [&](int64_t chunk, Scratch&) {
    for (int64_t i = chunk; i < args.count; i += 4) args.to[i] += args.from[i];
  });
}
void throw_error(const int& which, Workers&) {
  fail(ExitCode::non_finite, "op {} found a NaN", which);
}

TEST(Cluster, ErrorOfOneRankEndsTheRunAndUnwindsTheOthers) {
  struct Counter {
    explicit Counter(int& given) : count(given) { ++count; }
    ~Counter() { --count; }
    int& count;
  };
  int alive = 0;
  const RunError error = run_error({.ranks = 8}, [&](RankEnvironment& environment) {
    Counter counter(alive);
    RankBench bench(environment);
    environment.set_step(5);
    if (environment.rank() == 3) fail(ExitCode::bad_corpus, "no text");
    bench.wait(bench.sum());
  });
  EXPECT_EQ(error.exit_code, ExitCode::bad_corpus);
  EXPECT_EQ(error.message, "rank 3, step 5: no text");
  EXPECT_EQ(alive, 0);
}

TEST(Cluster, FailedOpIsReportedForTheLowestRank) {
  for (const int threads : {1, 2, 4}) {
    const RunError error =
        run_error({.ranks = 8, .worker_threads = threads}, [&](RankEnvironment& environment) {
          RankBench bench(environment);
          Stream& second = environment.make_stream("second");
          const int rank = environment.rank();
          if (rank >= 2) {
            second.enqueue("bad op", &throw_error, 100 + rank);
            bench.stream.enqueue("bad op", &throw_error, rank);
          }
          bench.wait(bench.sum());
        });
    EXPECT_EQ(error.exit_code, ExitCode::non_finite);
    EXPECT_EQ(error.message, "rank 2, step 0: op 2 found a NaN");
  }
}

TEST(Cluster, OtherExceptionsBecomeErrors) {
  EXPECT_EQ(run_error({.ranks = 2}, [](RankEnvironment&) { throw std::runtime_error("something"); })
                .exit_code,
            ExitCode::internal);
  EXPECT_EQ(run_error({.ranks = 2}, [](RankEnvironment&) { throw std::bad_alloc(); }).exit_code,
            ExitCode::out_of_memory);
}

TEST(Cluster, HandlersForErrorsDoNotSeeTheUnwinding) {
  const RunError error = run_error({.ranks = 2}, [](RankEnvironment& environment) {
    RankBench bench(environment);
    if (environment.rank() == 1) fail(ExitCode::io, "disk full");
    try {
      bench.wait(bench.sum());
    } catch (const std::exception& cause) {
      ADD_FAILURE() << "rank 0 caught " << cause.what();
    }
  });
  EXPECT_EQ(error.exit_code, ExitCode::io);
}

TEST(Cluster, WaitInsideCatchIsRefused) {
  const RunError error = run_error({.ranks = 2}, [](RankEnvironment& environment) {
    RankBench bench(environment);
    try {
      throw std::runtime_error("first");
    } catch (const std::exception&) {
      bench.wait(bench.sum());
    }
  });
  EXPECT_EQ(error.exit_code, ExitCode::internal);
  EXPECT_TRUE(error.says("current_exception")) << error.message;
}

TEST(Cluster, QueuedWorkAtReturnIsReported) {
  const RunError error = run_error({.ranks = 2}, [](RankEnvironment& environment) {
    RankBench bench(environment);
    bench.sum();
  });
  EXPECT_EQ(error.exit_code, ExitCode::internal);
  EXPECT_TRUE(error.says("1 tasks queued on stream 'rank 0 comm'")) << error.message;
}

TEST(Cluster, YieldLetsTheOthersRun) {
  std::vector<int> order;
  run_cluster({.ranks = 3}, [&](RankEnvironment& environment) {
    order.push_back(environment.rank());
    environment.host().yield("test");
    order.push_back(environment.rank());
  });
  EXPECT_EQ(order, (std::vector<int>{0, 1, 2, 0, 1, 2}));
}

TEST(Cluster, ReceiveBuffersArePoisonedUntilTheTicketCompletes) {
  run_cluster({.ranks = 2, .poison = Poison::on}, [](RankEnvironment& environment) {
    RankBench bench(environment);
    Stream& compute = environment.make_stream("compute");
    std::vector<float> seen(1);
    const auto read = [](const AddArgs& args, Workers&) { args.to[0] = args.from[0]; };
    const Ticket ticket = bench.sum();
    if (environment.rank() == 0) {
      // A reader that forgot `compute.wait(ticket)`: it runs while rank 1 has not posted.
      environment.host().wait(Ticket{});
      compute.enqueue("read", static_cast<void (*)(const AddArgs&, Workers&)>(read),
                      AddArgs{seen.data(), bench.recv.data(), 1});
    } else {
      environment.host().yield("post later");
    }
    bench.wait(ticket);
    bench.wait(compute.record());
    EXPECT_EQ(bench.recv[0], 2.0f);
  });
  // Rank 1 posts only after rank 0's stream has reached the call: the buffer is NaN then.
  run_cluster({.ranks = 2, .poison = Poison::on}, [](RankEnvironment& environment) {
    RankBench bench(environment);
    Stream& compute = environment.make_stream("compute");
    std::vector<float> seen(1);
    const auto read = [](const AddArgs& args, Workers&) { args.to[0] = args.from[0]; };
    if (environment.rank() == 1) {
      const float nothing = 0;
      compute.enqueue("read", static_cast<void (*)(const AddArgs&, Workers&)>(read),
                      AddArgs{seen.data(), &nothing, 1});
      bench.wait(compute.record());  // a compute phase in which rank 0's call waits
      bench.wait(bench.sum());
      return;
    }
    const Ticket ticket = bench.sum();
    environment.host().yield("rank 1 starts its phase");
    EXPECT_TRUE(std::isnan(bench.recv[0]));
    bench.wait(ticket);
    EXPECT_EQ(bench.recv[0], 2.0f);
  });
}

// Ops on three streams per rank with waits between them: one result for all workers and schedules.
std::vector<float> run_program(const ClusterOptions& options) {
  std::vector<float> result(static_cast<size_t>(options.ranks));
  run_cluster(options, [&](RankEnvironment& environment) {
    RankBench bench(environment);
    Stream& compute = environment.make_stream("compute");
    const int rank = environment.rank();
    for (size_t i = 0; i < bench.send.size(); ++i) {
      bench.send[i] = 1.0f / static_cast<float>(1 + rank * 7 + static_cast<int>(i));
    }
    Ticket ticket;
    for (int round = 0; round < 10; ++round) {
      ticket = bench.sum(64);
      compute.wait(ticket);
      compute.enqueue("add", &add, AddArgs{bench.send.data(), bench.recv.data(), 64});
      bench.stream.wait(compute.record());
      if (round % 3 == rank % 3) bench.wait(ticket);
    }
    bench.wait(compute.record());
    bench.wait(bench.stream.record());
    result[static_cast<size_t>(rank)] = std::accumulate(bench.send.begin(), bench.send.end(), 0.0f);
  });
  return result;
}

TEST(Cluster, SameBitsForWorkersAndSchedules) {
  const auto want = run_program({.ranks = 5, .worker_threads = 1});
  for (const int threads : {2, 3, 4}) {
    for (int repeat = 0; repeat < 20; ++repeat) {
      EXPECT_EQ(run_program({.ranks = 5, .worker_threads = threads}), want);
    }
  }
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    EXPECT_EQ(run_program({.ranks = 5, .worker_threads = 2, .schedule_seed = seed}), want);
  }
}

// Some transfers of explored schedules start late, in virtual time, so that those of two streams
// complete in either order on any rank; the tape holds that too.
TEST(Cluster, ExploredTransfersAreLateAndTheTapeReplaysIt) {
  struct Arrival {
    std::string* order;
    char name;
  };
  const auto note = [](const Arrival& arrival, Workers&) { *arrival.order += arrival.name; };
  std::string order;  // in which rank 0's two transfers completed
  const auto run = [&](const ClusterOptions& options) {
    order.clear();
    const ClusterReport report = run_cluster(options, [&](RankEnvironment& environment) {
      RankBench bench(environment);
      Stream& other_stream = environment.make_stream("other");
      const auto other = environment.make_communicator("other", bench.members);
      std::vector<float> second(64);
      std::string unseen;
      std::string* const arrived = environment.rank() == 0 ? &order : &unseen;
      bench.sum(64);
      bench.stream.enqueue("note", static_cast<void (*)(const Arrival&, Workers&)>(note),
                           Arrival{arrived, '1'});
      all_reduce({.communicator = *other,
                  .stream = other_stream,
                  .send = bench.send.data(),
                  .recv = second.data(),
                  .count = 64});
      other_stream.enqueue("note", static_cast<void (*)(const Arrival&, Workers&)>(note),
                           Arrival{arrived, '2'});
      bench.wait(bench.stream.record());
      bench.wait(other_stream.record());
    });
    return report.virtual_ns;
  };
  std::map<std::string, int64_t> late, in_time;
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    ScheduleTape tape;
    ClusterOptions options{.ranks = 2, .schedule_seed = seed, .record = &tape};
    if (seed % 2 == 0) options.exploration = Exploration::pct;
    const int64_t virtual_ns = run(options);
    const std::string drawn = order;
    ++(virtual_ns > 0 ? late : in_time)[drawn];
    EXPECT_EQ(run({.ranks = 2, .replay = &tape}), virtual_ns) << tape_text(tape);
    EXPECT_EQ(order, drawn) << tape_text(tape);
  }
  for (auto* const orders : {&late, &in_time}) {
    EXPECT_GT((*orders)["12"], 0);
    EXPECT_GT((*orders)["21"], 0);
  }
  EXPECT_EQ(run({.ranks = 2}), 0);
}

// What happens only when one rank does all of its many steps before another's first: random choices
// need 2^-24 of their schedules for it, priorities half of theirs.
TEST(Cluster, PrioritiesStarveARankAsRandomChoicesDoNot) {
  const auto found = [](Exploration exploration) {
    int64_t schedules = 0;
    for (uint64_t seed = 1; seed <= 100; ++seed) {
      const ClusterOptions options{.ranks = 2, .schedule_seed = seed, .exploration = exploration};
      bool began = false, starved = false;
      run_cluster(options, [&](RankEnvironment& environment) {
        RankBench bench(environment);
        for (int i = 0; i < 24; ++i) {
          bench.stream.enqueue("add", &add, AddArgs{bench.send.data(), bench.recv.data(), 4});
          bench.wait(bench.stream.record());
          if (environment.rank() == 0) began = true;
        }
        if (environment.rank() == 1 && !began) starved = true;
      });
      schedules += starved ? 1 : 0;
    }
    return schedules;
  };
  EXPECT_EQ(found(Exploration::random), 0);
  EXPECT_GE(found(Exploration::pct), 10);
}

TEST(Cluster, ASlowRankGoesOnOnlyWhenNoOtherCan) {
  const auto last_of = [](uint64_t seed, std::vector<int> slow) {
    ClusterOptions options{.ranks = 3, .schedule_seed = seed, .slow_ranks = std::move(slow)};
    if (seed % 2 == 0) options.exploration = Exploration::pct;
    int last = -1;
    run_cluster(options, [&](RankEnvironment& environment) {
      RankBench bench(environment);
      Stream& compute = environment.make_stream("compute");
      for (int i = 0; i < 4; ++i) {
        compute.enqueue("add", &add, AddArgs{bench.send.data(), bench.recv.data(), 4});
        bench.wait(compute.record());
      }
      last = environment.rank();
    });
    return last;
  };
  int64_t last_by_chance = 0;
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    EXPECT_EQ(last_of(seed, {1}), 1) << seed;
    last_by_chance += last_of(seed, {}) == 1 ? 1 : 0;
  }
  EXPECT_LT(last_by_chance, 40);
}

TEST(Cluster, TwoHundredRanks) {
  const ClusterReport report =
      run_cluster({.ranks = 200, .worker_threads = 2}, [](RankEnvironment& environment) {
        RankBench bench(environment);
        bench.wait(bench.sum(64));
        EXPECT_EQ(bench.recv[63], 200.0f);
      });
  EXPECT_EQ(report.tasks, 200);
  EXPECT_EQ(report.compute_phases, 1);
  EXPECT_EQ(report.fiber_switches, 400);
}

// fp32 and bf16 sums of numbers that round, against a plain loop in the same order.
float round_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return std::bit_cast<float>((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

void expect_order(ReductionOrder order, DType dtype) {
  constexpr int kRanks = 4;
  constexpr int64_t kCount = 37;
  const int64_t per_chunk = (kCount + kRanks - 1) / kRanks;
  const auto value = [&](int rank, int64_t i) {
    const float x = 1.0f / static_cast<float>(3 + rank * 11 + i);
    return dtype == DType::bf16 ? round_bf16(x) : x;
  };
  run_cluster({.ranks = kRanks, .reduction_order = order}, [&](RankEnvironment& environment) {
    RankBench bench(environment);
    std::vector<uint32_t> send(kCount), recv(kCount);
    const auto bits = [&](float x) { return std::bit_cast<uint32_t>(x); };
    for (int64_t i = 0; i < kCount; ++i) {
      const uint32_t word = bits(value(environment.rank(), i));
      if (dtype == DType::f32) {
        send[static_cast<size_t>(i)] = word;
      } else {
        reinterpret_cast<uint16_t*>(send.data())[i] = static_cast<uint16_t>(word >> 16);
      }
    }
    bench.wait(all_reduce({.communicator = *bench.world,
                           .stream = bench.stream,
                           .send = send.data(),
                           .recv = recv.data(),
                           .count = kCount,
                           .dtype = dtype}));
    for (int64_t i = 0; i < kCount; ++i) {
      const bool ring = order == ReductionOrder::ring;
      const int start = ring ? static_cast<int>(i / per_chunk + 1) % kRanks : 0;
      float sum = value(start, i);
      for (int hop = 1; hop < kRanks; ++hop) {
        sum += value((start + hop) % kRanks, i);
        if (ring && dtype == DType::bf16) sum = round_bf16(sum);
      }
      if (dtype == DType::bf16) sum = round_bf16(sum);
      const uint32_t got = dtype == DType::f32
                               ? recv[static_cast<size_t>(i)]
                               : uint32_t{reinterpret_cast<uint16_t*>(recv.data())[i]} << 16;
      EXPECT_EQ(got, bits(sum)) << i;
    }
  });
}

TEST(Cluster, ReductionOrders) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    expect_order(ReductionOrder::rank, dtype);
    expect_order(ReductionOrder::ring, dtype);
  }
}

TEST(Cluster, Totals) {
  run_cluster({.ranks = 4}, [](RankEnvironment& environment) {
    RankBench bench(environment);
    bench.sum(8);
    const std::vector<int64_t> sends(4, environment.rank());
    const std::vector<int64_t> recvs = {0, 1, 2, 3};
    bench.wait(all_to_all_v({.communicator = *bench.world,
                             .stream = bench.stream,
                             .send = bench.send.data(),
                             .recv = bench.recv.data(),
                             .send_counts = sends,
                             .recv_counts = recvs}));
    const CommTotals& reduced = bench.world->totals(CollectiveKind::all_reduce);
    EXPECT_EQ(reduced.calls, 1);
    EXPECT_EQ(reduced.sent_bytes, 2 * 3 * 8 * 4 / 4);  // 2 (n-1)/n of the buffer
    EXPECT_EQ(reduced.received_bytes, reduced.sent_bytes);
    const CommTotals& routed = bench.world->totals(CollectiveKind::all_to_all_v);
    EXPECT_EQ(routed.sent_bytes, 3 * environment.rank() * 4);
    EXPECT_EQ(routed.received_bytes, (6 - environment.rank()) * 4);
  });
}

}  // namespace
}  // namespace cambium::sim
