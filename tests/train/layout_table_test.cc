// Contract D3 in four dimensions: layouts of pipeline, data, context and expert ranks, all sharding
// values and schedules, against one rank.
#include <gtest/gtest.h>

#include <span>

#include "tests/train/run_trace.h"

namespace cambium::test {

namespace {

constexpr int64_t kSteps = 2;
constexpr auto kGpipe = PipelineSchedule::gpipe;
constexpr auto kOneF = PipelineSchedule::one_f_one_b;
constexpr auto kInter = PipelineSchedule::interleaved_1f1b;
constexpr auto kZbH1 = PipelineSchedule::zb_h1;
constexpr auto kZbV = PipelineSchedule::zb_v;
constexpr auto kDual = PipelineSchedule::dualpipev;
constexpr auto kNone = Sharding::none, kZero1 = Sharding::zero1, kZero2 = Sharding::zero2,
               kFull = Sharding::full;

// Six layers: stages of uneven size. Sixteen sequences, so that eight micro-batches go through
// dualpipev at pp = 4.
Config deep_config() {
  Config config = tiny_config();
  config.model.layers = 6;
  config.train.global_batch_sequences = 16;
  config.train.sequence_length = 64;
  config.numerics.block_tokens = 8;
  return config;
}

// dp, ep, sequences of a micro-batch, sharding, workers, pp, cp, schedule.
constexpr TestLayout kPipelines[] = {
    {1, 1, 2, kZero1, 1, 2, 1, kGpipe}, {1, 1, 2, kNone, 2, 3, 1, kGpipe},
    {1, 1, 1, kZero1, 1, 2, 1, kOneF},  {2, 2, 1, kZero2, 2, 2, 1, kOneF},
    {1, 1, 4, kZero1, 1, 4, 1, kOneF},  {2, 1, 2, kFull, 1, 3, 1, kOneF},
    {1, 1, 1, kZero1, 2, 2, 1, kInter}, {2, 2, 1, kFull, 1, 2, 1, kInter},
    {1, 1, 4, kZero1, 1, 4, 1, kInter}, {1, 1, 1, kZero1, 1, 2, 1, kZbH1},
    {2, 2, 1, kZero2, 1, 2, 1, kZbH1},  {1, 1, 1, kNone, 2, 4, 1, kZbH1},
    {1, 1, 1, kZero1, 1, 2, 1, kZbV},   {2, 1, 2, kFull, 2, 2, 1, kZbV},
    {1, 1, 1, kZero1, 1, 3, 1, kZbV},   {1, 1, 1, kZero1, 1, 2, 1, kDual},
    {2, 2, 1, kZero2, 1, 2, 1, kDual},  {2, 2, 1, kFull, 2, 2, 1, kDual},
    {2, 1, 1, kZero1, 1, 4, 1, kDual},  {4, 4, 1, kFull, 1, 2, 1, kDual},
    {1, 1, 1, kFull, 1, 1, 1, kDual},   {2, 2, 8, kZero2, 1, 1, 1, kZbV},
};

constexpr TestLayout kContexts[] = {
    {1, 1, 16, kZero1, 1, 1, 2, kOneF}, {1, 2, 4, kNone, 2, 1, 2, kOneF},
    {2, 4, 1, kZero1, 1, 1, 2, kOneF},  {2, 1, 2, kZero2, 1, 1, 2, kOneF},
    {1, 4, 2, kFull, 2, 1, 4, kOneF},   {2, 8, 2, kFull, 1, 1, 4, kOneF},
    {4, 8, 1, kFull, 1, 1, 2, kOneF},   {2, 2, 8, kNone, 1, 1, 4, kOneF},
};

constexpr TestLayout kFourDimensions[] = {
    {1, 2, 2, kZero2, 1, 2, 2, kZbH1}, {2, 4, 1, kFull, 2, 2, 2, kDual},
    {1, 2, 2, kNone, 1, 3, 2, kGpipe}, {2, 2, 2, kZero1, 1, 2, 2, kInter},
    {1, 1, 2, kFull, 1, 2, 2, kZbV},   {2, 8, 1, kZero2, 2, 2, 4, kOneF},
    {2, 4, 1, kFull, 1, 4, 2, kDual},  {4, 8, 1, kFull, 2, 2, 2, kDual},
};

void expect_same_bits(const RunTrace& run, const RunTrace& one, const std::string& what) {
  ASSERT_EQ(run.steps.size(), one.steps.size());
  for (size_t i = 0; i < run.steps.size(); ++i) {
    EXPECT_EQ(run.steps[i].loss, one.steps[i].loss) << what;
    EXPECT_EQ(run.steps[i].balance_loss, one.steps[i].balance_loss) << what;
    EXPECT_EQ(run.steps[i].z_loss, one.steps[i].z_loss) << what;
    EXPECT_EQ(run.steps[i].grad_norm, one.steps[i].grad_norm) << what;
    EXPECT_EQ(run.steps[i].expert_load, one.steps[i].expert_load) << what;
    EXPECT_EQ(total_hex(run.steps[i]), total_hex(one.steps[i])) << what << " step " << i + 1;
  }
}

const RunTrace& one_rank() {
  static const RunTrace one = run_trace(with_layout(deep_config(), {}), kSteps);
  return one;
}

void expect_bits_of_one_rank(std::span<const TestLayout> layouts) {
  for (const TestLayout& layout : layouts) {
    const RunTrace run = run_trace(with_layout(deep_config(), layout), kSteps, layout.workers);
    expect_same_bits(run, one_rank(), layout_name(layout));
  }
}

TEST(LayoutTable, PipelinesHaveTheBitsOfOneRank) { expect_bits_of_one_rank(kPipelines); }
TEST(LayoutTable, SharedSequencesHaveTheBitsOfOneRank) { expect_bits_of_one_rank(kContexts); }
TEST(LayoutTable, FourDimensionsHaveTheBitsOfOneRank) { expect_bits_of_one_rank(kFourDimensions); }

}  // namespace

}  // namespace cambium::test
