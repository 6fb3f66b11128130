// The trainer has no race, and no wait that it could do without: left out one at a time, each is
// missed.
#include "sim/cluster.h"
#include "tests/train/run_trace.h"

namespace cambium::test {

namespace {

struct RaceRun {
  ExitCode exit_code = ExitCode::done;
  std::string message;
  RaceReport report;
};

RaceRun race_run(const Config& config, const std::string& left_out, uint64_t seed = 0) {
  const Derived derived = derive(config);
  const SyntheticSequences source(config);
  sim::ClusterOptions options;
  options.ranks = static_cast<int>(derived.ranks);
  options.schedule_seed = seed;
  options.races = sim::Races::detected;
  options.left_out_wait.site = left_out;
  RaceRun run;
  try {
    run.report = sim::run_cluster(options, [&](RankEnvironment& environment) {
                   Rank rank(config, environment);
                   TrainStep step(rank, config.model);
                   step.model().initialize(config.run.seed);
                   for (int64_t now = 1; now <= 2; ++now) {
                     rank.step = now;
                     environment.set_step(now);
                     step.accumulate(source, now - 1);
                     step.update(now, learning_rate(config, derived, now), WithDigests::yes);
                   }
                   step.evaluate(source, 0, nullptr);
                 }).races;
  } catch (const Error& error) {
    run.exit_code = error.exit_code();
    run.message = error.what();
  }
  return run;
}

constexpr TestLayout kLayouts[] = {
    {1, 1, 4, Sharding::zero1},
    {4, 2, 1, Sharding::zero1},
    {2, 2, 1, Sharding::zero2, 1, 2, 1, PipelineSchedule::one_f_one_b},
    {2, 2, 1, Sharding::full, 1, 2, 2, PipelineSchedule::dualpipev},
    {2, 1, 1, Sharding::none, 1, 2, 1, PipelineSchedule::zb_v},
};

std::vector<Config> configs() {
  std::vector<Config> all;
  for (const TestLayout& layout : kLayouts) {
    for (const ReductionMode mode : {ReductionMode::exact, ReductionMode::fast}) {
      Config config = with_layout(tiny_config(), layout);
      config.model.layers = 4;
      config.model.tie_embeddings = layout.schedule == PipelineSchedule::one_f_one_b;
      // With bf16 a tied head's copy of the weights is read when it comes.
      const bool is_apart = config.model.tie_embeddings && layout.pp > 1;
      config.numerics.compute = is_apart ? ComputeType::bf16 : ComputeType::fp32;
      config.numerics.block_tokens = 8;
      config.numerics.reduction = mode;
      all.push_back(config);
    }
  }
  return all;
}

TEST(TrainerRaces, NoneAndEveryWaitIsMissedWhenLeftOut) {
  std::map<std::string, WaitSite> sites;
  std::map<std::string, std::string> missed;  // by wait, what happens without it
  for (const Config& config : configs()) {
    const RaceRun clean = race_run(config, "");
    EXPECT_EQ(clean.message, "");
    EXPECT_GT(clean.report.accesses, 1000);
    for (const WaitSite& site : clean.report.waits) {
      sites[site.name].count += site.count;
      sites[site.name].implied += site.implied;
      if (missed.contains(site.name)) continue;
      const RaceRun without = race_run(config, site.name);
      if (without.exit_code != ExitCode::done) missed[site.name] = without.message;
    }
  }
  EXPECT_GE(sites.size(), 30u);
  for (const auto& [name, site] : sites) {
    const std::string what =
        fmt::format("{}: {} waits, {} implied by others", name, site.count, site.implied);
    EXPECT_LT(site.implied, site.count) << what;
    ASSERT_TRUE(missed.contains(name)) << what << ", and nothing happens without it: delete it";
    EXPECT_NE(missed[name].find("race: nothing orders two accesses"), std::string::npos)
        << missed[name];
    // Both accesses say where the trainer calls for them, not where ops are wrapped.
    // (Files that are compiled together have absolute paths.)
    const size_t first = missed[name].find("src/");
    EXPECT_NE(missed[name].find("src/", first + 1), std::string::npos) << missed[name];
    EXPECT_EQ(missed[name].find("kernels/"), std::string::npos) << missed[name];
  }
}

TEST(TrainerRaces, NoFalseAlarmInAnyOrder) {
  for (const Config& config : configs()) {
    for (uint64_t seed = 1; seed <= 3; ++seed) EXPECT_EQ(race_run(config, "", seed).message, "");
  }
}

}  // namespace

}  // namespace cambium::test
