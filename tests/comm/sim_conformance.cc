// The conformance suite on the simulator: every case, then the same bits for any number of worker
// threads and any schedule, with undefined memory poisoned.
#include "gtest/gtest.h"
#include "sim/cluster.h"
#include "tests/comm/conformance.h"

namespace cambium::conformance {
namespace {

uint64_t run_on_cluster(const Case& test, sim::ClusterOptions options) {
  options.ranks = test.ranks;
  options.poison = Poison::on;
  std::vector<uint64_t> hashes(static_cast<size_t>(test.ranks));
  sim::run_cluster(options, [&](RankEnvironment& environment) {
    hashes[static_cast<size_t>(environment.rank())] =
        run_cases(environment, {&test, 1}, host_memory());
  });
  uint64_t all = 0;
  for (const uint64_t hash : hashes) all = all * 0x9e3779b97f4a7c15u + hash;
  return all;
}

// Every n-th case in sanitizer builds, which are slow and look at memory, not at values.
std::vector<Case> selected_cases() {
  std::vector<Case> cases = all_cases(8);
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  std::vector<Case> some;
  for (size_t i = 0; i < cases.size(); i += 7) some.push_back(cases[i]);
  return some;
#else
  return cases;
#endif
}

class SimConformance : public testing::TestWithParam<Case> {};

TEST_P(SimConformance, MatchesOracle) { run_on_cluster(GetParam(), {.worker_threads = 2}); }

TEST_P(SimConformance, RingOrderMatchesOracle) {
  run_on_cluster(GetParam(), {.worker_threads = 2, .reduction_order = sim::ReductionOrder::ring});
}

INSTANTIATE_TEST_SUITE_P(AllCases, SimConformance, testing::ValuesIn(selected_cases()),
                         [](const auto& info) { return info.param.name(); });

TEST(SimConformance, EnoughCases) {
  EXPECT_GE(all_cases(8).size(), 100u);
  EXPECT_GE(all_cases(2).size(), 50u);
}

TEST(SimConformance, SameBitsForWorkersAndSchedules) {
  for (const Case& test : selected_cases()) {
    if (test.count > 13) continue;
    const uint64_t want = run_on_cluster(test, {.worker_threads = 1});
    EXPECT_EQ(run_on_cluster(test, {.worker_threads = 4}), want) << test.name();
    for (uint64_t seed = 1; seed <= 20; ++seed) {
      EXPECT_EQ(run_on_cluster(test, {.schedule_seed = seed}), want) << test.name() << seed;
    }
  }
}

// The oracle is able to fail: a rank that transfers something else is found.
TEST(SimConformance, OracleFindsWrongElement) {
  const Case test{Subject::broadcast_first, 2, DType::f32, 13, Placement::apart};
  try {
    sim::run_cluster({.ranks = 2}, [&](RankEnvironment& environment) {
      const Memory memory = host_memory();
      if (environment.rank() == 1) {
        run_cases(environment, {&test, 1}, memory);
        return;
      }
      std::vector<float> wrong(13, 99.0f);
      Stream& stream = environment.make_stream("wrong");
      const auto world = environment.make_communicator("world", {0, 1});
      environment.host().wait(broadcast({.communicator = *world,
                                         .stream = stream,
                                         .data = wrong.data(),
                                         .count = 13,
                                         .dtype = DType::f32,
                                         .root = 0}));
    });
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.exit_code(), ExitCode::verification_mismatch);
    EXPECT_NE(std::string(error.what()).find("got 99"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace cambium::conformance
