// Contract D3 in four dimensions: layouts of pipeline, data, context and expert ranks, all sharding
// values and schedules, against one rank.
#include <gtest/gtest.h>

#include <span>

#include "src/checkpoint/checkpoint.h"
#include "src/train/train_run.h"
#include "tests/checkpoint/checkpoint_testing.h"
#include "tests/train/run_trace.h"

namespace cambium::test {

namespace {

constexpr int64_t kTableSteps = 5;
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

const RunTrace& one_rank() {
  static const RunTrace one = run_trace(with_layout(deep_config(), {}), kTableSteps);
  return one;
}

// No rank computes what another did: FLOPs of all ranks are one rank's. `clip_scale` folds a small
// table on every rank; with sharding none all ranks optimize everything, else each of the copies
// is.
void expect_same_work(const RunTrace& run, const std::string& what, int64_t copies = 1) {
  for (const auto& [op, want] : one_rank().ranks[0].ops) {
    if (op == "clip_scale") continue;
    const int64_t times = op == "adamw" ? copies : 1;
    int64_t flops = 0;
    for (const RankUse& rank : run.ranks) {
      const auto found = rank.ops.find(op);
      if (found != rank.ops.end()) flops += found->second.flops;
    }
    EXPECT_EQ(flops, times * want.flops) << op << ", " << what;
  }
}

void expect_bits_of_one_rank(std::span<const TestLayout> layouts) {
  for (const TestLayout& layout : layouts) {
    SCOPED_TRACE(layout_name(layout));
    const RunTrace run = run_trace(with_layout(deep_config(), layout), kTableSteps, layout.workers);
    expect_same_bits(run, one_rank(), layout_name(layout));
    if (layout.sharding == Sharding::none) continue;
    const int64_t copies = layout.shard_ranks == 0 ? 1 : layout.dp * layout.cp / layout.shard_ranks;
    expect_same_work(run, layout_name(layout), copies);
  }
}

TEST(LayoutTable, PipelinesHaveTheBitsOfOneRank) { expect_bits_of_one_rank(kPipelines); }
TEST(LayoutTable, SharedSequencesHaveTheBitsOfOneRank) { expect_bits_of_one_rank(kContexts); }
TEST(LayoutTable, RingsHaveTheBitsOfOneRank) {
  std::vector<TestLayout> rings(std::begin(kContexts), std::end(kContexts));
  rings.insert(rings.end(), std::begin(kFourDimensions), std::end(kFourDimensions));
  for (TestLayout& layout : rings) layout.context = ContextExchange::ring;
  expect_bits_of_one_rank(rings);
}
TEST(LayoutTable, FourDimensionsHaveTheBitsOfOneRank) { expect_bits_of_one_rank(kFourDimensions); }

// Sharding within runs of ranks, the last field, and copies of the state over the runs (HSDP).
constexpr auto kGather = ContextExchange::all_gather;
constexpr TestLayout kCopies[] = {
    {4, 2, 2, kZero1, 1, 1, 1, kOneF, kGather, 2},  {4, 1, 1, kZero2, 1, 1, 1, kOneF, kGather, 2},
    {4, 2, 1, kFull, 2, 1, 1, kOneF, kGather, 2},   {8, 2, 1, kFull, 2, 1, 1, kOneF, kGather, 4},
    {8, 4, 1, kZero2, 1, 1, 1, kOneF, kGather, 4},  {4, 2, 1, kZero1, 1, 2, 1, kZbH1, kGather, 2},
    {4, 2, 1, kFull, 1, 1, 2, kOneF, kGather, 4},   {4, 4, 1, kZero2, 1, 2, 2, kDual, kGather, 4},
    {2, 1, 1, kZero1, 1, 3, 2, kZbV, kGather, 2},   {4, 1, 2, kZero1, 1, 1, 1, kOneF, kGather, 1},
    {4, 1, 1, kFull, 1, 1, 1, kOneF, kGather, 1},   {2, 2, 1, kFull, 2, 4, 2, kDual, kGather, 2},
    {16, 8, 1, kFull, 2, 1, 4, kOneF, kGather, 16},
};
TEST(LayoutTable, CopiesOfShardedStateHaveTheBitsOfOneRank) { expect_bits_of_one_rank(kCopies); }

TEST(LayoutTable, CopiesOfShardedStateServeATiedHead) {
  Config config = deep_config();
  config.model.tie_embeddings = true;
  const RunTrace one = run_trace(with_layout(config, {}), kTableSteps);
  for (const TestLayout& layout : {kCopies[0], kCopies[1], kCopies[2]}) {
    expect_same_bits(run_trace(with_layout(config, layout), kTableSteps), one, layout_name(layout));
  }
}

// A tied embedding lies on the first pipeline rank, its head on the last.
constexpr TestLayout kTiedEnds[] = {
    {1, 1, 2, kNone, 1, 2, 1, kGpipe},
    {2, 2, 1, kZero1, 2, 2, 1, kOneF},
    {2, 1, 2, kZero2, 1, 3, 1, kOneF},
    {2, 2, 1, kFull, 1, 2, 1, kInter},
    {1, 1, 1, kZero1, 1, 4, 1, kZbH1},
    {2, 4, 1, kFull, 2, 2, 2, kZbH1},
    {1, 2, 2, kNone, 1, 3, 2, kGpipe, ContextExchange::ring},
    {4, 2, 1, kFull, 1, 2, 1, kOneF, kGather, 2},
    {4, 2, 1, kZero1, 1, 2, 1, kZbH1, kGather, 2},
};

TEST(LayoutTable, ATiedHeadOnAnotherRankHasTheBitsOfOneRank) {
  for (const ComputeType compute : {ComputeType::fp32, ComputeType::bf16}) {
    Config config = deep_config();
    config.model.tie_embeddings = true;
    config.numerics.compute = compute;
    const RunTrace one = run_trace(with_layout(config, {}), kTableSteps);
    for (const TestLayout& layout : kTiedEnds) {
      const RunTrace run = run_trace(with_layout(config, layout), kTableSteps, layout.workers);
      expect_same_bits(run, one, layout_name(layout));
    }
  }
}

TEST(LayoutTable, ATiedHeadOnAnotherRankStaysCloseInFastMode) {
  Config config = deep_config();
  config.model.tie_embeddings = true;
  const RunTrace one = run_trace(with_layout(config, {}), 3);
  config.numerics.reduction = ReductionMode::fast;
  for (const TestLayout& layout : kTiedEnds) {
    const RunTrace run = run_trace(with_layout(config, layout), 3, layout.workers);
    for (size_t i = 0; i < run.steps.size(); ++i) {
      // Sums of a thousand terms in another order; AdamW makes an error ten times as large a step.
      EXPECT_NEAR(run.steps[i].loss / one.steps[i].loss, 1.0, 1e-6) << layout_name(layout);
      EXPECT_NEAR(run.steps[i].grad_norm / one.steps[i].grad_norm, 1.0, 1e-4);
    }
  }
}

// A step moves the head's gradient one way and the weights the other, each once a data rank; with
// `full` the weights' shards.
TEST(LayoutTable, ATiedHeadOnAnotherRankMovesTheDesignsBytes) {
  const auto sent = [](const TestLayout& layout, bool tied) {
    Config config = with_layout(deep_config(), layout);
    config.model.tie_embeddings = tied;
    std::vector<int64_t> bytes;
    const auto steps = [&](int64_t count) { return run_trace(config, count).ranks; };
    const std::vector<RankUse> two = steps(2), three = steps(3);
    for (size_t i = 0; i < two.size(); ++i) {
      bytes.push_back(three[i].pipeline_exchange.sent_bytes - two[i].pipeline_exchange.sent_bytes);
    }
    return bytes;
  };
  const ModelConfig& model = deep_config().model;
  const int64_t whole = 4 * model.vocab * model.hidden;
  for (const Sharding sharding : {kZero1, kFull}) {
    const TestLayout layout{2, 1, 2, sharding, 1, 3, 1, kOneF};
    const std::vector<int64_t> tied = sent(layout, true), untied = sent(layout, false);
    const int64_t to_head = tied[0] + tied[1] - untied[0] - untied[1];
    constexpr int64_t kShards = 2 * (4 * 2 * 4096);  // of whole blocks
    EXPECT_EQ(to_head, sharding == kFull ? kShards : 2 * whole);
    for (const size_t rank : {2u, 3u}) EXPECT_EQ(tied[rank], untied[rank]);
    for (const size_t rank : {4u, 5u}) EXPECT_EQ(tied[rank], untied[rank] + whole);
  }
}

// Weights are gathered within a copy alone: by two ranks half of them each, not by four a quarter.
// Between copies a rank's shard of each group's gradients travels, once a step.
TEST(LayoutTable, CopiesOfShardedStateMoveTheDesignsBytes) {
  const auto uses = [](int64_t shard_ranks) {
    Config config =
        with_layout(deep_config(), {4, 2, 1, kFull, 1, 1, 1, kOneF, kGather, shard_ranks});
    config.numerics.reduction = ReductionMode::fast;
    return run_trace(config, 1).ranks;
  };
  const std::vector<RankUse> two = uses(2), one = uses(0);
  for (size_t i = 0; i < two.size(); ++i) {
    EXPECT_EQ(3 * two[i].shard_gather.sent_bytes, 2 * one[i].data_gather.sent_bytes);
    EXPECT_EQ(two[i].data_gather.sent_bytes, 0);
    EXPECT_EQ(two[i].copies_reduce.calls, 8);  // embedding, head and six layers
    EXPECT_GT(two[i].weight_bytes, one[i].weight_bytes);
    EXPECT_LE(two[i].optimizer_bytes, 2 * one[i].optimizer_bytes);
  }
}

struct PipelineShape {
  int64_t pp;
  PipelineSchedule schedule;
};
constexpr PipelineShape kShapes[] = {{1, kOneF}, {2, kGpipe}, {2, kOneF}, {2, kInter},
                                     {2, kZbH1}, {2, kZbV},   {2, kDual}, {3, kOneF},
                                     {3, kZbV},  {4, kGpipe}, {4, kZbH1}, {4, kDual}};
constexpr int64_t kDataAndContext[][2] = {{1, 1}, {2, 1}, {1, 2}, {2, 2}, {1, 4},
                                          {4, 1}, {2, 4}, {4, 2}, {8, 1}, {8, 2}};

// Up to 64 ranks; sharding, expert ranks, micro-batches and workers go round.
std::vector<TestLayout> many_layouts() {
  std::vector<TestLayout> all;
  int64_t turn = 0;
  for (const PipelineShape& shape : kShapes) {
    for (const auto& [dp, cp] : kDataAndContext) {
      for (const Sharding sharding : {kNone, kZero1, kZero2, kFull}) {
        ++turn;
        TestLayout layout{dp,
                          int64_t{1} << turn % 4,
                          int64_t{1} << turn / 3 % 3,
                          sharding,
                          1 + turn % 3,
                          shape.pp,
                          cp,
                          shape.schedule,
                          turn % 2 == 0 ? ContextExchange::ring : ContextExchange::all_gather};
        layout.ep = std::min(layout.ep, dp * cp);
        const MicroBatchNeed need = schedule_need(shape.schedule, shape.pp);
        const auto fits = [&] {
          const int64_t sequences = 16 / dp, micro_batches = sequences / layout.micro_batch;
          return micro_batches >= need.least && micro_batches % need.multiple == 0;
        };
        while (layout.micro_batch > 1 && !fits()) layout.micro_batch /= 2;
        if (fits() && shape.pp * dp * cp <= 64) all.push_back(layout);
      }
    }
  }
  return all;
}

// Every third of them: at least a hundred, over five steps.
TEST(LayoutTable, HundredLayoutsHaveTheBitsOfOneRank) {
  const std::vector<TestLayout> all = many_layouts();
  ASSERT_GE(all.size(), 300u);
  std::vector<TestLayout> some;
  for (size_t i = 0; i < all.size(); i += 3) some.push_back(all[i]);
  ASSERT_GE(some.size(), 100u);
  expect_bits_of_one_rank(some);
}

// Every table above and every `stride`-th of the many.
std::vector<TestLayout> all_tables(size_t stride) {
  std::vector<TestLayout> all;
  for (const std::span<const TestLayout> table :
       {std::span<const TestLayout>(kPipelines), std::span<const TestLayout>(kContexts),
        std::span<const TestLayout>(kFourDimensions), std::span<const TestLayout>(kCopies)}) {
    all.insert(all.end(), table.begin(), table.end());
  }
  const std::vector<TestLayout> many = many_layouts();
  for (size_t i = 0; i < many.size(); i += stride) all.push_back(many[i]);
  return all;
}

// Optimizer, selection biases and lagged loads travel too.
Config chain_config(int64_t steps) {
  Config config = deep_config();
  config.model.tie_embeddings = true;
  config.train.steps = steps;
  config.checkpoint.keep = 1;
  config.balance.loss = BalanceLoss::global_batch_lagged;
  config.balance.bias_update_rate = 0.01;
  return config;
}

// One step from the checkpoint of the step before it, saved again.
StepResult step_of_chain(const Config& config, const TestLayout& layout, int64_t now,
                         const std::string& directory) {
  const Derived derived = derive(config);
  const SyntheticSequences source(config);
  FileSystem files;
  std::unique_ptr<CheckpointReader> reader;
  if (now > 1) {
    reader = std::make_unique<CheckpointReader>(
        files, checkpoint_path(checkpoint_directory(directory), now - 1),
        ShardCheck::at_first_read);
  }
  TrainRun run;
  run.config = &config;
  run.directory = directory;
  run.files = &files;
  StepResult result;
  launch_ranks({.ranks = derived.ranks, .workers = layout.workers, .poison = Poison::on},
               [&](RankEnvironment& environment) {
                 Rank rank(config, environment);
                 TrainStep step(rank, config.model);
                 if (reader == nullptr) {
                   step.model().initialize(config.run.seed);
                 } else {
                   load_checkpoint(step, *reader);
                 }
                 rank.step = now;
                 environment.set_step(now);
                 step.accumulate(source, now - 1);
                 const StepResult mine =
                     step.update(now, learning_rate(config, derived, now), WithDigests::yes);
                 if (rank.is_first()) result = mine;
                 save_checkpoint(step, run, now);
               });
  return result;
}

// Step n runs in layout n, from what layout n - 1 saved.
void expect_checkpoint_passes(const std::vector<TestLayout>& layouts) {
  const TemporaryDirectory directory;
  FileSystem().make_directories(checkpoint_directory(directory.path()));
  const Config config = chain_config(std::ssize(layouts));
  const RunTrace one = run_trace(with_layout(config, {}), std::ssize(layouts));
  for (size_t i = 0; i < layouts.size(); ++i) {
    const auto now = static_cast<int64_t>(i) + 1;
    SCOPED_TRACE(fmt::format("step {}: {}", now, layout_name(layouts[i])));
    const StepResult got =
        step_of_chain(with_layout(config, layouts[i]), layouts[i], now, directory.path());
    const StepResult& want = one.steps[i];
    ASSERT_EQ(got.loss, want.loss);
    ASSERT_EQ(got.balance_loss, want.balance_loss);
    ASSERT_EQ(got.grad_norm, want.grad_norm);
    ASSERT_EQ(got.expert_load, want.expert_load);
    ASSERT_EQ(total_hex(got), total_hex(want));
  }
}

TEST(LayoutTable, OneCheckpointPassesThroughMoreThanAHundredLayouts) {
  const std::vector<TestLayout> layouts = all_tables(3);
  ASSERT_GE(layouts.size(), 150u);
  expect_checkpoint_passes(layouts);
}

// On request: --gtest_also_run_disabled_tests.
TEST(LayoutTable, DISABLED_OneCheckpointPassesThroughAllOfManyLayouts) {
  expect_checkpoint_passes(all_tables(1));
}
TEST(LayoutTable, DISABLED_AllOfManyLayoutsHaveTheBitsOfOneRank) {
  expect_bits_of_one_rank(many_layouts());
}

TEST(LayoutTable, OtherPartsOfTheModelToo) {
  std::vector<Config> configs(8, deep_config());
  configs[0].numerics.compute = ComputeType::bf16;
  configs[1].model.tie_embeddings = true;
  configs[2].model.family = ModelFamily::olmoe;
  configs[2].model.qk_norm = QkNorm::full_width;
  configs[2].balance.bias_update_rate = 0.01;
  configs[3].balance.loss = BalanceLoss::global_batch_lagged;
  configs[3].data.document_mask = false;
  configs[4].optimizer.state_dtype = ComputeType::bf16;
  configs[5].model.dense_layers = {0, 1, 3};  // a stage without experts among them
  configs[5].model.dense_hidden = 40;
  configs[5].model.attention_bias = true;
  configs[5].model.sliding_window = 20;
  configs[5].balance.loss = BalanceLoss::global_batch_lagged;
  configs[6].model.shared_expert_hidden = 24;
  configs[6].model.shared_expert_gate = true;
  configs[7].model.shared_expert_hidden = 24;
  configs[7].recompute.mode = RecomputeMode::full_layer;
  for (const Config& config : configs) {
    const RunTrace one = run_trace(with_layout(config, {}), kTableSteps);
    for (const TestLayout& layout :
         {TestLayout{2, 4, 1, kFull, 1, 2, 2, kDual}, TestLayout{2, 2, 1, kNone, 1, 2, 2, kZbV}}) {
      expect_same_bits(run_trace(with_layout(config, layout), kTableSteps), one,
                       layout_name(layout));
    }
  }
}

TEST(LayoutTable, FastModeRepeatsItselfAndStaysClose) {
  Config config = deep_config();
  config.numerics.reduction = ReductionMode::fast;
  for (const TestLayout& layout :
       {TestLayout{2, 4, 1, kFull, 1, 2, 2, kDual}, TestLayout{2, 2, 1, kZero2, 1, 2, 1, kZbH1},
        TestLayout{2, 1, 2, kNone, 1, 1, 2, kOneF},
        TestLayout{1, 2, 4, kZero1, 1, 1, 4, kOneF, ContextExchange::ring},
        TestLayout{2, 4, 1, kFull, 2, 2, 2, kDual, ContextExchange::ring}, kCopies[0], kCopies[1],
        kCopies[7]}) {
    const Config fast = with_layout(config, layout);
    const RunTrace run = run_trace(fast, kTableSteps);
    expect_same_bits(run_trace(fast, kTableSteps, 4, 9), run, layout_name(layout));
    for (size_t i = 0; i < run.steps.size(); ++i) {
      // fp32 sums of a thousand terms in another order, as in layouts_test.cc.
      EXPECT_NEAR(run.steps[i].loss / one_rank().steps[i].loss, 1.0, 1e-5) << layout_name(layout);
      EXPECT_NEAR(run.steps[i].balance_loss / one_rank().steps[i].balance_loss, 1.0, 1e-4);
      EXPECT_NEAR(run.steps[i].grad_norm / one_rank().steps[i].grad_norm, 1.0, 1e-3);
    }
  }
}

// Backward of attention over shared sequences: every key's dK and dV, an fp32 row of each. In fast
// mode each rank's go to the owners; in exact mode all keys' go up the ranks and down again, and
// from rank 0 to the owners.
TEST(LayoutTable, KeyGradientsOfSharedSequencesMoveTheDesignsBytes) {
  Config config = with_layout(deep_config(), {1, 2, 4, kZero1, 1, 1, 4, kOneF});
  const ModelConfig& model = config.model;
  const int64_t tokens = 16 * 64 / 4, row_bytes = 2 * 4 * model.kv_heads * model.head_dim;
  const int64_t sums = model.layers * tokens * row_bytes * 3;  // to three other ranks
  const std::vector<RankUse> exact = run_trace(config, 1).ranks;
  const int64_t whole = sums / 3 * 4;
  for (size_t i = 0; i < exact.size(); ++i) {
    const bool is_end = i % 4 == 0 || i % 4 == 3;
    EXPECT_EQ(exact[i].context_exchange.sent_bytes,
              whole * (is_end ? 1 : 2) + (i % 4 == 0 ? sums : 0));
    EXPECT_EQ(exact[i].context_scatter.sent_bytes, 0);
  }
  config.numerics.reduction = ReductionMode::fast;
  for (const RankUse& rank : run_trace(config, 1).ranks) {
    EXPECT_EQ(rank.context_scatter.sent_bytes, sums);
    EXPECT_EQ(rank.context_exchange.sent_bytes, 0);
  }
}

// A ring moves keys and values to every other rank as all-gather does, and exact partials back;
// fast sums take one hop more, home, and the keys and values go round twice.
TEST(LayoutTable, RingsMoveTheDesignsBytes) {
  Config config =
      with_layout(deep_config(), {1, 2, 4, kZero1, 1, 1, 4, kOneF, ContextExchange::ring});
  const ModelConfig& model = config.model;
  const int64_t tokens = 16 * 64 / 4, row_bytes = 2 * 4 * model.kv_heads * model.head_dim;
  const int64_t part = model.layers * tokens * row_bytes;
  for (const RankUse& rank : run_trace(config, 1).ranks) {
    EXPECT_EQ(rank.context_exchange.sent_bytes, 3 * part + 3 * part * (64 / 4 / 8));
  }
  config.numerics.reduction = ReductionMode::fast;
  for (const RankUse& rank : run_trace(config, 1).ranks) {
    EXPECT_EQ(rank.context_exchange.sent_bytes, 2 * 3 * part + 4 * part);
    EXPECT_EQ(rank.context_scatter.sent_bytes, 0);
  }
}

// In fast mode no rank holds whole sequences' keys, and every rank has the same share of the work.
TEST(LayoutTable, RingsHoldPartsAndShareTheWork) {
  const auto uses = [](ContextExchange context) {
    Config config = with_layout(deep_config(), {1, 1, 16, kZero1, 1, 1, 4, kOneF, context});
    config.numerics.reduction = ReductionMode::fast;
    return run_trace(config, 1).ranks;
  };
  const std::vector<RankUse> ring = uses(ContextExchange::ring);
  const std::vector<RankUse> gather = uses(ContextExchange::all_gather);
  for (size_t i = 0; i < ring.size(); ++i) {
    EXPECT_LT(ring[i].peak_bytes, gather[i].peak_bytes);
    for (const char* op : {"attention", "attention_backward"}) {
      const int64_t flops = kTableSteps * 4 * ring[i].ops.at(op).flops;
      EXPECT_EQ(flops, one_rank().ranks[0].ops.at(op).flops) << op;
    }
  }
}

// In ring order other roundings, repeated bit for bit; two ranks' sums have one order.
TEST(LayoutTable, FastModeAddsAroundARingWhereAsked) {
  const auto run = [](const TestLayout& layout, FastOrder order) {
    Config config = with_layout(tiny_config(), layout);
    config.numerics.reduction = ReductionMode::fast;
    config.numerics.fast_order = order;
    return run_trace(config, 3);
  };
  const TestLayout four{.dp = 4, .sharding = Sharding::none}, two{.dp = 2};
  const RunTrace ring = run(four, FastOrder::ring);
  expect_same_bits(run(four, FastOrder::ring), ring, "ring, again");
  EXPECT_NE(total_hex(run(four, FastOrder::rank).steps.back()), total_hex(ring.steps.back()));
  expect_same_bits(run(two, FastOrder::ring), run(two, FastOrder::rank), "two ranks");
}

TEST(LayoutTable, EachRankHoldsItsShareOfTheState) {
  const RankUse& one = one_rank().ranks[0];
  const auto uses = [](const TestLayout& layout) {
    return run_trace(with_layout(deep_config(), layout), 1).ranks;
  };
  // 14 groups (embedding, head, two a layer), whose shards are whole blocks of 4,096 elements; and
  // the routers' loads (192 bytes, in arena blocks of 256).
  constexpr int64_t kPadding = 14 * 4096 * 4, kLoads = 256;
  for (const RankUse& rank : uses({8, 4, 1, kFull, 1, 1, 1, kOneF})) {
    EXPECT_LE(rank.weight_bytes, one.weight_bytes / 8 + kPadding + kLoads);
    EXPECT_LE(rank.optimizer_bytes, one.optimizer_bytes / 8 + 2 * kPadding);
  }
  for (const RankUse& rank : uses({8, 4, 1, kZero2, 1, 1, 1, kOneF})) {
    // Slots of one layer at a time, and a few nodes of the shard.
    EXPECT_LT(rank.peak_bytes, one.peak_bytes / 2);
    EXPECT_LE(rank.optimizer_bytes, one.optimizer_bytes / 8 + 2 * kPadding);
  }
  // Every tensor lies on one pipeline rank.
  int64_t weight_bytes = 0;
  for (const RankUse& rank : uses({1, 1, 1, kZero1, 1, 3, 1, kOneF})) {
    weight_bytes += rank.weight_bytes - kLoads;
    EXPECT_LT(rank.weight_bytes, one.weight_bytes * 2 / 3);
  }
  EXPECT_EQ(weight_bytes, one.weight_bytes - kLoads);
  // 1f1b holds pp micro-batches' activations where gpipe holds all.
  const auto gpipe = uses({1, 1, 1, kZero1, 1, 2, 1, kGpipe});
  const auto one_f = uses({1, 1, 1, kZero1, 1, 2, 1, kOneF});
  EXPECT_LT(one_f[0].peak_bytes, gpipe[0].peak_bytes);
  EXPECT_LT(one_f[1].peak_bytes, gpipe[1].peak_bytes);
}

TEST(LayoutTable, MustFailWithAnotherSeed) {
  Config config = with_layout(deep_config(), {2, 4, 1, kFull, 1, 2, 2, kDual});
  config.run.seed = 77;
  EXPECT_NE(total_hex(run_trace(config, 1).steps[0]), total_hex(one_rank().steps[0]));
}

}  // namespace

}  // namespace cambium::test
