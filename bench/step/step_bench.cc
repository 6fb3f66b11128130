// Whole training steps (forward, backward, clip, AdamW) of the models of bench/peers/torch_cpu.py.
//
//   cambium_bench --benchmark_filter=step
// The time shown is the median over the steps of one run, after two warm-up steps; `best_ms` is the
// fastest step, what is left of the noise on a busy machine.
#include <benchmark/benchmark.h>

#include <algorithm>

#include "src/cli/launch.h"
#include "src/optim/lr_schedule.h"
#include "src/train/synthetic.h"

namespace cambium {

namespace {

struct StepBench {
  const char* preset;
  int64_t sequence_length, dp, ep, micro_batch;
  ReductionMode reduction;
  int64_t sequences = 8;
};

Config bench_config(const StepBench& bench) {
  Config config = parse_config(
      fmt::format(
          "[model]\npreset = \"{}\"\n[train]\nglobal_batch_sequences = {}\nsteps = 1000\n"
          "sequence_length = {}\nmicro_batch_sequences = {}\n[parallel]\ndp = {}\nep = {}\n",
          bench.preset, bench.sequences, bench.sequence_length, bench.micro_batch, bench.dp,
          bench.ep),
      "step_bench", {});
  config.numerics.reduction = bench.reduction;
  config.model.experts = std::max(config.model.experts, bench.ep);
  return config;
}

void run_steps(benchmark::State& state, const StepBench& bench, int64_t workers) {
  const Config config = bench_config(bench);
  const Derived derived = derive(config);
  const SyntheticSequences source(config);
  constexpr int64_t kSteps = 12;
  for (auto _ : state) {
    std::vector<int64_t> times;
    launch_ranks({.ranks = derived.ranks, .workers = workers}, [&](RankEnvironment& environment) {
      Rank rank(config, environment);
      TrainStep step(rank, config.model);
      step.model().initialize(1);
      rank.finish_step();
      for (int64_t now = 1; now <= kSteps; ++now) {
        const int64_t start = rank.host.now_ns();
        step.accumulate(source, now - 1);
        step.update(now, 1e-3, WithDigests::no);
        if (rank.is_first() && now > 2) times.push_back(rank.host.now_ns() - start);
      }
    });
    std::nth_element(times.begin(), times.begin() + std::ssize(times) / 2, times.end());
    state.SetIterationTime(1e-9 * static_cast<double>(times[times.size() / 2]));
    const auto best = *std::min_element(times.begin(), times.end());
    state.counters["best_ms"] = 1e-6 * static_cast<double>(best);
  }
}

const StepBench kOneRankFast{"quickstart", 128, 1, 1, 8, ReductionMode::fast};
const StepBench kOneRankExact{"quickstart", 128, 1, 1, 8, ReductionMode::exact};
const StepBench kOneRankExactMicro{"quickstart", 128, 1, 1, 1, ReductionMode::exact};
const StepBench kEightRanks{"quickstart", 128, 8, 4, 1, ReductionMode::exact};
const StepBench kEightRanksFast{"quickstart", 128, 8, 4, 1, ReductionMode::fast};
const StepBench kSmallFast{"small", 256, 1, 1, 8, ReductionMode::fast};

// Many ranks of the tiny model, one sequence each: what simulating a cluster costs.
const StepBench kManyRanks{"tiny", 64, 64, 8, 1, ReductionMode::exact, 64};
const StepBench kMostRanks{"tiny", 64, 512, 8, 1, ReductionMode::exact, 512};  // 12 GB

BENCHMARK_CAPTURE(run_steps, step_quickstart_fast, kOneRankFast, 2)
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(run_steps, step_quickstart_fast_1_thread, kOneRankFast, 1)
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(run_steps, step_quickstart_exact, kOneRankExact, 2)
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(run_steps, step_quickstart_exact_micro_1, kOneRankExactMicro, 2)
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(run_steps, step_quickstart_8_ranks_exact, kEightRanks, 2)
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(run_steps, step_quickstart_8_ranks_fast, kEightRanksFast, 2)
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(run_steps, step_small_fast, kSmallFast, 2)
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);

BENCHMARK_CAPTURE(run_steps, step_64_ranks, kManyRanks, 2)
    ->UseManualTime()
    ->Iterations(1)
    ->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(run_steps, step_512_ranks, kMostRanks, 2)
    ->UseManualTime()
    ->Iterations(1)
    ->Unit(benchmark::kMillisecond);

}  // namespace

}  // namespace cambium
