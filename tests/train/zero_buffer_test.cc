// No schedule needs a buffer. The trainer's own executor runs every pipeline schedule for pp 1 to
// 8, and every schedule of communication beside it, with messages that complete when both ends
// stand at them. For programs whose receives name their senders, as ours do, one run without
// deadlock under such sends proves that none deadlocks with any buffering (Siegel and Avrunin,
// "Modeling wildcard-free MPI programs for verification", PPoPP 2005).
#include "sim/cluster.h"
#include "tests/train/run_trace.h"

namespace cambium::test {

namespace {

struct ZeroBufferRun {
  ExitCode exit_code = ExitCode::done;
  std::string message;
  int64_t messages = 0;  // exchanges posted, of all ranks
};

ZeroBufferRun run_without_buffers(const Config& config, std::vector<sim::CommFault> faults = {}) {
  const Derived derived = derive(config);
  const SyntheticSequences source(config);
  sim::ClusterOptions options;
  options.ranks = static_cast<int>(derived.ranks);
  options.faults = std::move(faults);
  ZeroBufferRun run;
  try {
    sim::run_cluster(options, [&](RankEnvironment& environment) {
      Rank rank(config, environment);
      TrainStep step(rank, config.model);
      step.model().initialize(config.run.seed);
      rank.step = 1;
      environment.set_step(1);
      step.accumulate(source, 0);
      step.update(1, 1e-3, WithDigests::yes);
      step.evaluate(source, 0, nullptr);
      run.messages += rank.pipeline->totals(CollectiveKind::exchange).calls;
    });
  } catch (const Error& error) {
    run.exit_code = error.exit_code();
    run.message = error.what();
  }
  return run;
}

Config narrow_config(const TestLayout& layout, int64_t micro_batches) {
  Config config = with_layout(tiny_config(), layout);
  config.model.hidden = 16;
  config.model.heads = config.model.kv_heads = 2;
  config.model.expert_hidden = 8;
  config.model.vocab = 64;
  config.numerics.block_tokens = 8;
  config.train.sequence_length = 16 * layout.cp;
  config.train.global_batch_sequences = layout.dp * micro_batches;
  const int64_t stages =
      layout.pp * schedule_chunks(layout.schedule, layout.pp, config.parallel.virtual_stages);
  config.model.layers = std::max<int64_t>(1, stages - 1);
  return config;
}

constexpr PipelineSchedule kSchedules[] = {
    PipelineSchedule::gpipe, PipelineSchedule::one_f_one_b, PipelineSchedule::interleaved_1f1b,
    PipelineSchedule::zb_h1, PipelineSchedule::zb_v,        PipelineSchedule::dualpipev};

std::string run_name(const Config& config) {
  const ParallelConfig& p = config.parallel;
  return fmt::format("{} pp {} dp {} cp {} ({}) ep {} {} over {} {}, {} layers",
                     choice_name(p.schedule), p.pp, p.dp, p.cp, choice_name(p.context), p.ep,
                     choice_name(p.sharding), p.shard_ranks, choice_name(config.numerics.reduction),
                     config.model.layers);
}

void expect_no_deadlock(const Config& config) {
  const ZeroBufferRun run = run_without_buffers(config);
  EXPECT_EQ(run.message, "") << run_name(config);
  EXPECT_EQ(run.messages > 0, config.parallel.pp > 1) << run_name(config);
}

TEST(ZeroBuffers, NoPipelineScheduleOfOneToEightRanksDeadlocks) {
  for (const PipelineSchedule schedule : kSchedules) {
    for (int64_t pp = 1; pp <= 8; ++pp) {
      const MicroBatchNeed need = schedule_need(schedule, pp);
      for (const int64_t more : {int64_t{0}, pp}) {
        const int64_t micro =
            (need.least + more + need.multiple - 1) / need.multiple * need.multiple;
        expect_no_deadlock(narrow_config({.pp = pp, .schedule = schedule}, micro));
      }
    }
  }
}

// Experts, shared sequences and shards communicate beside the pipeline's messages.
TEST(ZeroBuffers, NoScheduleOfCommunicationDeadlocks) {
  for (const PipelineSchedule schedule : kSchedules) {
    for (const Sharding sharding :
         {Sharding::none, Sharding::zero1, Sharding::zero2, Sharding::full}) {
      for (const int64_t cp : {1, 2}) {
        for (const int64_t pp : {1, 2, 4}) {
          expect_no_deadlock(narrow_config({.dp = 2,
                                            .ep = 2 * cp,
                                            .sharding = sharding,
                                            .pp = pp,
                                            .cp = cp,
                                            .schedule = schedule},
                                           schedule_need(schedule, pp).least));
        }
      }
    }
  }
}

// What ranks of one sequence, and copies of a sharded state, exchange beside them.
TEST(ZeroBuffers, NoRingOrCopyOfShardedStateDeadlocks) {
  for (const ReductionMode mode : {ReductionMode::exact, ReductionMode::fast}) {
    for (const ContextExchange context : {ContextExchange::all_gather, ContextExchange::ring}) {
      for (const PipelineSchedule schedule : kSchedules) {
        for (const auto [pp, dp, cp, shard_ranks] : std::initializer_list<std::array<int64_t, 4>>{
                 {1, 1, 4, 0}, {2, 1, 3, 0}, {2, 2, 2, 2}, {3, 4, 2, 4}}) {
          Config config = narrow_config({.dp = dp,
                                         .ep = 2 - cp % 2,
                                         .sharding = Sharding::full,
                                         .pp = pp,
                                         .cp = cp,
                                         .schedule = schedule,
                                         .context = context,
                                         .shard_ranks = shard_ranks},
                                        schedule_need(schedule, pp).least);
          config.numerics.reduction = mode;
          expect_no_deadlock(config);
        }
      }
    }
  }
}

void expect_stopped(const Config& config, int rank, const char* communicator) {
  const ZeroBufferRun run =
      run_without_buffers(config, {{.kind = sim::CommFaultKind::skipped_collective,
                                    .rank = rank,
                                    .step = 1,
                                    .communicator = communicator}});
  EXPECT_TRUE(run.exit_code == ExitCode::deadlock ||
              run.exit_code == ExitCode::collective_mismatch || run.exit_code == ExitCode::internal)
      << run_name(config) << ": " << run.message;
}

// A rank that leaves one message out is a deadlock or a mismatch, whichever rank it is.
TEST(ZeroBuffers, MustFailWithAMissingMessage) {
  for (int rank = 0; rank < 3; ++rank) {
    for (const PipelineSchedule schedule : kSchedules) {
      expect_stopped(narrow_config({.pp = 3, .schedule = schedule}, 6), rank, "pipeline");
    }
    for (const ReductionMode mode : {ReductionMode::exact, ReductionMode::fast}) {
      Config ring = narrow_config({.cp = 3, .context = ContextExchange::ring}, 1);
      ring.numerics.reduction = mode;
      expect_stopped(ring, rank, "context");
    }
  }
}

}  // namespace

}  // namespace cambium::test
