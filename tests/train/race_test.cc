// The trainer has no race, and no wait that it could do without: left out one at a time, each is
// missed.
#include "sim/cluster.h"
#include "src/train/train_run.h"
#include "tests/data/scratch.h"
#include "tests/train/run_trace.h"
#include "tests/tree.h"

namespace cambium::test {

namespace {

// What a run consists of.
enum class RunParts { steps, whole, whole_without_signals };

struct RaceCase {
  Config config;
  RunParts parts = RunParts::steps;
};

struct RaceRun {
  ExitCode exit_code = ExitCode::done;
  std::string message;
  RaceReport report;
};

void run_steps(RankEnvironment& environment, const Config& config, const Derived& derived,
               const SequenceSource& source) {
  Rank rank(config, environment);
  TrainStep step(rank, config.model);
  step.model().initialize(config.run.seed);
  for (int64_t now = 1; now <= 2; ++now) {
    rank.step = now;
    environment.set_step(now);
    step.accumulate(source, now - 1);
    step.owned_gradients();
    step.update(now, learning_rate(config, derived, now), WithDigests::yes);
  }
  step.evaluate(source, 0, nullptr);
}

// What `cambium train` does: initial digests, steps, traces, checkpoints, evaluation.
struct WholeRun {
  WholeRun(const Config& config, RunParts parts)
      : derived(derive(config)),
        source(config),
        metrics(directory.path(""), 0, EventFiles::off),
        progress({.style = ProgressStyle::silent}),
        trace(files, directory.path("routing.h5"), config, {1, 2}) {
    files.make_directories(checkpoint_directory(directory.path("")));
    run.config = &config;
    run.derived = &derived;
    run.directory = directory.path("");
    run.files = &files;
    run.train = run.validation = &source;
    run.validation_batches = 1;
    run.last_step = 2;
    if (parts == RunParts::whole) run.stop_signal = &stop;
    run.trace_from = 1;
    run.routing_trace = &trace;
    run.metrics = &metrics;
    run.progress = &progress;
  }
  ScratchDirectory directory;
  FileSystem files;
  Derived derived;
  SyntheticSequences source;
  MetricsWriter metrics;
  Progress progress;
  RoutingTraceWriter trace;
  std::sig_atomic_t stop = 0;
  TrainRun run;
};

RaceRun race_run(const RaceCase& race, const std::string& left_out, uint64_t seed = 0) {
  const Config& config = race.config;
  const Derived derived = derive(config);
  const SyntheticSequences source(config);
  std::optional<WholeRun> whole;
  if (race.parts != RunParts::steps) whole.emplace(config, race.parts);
  sim::ClusterOptions options;
  options.ranks = static_cast<int>(derived.ranks);
  options.schedule_seed = seed;
  options.races = sim::Races::detected;
  options.left_out_wait.site = left_out;
  RaceRun run;
  try {
    run.report = sim::run_cluster(options, [&](RankEnvironment& environment) {
                   if (whole) {
                     train_rank(environment, whole->run);
                   } else {
                     run_steps(environment, config, derived, source);
                   }
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
    {.dp = 4, .ep = 2, .sharding = Sharding::full, .cp = 2, .shard_ranks = 4},
    {.ep = 2, .micro_batch = 2, .cp = 4, .context = ContextExchange::ring},
};

Config race_config(const TestLayout& layout, ReductionMode mode) {
  Config config = with_layout(tiny_config(), layout);
  config.model.layers = 4;
  config.model.tie_embeddings = layout.schedule == PipelineSchedule::one_f_one_b;
  // With bf16 a tied head's copy of the weights is read when it comes.
  const bool is_apart = config.model.tie_embeddings && layout.pp > 1;
  config.numerics.compute = is_apart ? ComputeType::bf16 : ComputeType::fp32;
  config.numerics.block_tokens = 8;
  config.train.sequence_length = 32 * std::max<int64_t>(1, layout.cp / 2);
  config.numerics.reduction = mode;
  return config;
}

// Other models, losses and routing, and a whole run.
std::vector<RaceCase> other_cases() {
  const TestLayout experts{.dp = 4, .ep = 2}, shared{.dp = 2, .ep = 2, .cp = 2};
  Config loss = race_config(experts, ReductionMode::fast);
  loss.balance.loss = BalanceLoss::global_batch;
  Config recomputed = race_config(experts, ReductionMode::exact);
  recomputed.recompute.mode = RecomputeMode::full_layer;
  recomputed.model.shared_expert_hidden = 24;
  recomputed.model.shared_expert_gate = true;
  Config forced = race_config(shared, ReductionMode::fast);
  forced.balance.routing = RoutingChoice::even;
  forced.balance.loss = BalanceLoss::micro_batch;
  Config whole = race_config(experts, ReductionMode::exact);
  whole.balance.bias_update_rate = 0.01;
  whole.train.steps = 2;
  Config stateless = whole;  // of a router without a bias
  stateless.balance.bias_update_rate = 0;
  return {{loss},
          {recomputed},
          {forced},
          {whole, RunParts::whole},
          {stateless, RunParts::whole_without_signals}};
}

std::vector<RaceCase> race_cases() {
  std::vector<RaceCase> all = other_cases();
  for (const TestLayout& layout : kLayouts) {
    for (const ReductionMode mode : {ReductionMode::exact, ReductionMode::fast}) {
      all.push_back({race_config(layout, mode)});
    }
  }
  return all;
}

struct TriedWait {
  WaitSite site;                  // of all cases
  std::vector<RaceCase> waiting;  // the cases that have it
};

std::map<std::string, TriedWait> waits_of(const std::vector<RaceCase>& cases) {
  std::map<std::string, TriedWait> waits;
  for (const RaceCase& race : cases) {
    const RaceRun clean = race_run(race, "");
    EXPECT_EQ(clean.message, "");
    EXPECT_GT(clean.report.accesses, 1000);
    for (const WaitSite& site : clean.report.waits) {
      TriedWait& wait = waits[site.name];
      wait.site.name = site.name;
      wait.site.count += site.count;
      wait.site.implied += site.implied;
      wait.waiting.push_back(race);
    }
  }
  return waits;
}

// What happens in the first case that misses the wait; empty: nothing, in any.
std::string missed(const TriedWait& wait) {
  for (const RaceCase& race : wait.waiting) {
    const RaceRun without = race_run(race, wait.site.name);
    if (without.exit_code != ExitCode::done) return without.message;
  }
  return "";
}

// A wait whose data nobody touches: that all ranks came.
bool is_barrier(const WaitSite& site) { return site.name.ends_with("host waits for comm"); }

TEST(TrainerRaces, NoneAndEveryWaitIsMissedWhenLeftOut) {
  for (const auto& [name, wait] : waits_of(race_cases())) {
    const WaitSite& site = wait.site;
    const std::string what =
        fmt::format("{}: {} waits, {} implied by others", name, site.count, site.implied);
    EXPECT_LT(site.implied, site.count) << what << ": delete it";
    const std::string message = missed(wait);
    EXPECT_NE(message, "") << what << ", and nothing happens without it: delete it";
    if (message.empty() || is_barrier(site)) continue;
    EXPECT_NE(message.find("race: nothing orders two accesses"), std::string::npos) << message;
    // Both accesses say where the trainer calls for them, not where ops are wrapped.
    // (Files that are compiled together have absolute paths.)
    const size_t first = message.find("src/");
    EXPECT_NE(message.find("src/", first + 1), std::string::npos) << message;
    EXPECT_EQ(message.find("kernels/"), std::string::npos) << message;
  }
}

// Every wait that the trainer's sources call for is among them, but those that a fault makes.
TEST(TrainerRaces, WaitsOfAllSourcesAreTried) {
  std::string tried;
  for (const auto& [name, wait] : waits_of(race_cases())) tried += name + "\n";
  int64_t waits = 0;
  for (const char* folder : {"src/model", "src/train", "src/parallel"}) {
    const std::filesystem::path root = std::string(source_directory());
    for (const auto& entry : std::filesystem::directory_iterator(root / folder)) {
      if (entry.path().extension() != ".cc") continue;
      std::ifstream file(entry.path());
      std::string line, before;
      for (int64_t number = 1; std::getline(file, line); before = line, ++number) {
        const bool waits_here = line.find("compute_waits(") != std::string::npos ||
                                line.find("comm_waits_for_compute(") != std::string::npos ||
                                line.find(".wait(") != std::string::npos;
        const bool is_of_caller = line.find(", site)") != std::string::npos;
        if (!waits_here || is_of_caller || before.find("has_fault") != std::string::npos) continue;
        const std::string place =
            fmt::format("{}/{}:{} ", folder, entry.path().filename().string(), number);
        EXPECT_NE(tried.find(place), std::string::npos) << place << line;
        ++waits;
      }
    }
  }
  EXPECT_GE(waits, 50);
}

TEST(TrainerRaces, NoFalseAlarmInAnyOrder) {
  for (const RaceCase& race : race_cases()) {
    for (uint64_t seed = 1; seed <= 3; ++seed) EXPECT_EQ(race_run(race, "", seed).message, "");
  }
}

}  // namespace

}  // namespace cambium::test
