// A short training run in this process, for tests: losses, norms, digests, and what each rank did.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "src/cli/launch.h"
#include "src/optim/lr_schedule.h"
#include "src/train/synthetic.h"
#include "src/train/train_step.h"

namespace cambium::test {

struct TestLayout {
  int64_t dp = 1, ep = 1, micro_batch = 1;
  Sharding sharding = Sharding::zero1;
  int64_t workers = 1;
  int64_t pp = 1, cp = 1;
  PipelineSchedule schedule = PipelineSchedule::one_f_one_b;
  ContextExchange context = ContextExchange::all_gather;
  int64_t shard_ranks = 0;
};

inline std::string layout_name(const TestLayout& l) {
  return fmt::format("pp {} dp {} cp {} ({}) ep {} {} {} over {} micro-batch {} workers {}", l.pp,
                     l.dp, l.cp, choice_name(l.context), l.ep, choice_name(l.schedule),
                     choice_name(l.sharding), l.shard_ranks, l.micro_batch, l.workers);
}

// A tiny model with every part on: clip, sequence balance loss, z-loss, documents.
inline Config tiny_config() {
  Config config = parse_config(
      "[model]\nlayers = 2\nhidden = 32\nheads = 4\nkv_heads = 2\nhead_dim = 8\nexperts = 8\n"
      "top_k = 2\nexpert_hidden = 24\nvocab = 300\nmax_positions = 64\n"
      "[train]\nsteps = 20\nglobal_batch_sequences = 8\nsequence_length = 32\n"
      "[numerics]\nblock_tokens = 16\nreduction = \"exact\"\n"
      "[optimizer]\nlr = 0.01\nclip = 0.5\n[schedule]\nwarmup_steps = 2\n"
      "[balance]\nloss = \"sequence\"\nloss_weight = 0.02\nz_loss_weight = 0.001\n",
      "tiny_config", {});
  return config;
}

inline Config with_layout(Config config, const TestLayout& layout) {
  config.parallel.dp = layout.dp;
  config.parallel.ep = layout.ep;
  config.parallel.pp = layout.pp;
  config.parallel.cp = layout.cp;
  config.parallel.schedule = layout.schedule;
  config.parallel.context = layout.context;
  config.parallel.sharding = layout.sharding;
  config.parallel.shard_ranks = layout.shard_ranks;
  config.train.micro_batch_sequences = layout.micro_batch;
  return config;
}

// What one rank used.
struct RankUse {
  std::map<std::string, OpTotals> ops;
  int64_t optimizer_bytes = 0, weight_bytes = 0, peak_bytes = 0;
  CommTotals shard_gather, copies_reduce;  // zero where there is one copy of the state
  CommTotals data_gather, data_all_to_all, expert_all_to_all, expert_data_all_to_all;
  CommTotals expert_data_gather;
  CommTotals context_scatter, context_exchange, pipeline_exchange;
};

struct RunTrace {
  std::vector<StepResult> steps;
  std::vector<RankUse> ranks;
};

inline std::string total_hex(const StepResult& result) {
  Digest128 total;
  for (const auto& [name, digest] : result.digests) total += digest;
  return total.hex();
}

inline RankUse rank_use(const Rank& rank) {
  RankUse use;
  use.ops = rank.totals;
  use.optimizer_bytes = rank.arena.used_bytes(MemoryClass::optimizer);
  use.weight_bytes = rank.arena.used_bytes(MemoryClass::weights);
  use.peak_bytes = rank.arena.peak_bytes();
  if (rank.data_shard != nullptr) {
    use.shard_gather = rank.data_shard->totals(CollectiveKind::all_gather);
    use.copies_reduce = rank.data_copies->totals(CollectiveKind::all_reduce);
  }
  use.data_gather = rank.data->totals(CollectiveKind::all_gather);
  use.context_scatter = rank.context->totals(CollectiveKind::reduce_scatter);
  use.context_exchange = rank.context->totals(CollectiveKind::exchange);
  use.pipeline_exchange = rank.pipeline->totals(CollectiveKind::exchange);
  use.data_all_to_all = rank.data->totals(CollectiveKind::all_to_all_v);
  use.expert_all_to_all = rank.expert->totals(CollectiveKind::all_to_all_v);
  use.expert_data_gather = rank.expert_data->totals(CollectiveKind::all_gather);
  use.expert_data_all_to_all = rank.expert_data->totals(CollectiveKind::all_to_all_v);
  return use;
}

inline RunTrace run_trace(const Config& config, int64_t steps, int64_t workers = 1,
                          uint64_t schedule_seed = 0) {
  const Derived derived = derive(config);
  const SyntheticSequences source(config);
  RunTrace trace;
  trace.ranks.resize(static_cast<size_t>(derived.ranks));
  launch_ranks({.ranks = derived.ranks,
                .workers = workers,
                .schedule_seed = schedule_seed,
                .poison = Poison::on,
                .faults = config.faults,
                .fast_order = config.numerics.fast_order},
               [&](RankEnvironment& environment) {
                 Rank rank(config, environment);
                 TrainStep step(rank, config.model);
                 step.model().initialize(config.run.seed);
                 rank.finish_step();
                 for (int64_t now = 1; now <= steps; ++now) {
                   rank.step = now;
                   environment.set_step(now);
                   step.accumulate(source, now - 1);
                   const StepResult result =
                       step.update(now, learning_rate(config, derived, now), WithDigests::yes);
                   if (rank.is_first()) trace.steps.push_back(result);
                 }
                 trace.ranks[rank.at.rank] = rank_use(rank);
               });
  return trace;
}

// Losses, norms, loads and digests of every step.
inline void expect_same_bits(const RunTrace& run, const RunTrace& one, const std::string& what) {
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

}  // namespace cambium::test
