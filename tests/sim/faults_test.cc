// Injected communicator faults: each ends the run with a message that names the cause.
#include "tests/sim/run_error.h"

namespace cambium::sim {
namespace {

// Three steps of a small program with the collectives of a training step: counts, dispatch and
// combine in expert groups of two, one reduction and one gather over all.
void train_like(RankEnvironment& environment) {
  RankBench bench(environment);
  const int first = environment.rank() / 2 * 2;
  const auto expert = environment.make_communicator("ep", {first, first + 1});
  const std::vector<int64_t> rows = {3, 3};
  const std::vector<int64_t> none = {0, 0};
  std::vector<int64_t> counts(2), all_counts(4);
  const auto dispatch = [&](DType dtype, const std::vector<int64_t>& count,
                            std::source_location site = std::source_location::current()) {
    return all_to_all_v({.communicator = *expert,
                         .stream = bench.stream,
                         .send = bench.send.data(),
                         .recv = bench.recv.data(),
                         .send_counts = count,
                         .recv_counts = count,
                         .dtype = dtype,
                         .site = site});
  };
  for (int64_t step = 1; step <= 3; ++step) {
    environment.set_step(step);
    bench.wait(all_gather({.communicator = *expert,
                           .stream = bench.stream,
                           .send = counts.data(),
                           .recv = all_counts.data(),
                           .count = 2,
                           .dtype = DType::i64}));
    dispatch(DType::f32, rows);
    dispatch(DType::f32, none);
    bench.sum(8);
    bench.wait(all_gather({.communicator = *bench.world,
                           .stream = bench.stream,
                           .send = bench.send.data(),
                           .recv = bench.recv.data(),
                           .count = 4}));
  }
}

ClusterOptions with_fault(CommFault fault) {
  ClusterOptions options;
  options.ranks = 4;
  options.faults = {std::move(fault)};
  return options;
}

TEST(CommFaults, NoneIsClean) { EXPECT_EQ(run_error({.ranks = 4}, train_like).message, ""); }

TEST(CommFaults, WrongCountOfAnyCall) {
  for (int64_t call = 0; call < 5; ++call) {
    const RunError error = run_error(with_fault({.kind = CommFaultKind::wrong_count,
                                                 .rank = 2,
                                                 .step = 2,
                                                 .communicator = "",
                                                 .skip_calls = call}),
                                     train_like);
    EXPECT_EQ(error.exit_code, ExitCode::collective_mismatch) << error.message;
    EXPECT_TRUE(error.says("count")) << error.message;
    EXPECT_TRUE(error.says("rank 2")) << error.message;
    EXPECT_TRUE(error.says("step 2")) << error.message;
  }
}

TEST(CommFaults, SwapWithinOneCommunicator) {
  const RunError error = run_error(with_fault({.kind = CommFaultKind::swapped_collectives,
                                               .rank = 1,
                                               .step = 2,
                                               .communicator = "world"}),
                                   train_like);
  EXPECT_EQ(error.exit_code, ExitCode::collective_mismatch) << error.message;
  EXPECT_TRUE(error.says("op all_gather vs all_reduce") ||
              error.says("op all_reduce vs all_gather"))
      << error.message;
  EXPECT_TRUE(error.says("rank 1")) << error.message;
  EXPECT_TRUE(error.says("skipped or reordered one") || error.says("The call sites differ"))
      << error.message;
}

TEST(CommFaults, SwapOfTwoCommunicatorsOnAnyRank) {
  for (int rank = 0; rank < 4; ++rank) {
    const RunError error =
        run_error(with_fault({.kind = CommFaultKind::swapped_collectives, .rank = rank, .step = 1}),
                  train_like);
    EXPECT_EQ(error.exit_code, ExitCode::deadlock) << error.message;
    EXPECT_TRUE(error.says("cycle of ranks")) << error.message;
    EXPECT_TRUE(error.says("another order")) << error.message;
  }
}

TEST(CommFaults, SkippedCollective) {
  for (int rank = 0; rank < 4; ++rank) {
    for (const uint64_t seed : {0, 1, 2}) {
      ClusterOptions options =
          with_fault({.kind = CommFaultKind::skipped_collective, .rank = rank, .step = 3});
      options.schedule_seed = seed;
      const RunError error = run_error(options, train_like);
      EXPECT_TRUE(error.exit_code == ExitCode::collective_mismatch ||
                  error.exit_code == ExitCode::deadlock)
          << error.message;
      EXPECT_TRUE(error.says("'ep'")) << error.message;
      EXPECT_TRUE(error.says(fmt::format("rank {}", rank))) << error.message;
    }
  }
}

TEST(CommFaults, LastCallSkippedIsMissing) {
  const RunError error = run_error(with_fault({.kind = CommFaultKind::skipped_collective,
                                               .rank = 3,
                                               .step = 3,
                                               .communicator = "world",
                                               .skip_calls = 1}),
                                   train_like);
  // Rank 3 goes on without its last ticket, so its stream still holds the call before.
  EXPECT_NE(error.exit_code, ExitCode::done);
  EXPECT_TRUE(error.says("rank 3")) << error.message;
}

TEST(CommFaults, WithoutAPlaceIsAnError) {
  const RunError error =
      run_error(with_fault({.kind = CommFaultKind::wrong_count, .rank = 0, .step = 9}), train_like);
  EXPECT_EQ(error.exit_code, ExitCode::usage);
  EXPECT_TRUE(error.says("wrong_count on rank 0 at step 9 found no call to strike"))
      << error.message;
}

// Virtual time is that of the delays on the way to the end, and passes for nothing else.
TEST(CommFaults, DelaysTakeVirtualTimeInAnySchedule) {
  constexpr int64_t kSecond = 1'000'000'000;
  const struct {
    CommFaultKind kind;
    const char* communicator;
    int64_t want_ns;
  } cases[] = {
      {CommFaultKind::pause, "", 7 * kSecond},
      {CommFaultKind::slow_link, "world", 2 * 7 * kSecond},  // two calls of the step
      {CommFaultKind::flapping_link, "world", 7 * kSecond},  // the first of the two
      {CommFaultKind::slow_link, "", 5 * 7 * kSecond},
      {CommFaultKind::flapping_link, "", 3 * 7 * kSecond},
  };
  for (const auto& row : cases) {
    for (const uint64_t seed : {0, 1, 2, 3}) {
      ClusterOptions options = with_fault({.kind = row.kind,
                                           .rank = 1,
                                           .step = 2,
                                           .communicator = row.communicator,
                                           .delay_ns = 7 * kSecond});
      options.schedule_seed = seed;
      // An explored schedule adds latencies of its own, far below a millisecond each.
      const int64_t virtual_ns = run_cluster(options, train_like).virtual_ns;
      const std::string what =
          fmt::format("{} '{}' seed {}", comm_fault_name(row.kind), row.communicator, seed);
      EXPECT_GE(virtual_ns, row.want_ns) << what;
      EXPECT_LE(virtual_ns, row.want_ns + (seed == 0 ? 0 : kSecond / 1000)) << what;
      options.watchdog_ns = 6 * kSecond;
      const RunError error = run_error(options, train_like);
      EXPECT_EQ(error.exit_code, ExitCode::watchdog) << error.message;
      EXPECT_TRUE(error.says("longer than 6 s of virtual time: rank 1")) << error.message;
    }
  }
  EXPECT_EQ(run_cluster({.ranks = 4}, train_like).virtual_ns, 0);
}

TEST(CommFaults, Names) {
  for (const char* name : {"wrong_count", "swapped_collectives", "skipped_collective", "pause",
                           "slow_link", "flapping_link"}) {
    EXPECT_STREQ(comm_fault_name(comm_fault_kind(name)), name);
  }
  EXPECT_THROW(comm_fault_kind("rng_rank"), Error);
}

}  // namespace
}  // namespace cambium::sim
