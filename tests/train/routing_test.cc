// Forced routing and its traces: replay of the own trace keeps every bit, in every layout; another
// trace changes them; even routing loads experts alike; files that do not fit are refused.
#include <gtest/gtest.h>

#include <set>

#include "src/train/routing_trace.h"
#include "tests/data/scratch.h"
#include "tests/train/run_trace.h"

namespace cambium::test {

namespace {

constexpr int64_t kRoutedSteps = 3;

// Four layers, the second one dense, with a selection bias: a trace must know both.
Config routed_config() {
  Config config = tiny_config();
  config.model.layers = 4;
  config.model.dense_layers = {1};
  config.model.dense_hidden = 24;
  config.balance.bias_update_rate = 0.01;
  config.numerics.block_tokens = 8;  // sequences of 32 go round two context ranks
  return config;
}

const TestLayout kOneRank{1, 1, 8, Sharding::none, 1};

// Runs `config` and writes the trace of all its steps; the choices stay on rank 0 until then.
std::vector<TracedRouting> traced_run(const Config& config, const std::string& path) {
  const Derived derived = derive(config);
  const SyntheticSequences source(config);
  FileSystem files;
  RoutingTraceWriter writer(files, path, config, {1, kRoutedSteps});
  std::vector<TracedRouting> steps;
  launch_ranks({.ranks = derived.ranks, .poison = Poison::on}, [&](RankEnvironment& environment) {
    Rank rank(config, environment);
    TrainStep step(rank, config.model);
    step.model().initialize(config.run.seed);
    rank.finish_step();
    step.routing().start_trace();
    for (int64_t now = 1; now <= kRoutedSteps; ++now) {
      rank.step = now;
      environment.set_step(now);
      step.accumulate(source, now - 1);
      step.update(now, learning_rate(config, derived, now), WithDigests::no);
      TracedRouting routing = step.routing().collect();
      step.evaluate(source, 0, nullptr);  // leaves no mark in the trace
      if (!rank.is_first()) continue;
      writer.write_step(now, routing);
      steps.push_back(std::move(routing));
    }
  });
  EXPECT_TRUE(writer.is_complete());
  return steps;
}

Config replaying(Config config, const std::string& path) {
  config.balance.routing = RoutingChoice::replay;
  config.balance.routing_file = path;
  return config;
}

TEST(Routing, TraceOfEveryLayoutIsThatOfOneRankByteForByte) {
  const ScratchDirectory scratch;
  const std::vector<TracedRouting> one =
      traced_run(with_layout(routed_config(), kOneRank), scratch.path("one.h5"));
  const std::vector<TestLayout> layouts = {
      {4, 2, 1, Sharding::zero1},
      {2, 2, 1, Sharding::full, 1, 1, 2},
      {2, 2, 1, Sharding::zero2, 1, 2, 1, PipelineSchedule::dualpipev},
      {2, 1, 2, Sharding::none, 1, 2, 1, PipelineSchedule::interleaved_1f1b}};
  for (const TestLayout& layout : layouts) {
    traced_run(with_layout(routed_config(), layout), scratch.path("layout.h5"));
    EXPECT_TRUE(scratch.read("layout.h5") == scratch.read("one.h5")) << layout_name(layout);
  }
  // What a file says: the loads of the run's metrics, -1 in the dense layer, weights of one token
  // that sum to one.
  const RunTrace run = run_trace(with_layout(routed_config(), kOneRank), kRoutedSteps);
  std::vector<std::vector<int64_t>> loads(4, std::vector<int64_t>(8, 0));
  const int64_t each = 8 * 32 * 2;
  for (int64_t i = 0; i < std::ssize(one.back().expert_ids); ++i) {
    const int32_t id = one.back().expert_ids[i];
    ASSERT_EQ(id < 0, i / each == 1);
    if (id >= 0) ++loads[i / each][id];
    if (id < 0 || i % 2 == 1) continue;
    EXPECT_NEAR(one.back().gate_weights[i] + one.back().gate_weights[i + 1], 1, 1e-6);
  }
  loads[1] = run.steps.back().expert_load[1];
  EXPECT_EQ(loads, run.steps.back().expert_load);
}

// Bytes that all ranks of four, two experts each, send over their expert group in a step, from the
// experts that tokens chose: each token goes once to each other rank that holds one of its experts,
// though it chose two there; in exact mode a row of each comes back, in fast mode their sum.
int64_t routed_bytes(const Config& config, const TracedRouting& routing) {
  const int64_t K = config.model.top_k, D = config.model.hidden, ranks = 4;
  const int64_t tokens_of_rank = 8 / ranks * config.train.sequence_length;
  int64_t sent = 0, rows = 0;
  for (int64_t first = 0; first < std::ssize(routing.expert_ids); first += K) {
    if (routing.expert_ids[first] < 0) continue;  // a dense layer
    const int64_t own = first / K / tokens_of_rank % ranks;
    std::set<int64_t> others;
    for (int64_t k = 0; k < K; ++k) {
      const int64_t holder = routing.expert_ids[first + k] / 2;
      if (holder == own) continue;
      others.insert(holder);
      ++rows;
    }
    sent += std::ssize(others);
  }
  const bool exact = config.numerics.reduction == ReductionMode::exact;
  const int64_t back = exact ? rows : sent;
  const int64_t forward = sent * (4 * D + 8 * K + (exact ? 4 : 0)) + back * 4 * D;
  const int64_t backward = sent * 4 * D + back * 4 * D + rows * 4;
  const int64_t counts = 3 * 2 * ranks * (ranks - 1) * 8;  // layers, micro-batches
  return forward + backward + counts;
}

TEST(Routing, ATokenGoesOnceToEachRankOfItsExperts) {
  const ScratchDirectory scratch;
  for (const ReductionMode mode : {ReductionMode::exact, ReductionMode::fast}) {
    Config config = with_layout(routed_config(), {4, 4, 1, Sharding::zero1});
    config.numerics.reduction = mode;
    const TracedRouting first = traced_run(config, scratch.path("routed.h5")).front();
    int64_t bytes = 0;
    for (const RankUse& rank : run_trace(config, 1).ranks) {
      bytes += rank.expert_all_to_all.sent_bytes;
    }
    EXPECT_EQ(bytes, routed_bytes(config, first));
  }
}

TEST(Routing, ReplayOfTheOwnTraceKeepsTheBitsInEveryLayout) {
  const ScratchDirectory scratch;
  const std::string path = scratch.path("own.h5");
  const Config config = routed_config();
  traced_run(with_layout(config, kOneRank), path);
  const RunTrace learned = run_trace(with_layout(config, kOneRank), kRoutedSteps);
  for (const TestLayout& layout :
       {kOneRank, TestLayout{4, 2, 1, Sharding::zero1},
        TestLayout{2, 2, 1, Sharding::full, 2, 1, 2},
        TestLayout{2, 2, 1, Sharding::zero2, 1, 2, 1, PipelineSchedule::dualpipev}}) {
    expect_same_bits(run_trace(with_layout(replaying(config, path), layout), kRoutedSteps), learned,
                     layout_name(layout));
  }
  Config again = with_layout(replaying(config, path), kOneRank);
  again.recompute.mode = RecomputeMode::full_layer;
  expect_same_bits(run_trace(again, kRoutedSteps), learned, "recomputed");
}

// The choice is the trace's, not the router's: another seed's trace changes loss and loads, to the
// loads of that trace, and layouts still agree.
TEST(Routing, ReplayOfAnotherSeedsTraceTakesItsExperts) {
  const ScratchDirectory scratch;
  const std::string path = scratch.path("other.h5");
  const Config config = tiny_config();
  Config other = config;
  other.run.seed = 77;
  traced_run(with_layout(other, kOneRank), path);
  const RunTrace learned = run_trace(with_layout(config, kOneRank), kRoutedSteps);
  const RunTrace forced = run_trace(with_layout(replaying(config, path), kOneRank), kRoutedSteps);
  const RunTrace traced = run_trace(with_layout(other, kOneRank), kRoutedSteps);
  for (int64_t i = 0; i < kRoutedSteps; ++i) {
    EXPECT_NE(forced.steps[i].loss, learned.steps[i].loss);
    EXPECT_EQ(forced.steps[i].expert_load, traced.steps[i].expert_load);
  }
  expect_same_bits(
      run_trace(with_layout(replaying(config, path), {4, 2, 1, Sharding::zero1}), kRoutedSteps),
      forced, "another seed's trace");
}

TEST(Routing, EvenLoadsExpertsAlikeInEveryLayout) {
  Config config = tiny_config();
  config.numerics.block_tokens = 8;
  config.balance.routing = RoutingChoice::even;
  const RunTrace one = run_trace(with_layout(config, kOneRank), kRoutedSteps);
  for (const StepResult& step : one.steps) {
    for (const auto& layer : step.expert_load) {
      EXPECT_EQ(layer, std::vector<int64_t>(8, 8 * 32 * 2 / 8));
    }
  }
  EXPECT_NE(one.steps[0].loss, one.steps[1].loss);
  for (const TestLayout& layout :
       {TestLayout{4, 2, 1, Sharding::zero1}, TestLayout{2, 4, 1, Sharding::full, 2, 1, 2}}) {
    expect_same_bits(run_trace(with_layout(config, layout), kRoutedSteps), one,
                     layout_name(layout));
  }
}

// A trace of fewer steps than the run starts again.
TEST(Routing, ShortTraceStartsAgain) {
  const ScratchDirectory scratch;
  Config config = tiny_config();
  traced_run(with_layout(config, kOneRank), scratch.path("t.h5"));
  const RoutingTraceReader reader(replaying(config, scratch.path("t.h5")));
  EXPECT_EQ(reader.read(0, 1, {2, 3}), reader.read(kRoutedSteps, 1, {2, 3}));
  EXPECT_NE(reader.read(0, 1, {2, 3}), reader.read(1, 1, {2, 3}));
}

ExitCode routing_refusal(const Config& config, std::string* message = nullptr) {
  try {
    RoutingTraceReader(config).read(0, 0, {0, 1});
  } catch (const Error& error) {
    if (message != nullptr) *message = error.what();
    return error.exit_code();
  }
  return ExitCode::done;
}

TEST(Routing, FilesThatDoNotFitAreRefused) {
  const ScratchDirectory scratch;
  const Config config = replaying(tiny_config(), scratch.path("t.h5"));
  traced_run(with_layout(tiny_config(), kOneRank), scratch.path("t.h5"));
  EXPECT_EQ(routing_refusal(config), ExitCode::done);
  std::string message;
  Config other = config;
  other.model.experts = 16;
  EXPECT_EQ(routing_refusal(other, &message), ExitCode::usage);
  EXPECT_NE(message.find("model.experts = 8, not 16"), std::string::npos) << message;
  other = config;
  other.train.global_batch_sequences = 6;
  EXPECT_EQ(routing_refusal(other, &message), ExitCode::usage);
  EXPECT_NE(message.find("global_batch_sequences = 8, not 6"), std::string::npos) << message;
  // Damage: a choice out of range, a choice made twice, arrays that differ, another file's format.
  const auto write = [&](const char* name, uint64_t weights, int32_t first, int32_t second) {
    Hdf5Writer file(scratch.path(name));
    file.write_attribute("format", "cambium routing trace");
    for (const auto& [key, value] : {std::pair("version", uint64_t{1}),
                                     {"first_step", 1},
                                     {"global_batch_sequences", 8},
                                     {"experts", 8}}) {
      file.write_attribute(key, value);
    }
    const std::vector<uint64_t> extents = {2, 8, 32, 2}, others = {2, 8, 32, weights};
    file.create_dataset("expert_ids", Hdf5Type::i32, Hdf5Storage::contiguous, extents);
    file.create_dataset("gate_weights", Hdf5Type::f32, Hdf5Storage::contiguous, others);
    std::vector<int32_t> ids(2 * 8 * 32 * 2);
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i % 2);
    ids[4] = first;
    ids[5] = second;
    file.write_range("expert_ids", Hdf5Type::i32, {0, ids.size()}, ids.data());
    const std::vector<float> weight_values(2 * 8 * 32 * weights, 0.5f);
    file.write_range("gate_weights", Hdf5Type::f32, {0, weight_values.size()},
                     weight_values.data());
    file.close();
    return routing_refusal(replaying(tiny_config(), scratch.path(name)), &message);
  };
  EXPECT_EQ(write("good.h5", 2, 6, 7), ExitCode::done) << message;
  EXPECT_EQ(write("range.h5", 2, 3, 8), ExitCode::corrupt_file);
  EXPECT_NE(message.find("layer 0 is 8"), std::string::npos) << message;
  EXPECT_EQ(write("twice.h5", 2, 3, 3), ExitCode::corrupt_file);
  EXPECT_EQ(write("differ.h5", 3, 1, 2), ExitCode::corrupt_file);
  EXPECT_NE(message.find("[2, 8, 32, 3]"), std::string::npos) << message;
  Hdf5Writer file(scratch.path("tokens.h5"));
  file.write_attribute("format", "cambium tokens");
  file.close();
  EXPECT_EQ(routing_refusal(replaying(tiny_config(), scratch.path("tokens.h5"))),
            ExitCode::corrupt_file);
}

}  // namespace

}  // namespace cambium::test
