// Collective mismatch: every field of the signature, found at arrival with both sites and values.
#include "tests/sim/run_error.h"

namespace cambium::sim {
namespace {

// Rank 1 posts a call that differs; the error names the communicator, the call's number, the field,
// both ranks and this file twice.
template <class Body>
void expect_mismatch(const std::string& field, Body&& body) {
  for (const uint64_t seed : {0, 1, 2, 3, 4, 5}) {
    const RunError error =
        run_error({.ranks = 3, .schedule_seed = seed}, [&](RankEnvironment& environment) {
          RankBench bench(environment);
          environment.set_step(7);
          bench.wait(bench.sum());
          body(bench, environment.rank() == 1);
        });
    EXPECT_EQ(error.exit_code, ExitCode::collective_mismatch) << error.message;
    EXPECT_TRUE(error.says("'world' [0,1,2]")) << error.message;
    EXPECT_TRUE(error.says("call #2")) << error.message;
    EXPECT_TRUE(error.says(field)) << error.message;
    EXPECT_TRUE(error.says("rank 1 post")) << error.message;
    EXPECT_TRUE(error.says("step 7")) << error.message;
    const size_t site = error.message.find("mismatch_test.cc:");
    EXPECT_NE(error.message.find("mismatch_test.cc:", site + 1), std::string::npos);
    EXPECT_EQ(error.says(fmt::format("schedule seed {}", seed)), seed != 0) << error.message;
  }
}

TEST(Mismatch, Op) {
  expect_mismatch("op ", [](RankBench& bench, bool differs) {
    if (differs) {
      bench.wait(broadcast({.communicator = *bench.world,
                            .stream = bench.stream,
                            .data = bench.recv.data(),
                            .count = 4}));
    } else {
      bench.wait(bench.sum());
    }
  });
}

TEST(Mismatch, Count) {
  expect_mismatch("count ",
                  [](RankBench& bench, bool differs) { bench.wait(bench.sum(differs ? 5 : 4)); });
}

TEST(Mismatch, ReduceOp) {
  expect_mismatch("reduce op ", [](RankBench& bench, bool differs) {
    bench.wait(reduce_scatter({.communicator = *bench.world,
                               .stream = bench.stream,
                               .send = bench.send.data(),
                               .recv = bench.recv.data(),
                               .count = 4,
                               .reduce = differs ? ReduceOp::max : ReduceOp::sum}));
  });
}

TEST(Mismatch, DTypeOfEqualBytes) {
  expect_mismatch("dtype ", [](RankBench& bench, bool differs) {
    bench.wait(all_gather({.communicator = *bench.world,
                           .stream = bench.stream,
                           .send = bench.send.data(),
                           .recv = bench.recv.data(),
                           .count = 4,
                           .dtype = differs ? DType::i32 : DType::f32}));
  });
}

TEST(Mismatch, Root) {
  expect_mismatch("root ", [](RankBench& bench, bool differs) {
    bench.wait(broadcast({.communicator = *bench.world,
                          .stream = bench.stream,
                          .data = bench.recv.data(),
                          .count = 4,
                          .root = differs ? 2 : 0}));
  });
}

TEST(Mismatch, VCountsOfOnePair) {
  expect_mismatch("rank 1 sends count 3 to rank 2, which expects count 2",
                  [](RankBench& bench, bool differs) {
                    const std::vector<int64_t> even = {2, 2, 2};
                    const std::vector<int64_t> other = {2, 2, 3};
                    bench.wait(all_to_all_v({.communicator = *bench.world,
                                             .stream = bench.stream,
                                             .send = bench.send.data(),
                                             .recv = bench.recv.data(),
                                             .send_counts = differs ? other : even,
                                             .recv_counts = even}));
                  });
}

TEST(Mismatch, OwnVCounts) {
  const RunError error = run_error({.ranks = 2}, [](RankEnvironment& environment) {
    RankBench bench(environment);
    const std::vector<int64_t> sends = {1, 2};
    const std::vector<int64_t> recvs = {2, 2};
    bench.wait(all_to_all_v({.communicator = *bench.world,
                             .stream = bench.stream,
                             .send = bench.send.data(),
                             .recv = bench.recv.data(),
                             .send_counts = sends,
                             .recv_counts = recvs}));
  });
  EXPECT_EQ(error.exit_code, ExitCode::collective_mismatch);
  EXPECT_TRUE(error.says("rank 0 sends count 1 to rank 0, which expects count 2")) << error.message;
}

// Found although the calls are posted without waiting and the peers' have not run.
TEST(Mismatch, SkippedCallIsNamed) {
  const RunError error = run_error({.ranks = 2}, [](RankEnvironment& environment) {
    RankBench bench(environment);
    bench.sum(4);
    if (environment.rank() != 1) bench.sum(8);
    bench.wait(bench.sum(6));
  });
  EXPECT_EQ(error.exit_code, ExitCode::collective_mismatch);
  EXPECT_TRUE(error.says("count 6 vs 8")) << error.message;
  EXPECT_TRUE(error.says("Rank 1's call #2 is rank 0's call #3: rank 1 skipped or reordered one"))
      << error.message;
}

template <class Change>
RunError exchange_error(const Change& change) {
  return run_error({.ranks = 2}, [&](RankEnvironment& environment) {
    RankBench bench(environment);
    const int peer = 1 - environment.rank();
    const Message sent{peer, bench.send.data(), 4};
    Message received{peer, bench.recv.data(), 4};
    ExchangeArgs args{.communicator = *bench.world,
                      .stream = bench.stream,
                      .sends = {&sent, 1},
                      .recvs = {&received, 1}};
    if (environment.rank() == 1) change(args, received);
    bench.wait(exchange(args));
  });
}

TEST(Mismatch, ExchangeCount) {
  const RunError error =
      exchange_error([](ExchangeArgs&, Message& received) { received.count = 3; });
  EXPECT_EQ(error.exit_code, ExitCode::collective_mismatch);
  EXPECT_TRUE(error.says("message #1 from rank 0 to rank 1: count 4 vs 3")) << error.message;
}

TEST(Mismatch, ExchangeDType) {
  const RunError error =
      exchange_error([](ExchangeArgs& args, Message&) { args.dtype = DType::i32; });
  EXPECT_EQ(error.exit_code, ExitCode::collective_mismatch);
  EXPECT_TRUE(error.says("dtype")) << error.message;
}

TEST(Mismatch, OverlappingBuffersAreRefused) {
  const RunError error = run_error({.ranks = 2}, [](RankEnvironment& environment) {
    RankBench bench(environment);
    bench.wait(all_gather({.communicator = *bench.world,
                           .stream = bench.stream,
                           .send = bench.recv.data() + 1,
                           .recv = bench.recv.data(),
                           .count = 4}));
  });
  EXPECT_EQ(error.exit_code, ExitCode::internal);
  EXPECT_TRUE(error.says("send and receive buffers overlap")) << error.message;
}

}  // namespace
}  // namespace cambium::sim
