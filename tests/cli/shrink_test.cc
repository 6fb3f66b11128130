// Shrinking, of failures made up for it: what is left cannot be reduced once more.
#include "src/cli/check_shrink.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace cambium {

namespace {

constexpr const char* kConfig = "configs/quickstart.toml";  // dp 8, ep 4, 4 layers

int64_t ranks_of(const Config& config) {
  return config.parallel.pp * config.parallel.dp * config.parallel.cp;
}

// Needs two ranks, two layers, a pause on the last rank, and the deviation 7:1.
CheckReport made_up_verdict(const CheckRequest& request) {
  const Config& config = request.config;
  CheckReport report;
  report.part = CheckPart::exact_schedules;
  report.schedule = request.schedule.empty() ? "3:1,7:1,9:2,12:1" : request.schedule;
  const bool pauses = std::ranges::any_of(config.faults, [&](const FaultConfig& fault) {
    return fault.kind == "pause" && fault.rank == ranks_of(config) - 1;
  });
  if (ranks_of(config) < 2 || config.model.layers < 2 || !pauses) return report;
  if (report.schedule.find("7:1") == std::string::npos) return report;
  report.exit_code = ExitCode::deadlock;
  report.failure = "made up";
  return report;
}

Repro shrunk(const std::vector<std::string>& sets, const std::string& schedule) {
  CheckReport failed;
  failed.part = CheckPart::exact_schedules;
  failed.exit_code = ExitCode::deadlock;
  failed.schedule = schedule;
  return shrink({.path = kConfig, .sets = sets, .failed = failed, .verdict = made_up_verdict});
}

TEST(Shrink, RemovesFaultsRanksLayersAndDeviations) {
  std::vector<std::string> sets{
      "faults=[{kind=\"slow_rank\",rank=3},{kind=\"pause\",rank=7,seconds=2},"
      "{kind=\"slow_link\",rank=5}]"};
  const Repro repro = shrunk(sets, "1:3,7:1,8:2,20:5,41:1");
  ASSERT_TRUE(repro.reproduces);
  EXPECT_EQ(repro.schedule, "7:1");
  sets.insert(sets.end(), repro.sets.begin(), repro.sets.end());
  const Config config = load_config(kConfig, sets);
  EXPECT_EQ(ranks_of(config), 2);
  EXPECT_EQ(config.model.layers, 2);
  ASSERT_EQ(config.faults.size(), 1u);
  EXPECT_EQ(config.faults.front().kind, "pause");
  EXPECT_EQ(config.faults.front().rank, 1);
  EXPECT_EQ(config.faults.front().seconds, 2);
  const std::vector<std::string> left = last_assignments(sets);
  for (const char* set :
       {"parallel.dp=2", "model.layers=2", "faults=[{kind=\"pause\",rank=1,seconds=2}]"}) {
    EXPECT_EQ(std::ranges::count(left, set), 1) << set;
  }
  EXPECT_EQ(left.size(), 4u);  // and parallel.ep
}

TEST(Shrink, LeavesAloneWhatDoesNotFailAgain) {
  const std::vector<std::string> sets{"faults=[{kind=\"pause\",rank=7}]"};
  const Repro repro = shrunk(sets, "1:3");
  EXPECT_FALSE(repro.reproduces);
  EXPECT_TRUE(repro.sets.empty());
  EXPECT_EQ(repro.schedule, "1:3");
}

}  // namespace

}  // namespace cambium
