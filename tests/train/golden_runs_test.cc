// Contract D1 over machines and time: three 20-step runs have the digests in tests/golden_runs/.
//
// A change that is meant to change bits deletes the file: this test then writes it anew, and fails
// once, so that nobody renews a golden by accident.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "tests/train/run_trace.h"
#include "tests/tree.h"

namespace cambium::test {

namespace {

constexpr int64_t kGoldenSteps = 20;

std::string describe(const RunTrace& run) {
  std::string text;
  for (size_t i = 0; i < run.steps.size(); ++i) {
    text += fmt::format("step {} loss {:a} norm {:a} digest {}\n", i + 1, run.steps[i].loss,
                        run.steps[i].grad_norm, total_hex(run.steps[i]));
  }
  return text;
}

void expect_golden(const std::string& name, const Config& config) {
  const std::string path = std::string(source_directory()) + "/tests/golden_runs/" + name + ".txt";
  const std::string text = describe(run_trace(config, kGoldenSteps, 2));
  if (!std::filesystem::exists(path)) {
    std::ofstream(path) << text;
    FAIL() << path << " did not exist and was written; look at it and commit it";
  }
  std::ostringstream golden;
  golden << std::ifstream(path).rdbuf();
  EXPECT_EQ(text, golden.str()) << name;
}

TEST(GoldenRuns, ExactOneRank) {
  expect_golden("exact_dp1", with_layout(tiny_config(), {1, 1, 8, Sharding::none, 1}));
}

TEST(GoldenRuns, FastDp4Ep2) {
  Config config = with_layout(tiny_config(), {4, 2, 1, Sharding::zero1, 1});
  config.numerics.reduction = ReductionMode::fast;
  expect_golden("fast_dp4_ep2", config);
}

TEST(GoldenRuns, Bf16Dp2) {
  Config config = with_layout(tiny_config(), {2, 1, 2, Sharding::zero1, 1});
  config.numerics.compute = ComputeType::bf16;
  expect_golden("bf16_dp2", config);
}

}  // namespace

}  // namespace cambium::test
