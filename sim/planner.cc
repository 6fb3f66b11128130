#include "sim/planner.h"

#include <algorithm>
#include <numeric>

#include "sim/cluster.h"
#include "sim/virtual_time.h"
#include "src/parallel/mesh.h"

namespace cambium::sim {

namespace {

constexpr int64_t kPlanStackBytes = 256 << 10;

void check_fits_machine(const Config& config, const Machine& machine) {
  const char* device = choice_name(config.run.device);
  if (machine.device != device) {
    fail(ExitCode::usage,
         "machine '{}' runs ops on {}, run.device = {}; next: --set run.device={} --set "
         "numerics.compute={}",
         machine.name, machine.device, device, machine.device, machine.compute);
  }
  if (machine.compute != choice_name(config.numerics.compute)) {
    fail(ExitCode::usage,
         "machine '{}' was measured in {}, numerics.compute = {}; next: --set numerics.compute={}, "
         "or `cambium calibrate` in {}",
         machine.name, machine.compute, choice_name(config.numerics.compute), machine.compute,
         choice_name(config.numerics.compute));
  }
}

// The first rank of every pipeline stage, when all ranks of a stage do the same at the same time.
std::vector<int> folded_ranks(const Config& config, const Machine& machine,
                              const RoutingModel& routing) {
  const Mesh mesh = make_mesh(config.parallel);
  const auto refuse = [](const std::string& why) {
    fail(ExitCode::usage, "ranks cannot be folded: {}; next: plan without --fold", why);
  };
  if (!routing.is_symmetric()) {
    refuse(fmt::format("plan.routing = {} differs between ranks", config.plan.routing));
  }
  if (mesh.cp > 1 && config.parallel.context == ContextExchange::ring) {
    refuse("each hop of parallel.context = ring names the two ranks that it joins");
  }
  if (config.model.tie_embeddings && mesh.stage_ranks() > 1) {
    refuse("a tied embedding's gradient is added where its shard lies");
  }
  if (config.numerics.reduction == ReductionMode::exact && mesh.stage_ranks() > 1) {
    refuse("numerics.reduction = exact gives every rank nodes of its own in the gradients' tree");
  }
  if (config.logging.digest_every_steps == 1) {
    refuse("digests of every step (logging.digest_every_steps = 1) are of every rank's own shard");
  }
  if (machine.is_shared) refuse("the ranks share one device");
  if (machine.nics < machine.node_ranks && mesh.ranks() > machine.node_ranks) {
    refuse(fmt::format("{} ranks of a node share {} NICs", machine.node_ranks, machine.nics));
  }
  // Groups must cut nodes in the same way wherever they lie.
  for (const int64_t count :
       {mesh.stage_ranks(), mesh.stage_ranks() / mesh.copies, mesh.ep, mesh.cp}) {
    if (count % machine.node_ranks != 0 && machine.node_ranks % count != 0) {
      refuse(fmt::format("groups of {} ranks lie across nodes of {} differently", count,
                         machine.node_ranks));
    }
  }
  std::vector<int> ranks;
  for (int64_t stage = 0; stage < mesh.pp; ++stage) {
    ranks.push_back(static_cast<int>(stage * mesh.stage_ranks()));
  }
  return ranks;
}

void plan_rank(RankEnvironment& environment, const Config& config, RankPlan& plan) {
  Rank rank(config, environment);
  rank.ops.totals = nullptr;
  TrainStep step(rank, config.model);
  // What a run does once is not part of a step: gradient slots are made, and zeroed, before it.
  for (const auto& group : step.model().groups()) group->begin_step();
  rank.finish_step();
  rank.host.wait(barrier({.communicator = *rank.world, .stream = rank.comm}));
  auto& clock = static_cast<VirtualRank&>(*environment.shape_only());
  clock.restart();
  rank.ops.totals = &rank.totals;
  const ShapeOnlySequences source(config);
  rank.step = 1;
  environment.set_step(1);
  step.accumulate(source, 0);
  step.update(1, config.optimizer.lr,
              config.logging.digest_every_steps == 1 ? WithDigests::yes : WithDigests::no);
  const RankTimes times = clock.times();
  plan.rank = rank.at.rank;
  plan.step_ns = times.step_ns;
  plan.busy_ns = times.busy_ns;
  plan.exposed_ns = times.exposed_ns;
  plan.peers_ns = times.peers_ns;
  plan.pipeline_ns = times.pipeline_ns;
  plan.host_ns = times.host_ns;
  plan.transfer_ns = times.transfer_ns;
  plan.extrapolated_ns = times.extrapolated_ns;
  plan.op_ns = times.op_ns;
  count_calls(rank, plan);
}

void summarize(const Config& config, const Derived& derived, const Machine& machine,
               PlanReport& report) {
  double busy = 0, exposed = 0, pipeline = 0, extrapolated = 0;
  for (const RankPlan& rank : report.by_rank) {
    report.step_ns = std::max(report.step_ns, rank.step_ns);
    busy += static_cast<double>(rank.busy_ns);
    exposed += static_cast<double>(rank.exposed_ns);
    pipeline += static_cast<double>(rank.pipeline_ns + rank.peers_ns);
    extrapolated += static_cast<double>(rank.extrapolated_ns);
  }
  const double seconds = 1e-9 * static_cast<double>(std::max<int64_t>(1, report.step_ns));
  const double all =
      static_cast<double>(report.step_ns) * static_cast<double>(report.by_rank.size());
  const auto tokens = static_cast<double>(derived.tokens_per_step);
  const double devices = machine.is_shared ? 1 : static_cast<double>(report.ranks);
  report.tokens_per_s_per_rank = tokens / seconds / static_cast<double>(report.ranks);
  report.mfu =
      derived.training_flops_per_token * tokens / seconds / devices / machine.peak_flops_per_s;
  report.exposed_share = exposed / all;
  report.pipeline_share = config.parallel.pp == 1 ? 0 : pipeline / all;
  report.extrapolated_share = extrapolated / std::max(1.0, busy);
}

}  // namespace

PlanReport plan_step(const PlanRun& run) {
  const Config& config = run.config;
  const Derived derived = derive(config, ConfigUse::planned);
  const Machine machine = load_machine(run.machine);
  check_fits_machine(config, machine);
  if (run.trace != nullptr) *run.trace = Trace{};
  VirtualTime time(machine, config, run.trace);
  ClusterOptions cluster;
  cluster.ranks = static_cast<int>(derived.ranks);
  cluster.time = &time;
  cluster.stack_bytes = kPlanStackBytes;
  if (run.folding == Folding::on) {
    cluster.only_ranks = folded_ranks(config, machine, time.routing());
  }
  PlanReport report;
  report.machine = machine.name;
  report.ranks = derived.ranks;
  report.device_bytes = machine.memory_bytes;
  report.device_reserved_bytes = machine.reserved_bytes;
  const size_t simulated =
      cluster.only_ranks.empty() ? static_cast<size_t>(derived.ranks) : cluster.only_ranks.size();
  report.by_rank.resize(simulated);
  const int64_t ranks_each = derived.ranks / static_cast<int64_t>(simulated);
  run_cluster(cluster, [&](RankEnvironment& environment) {
    plan_rank(environment, config, report.by_rank[environment.rank() / ranks_each]);
  });
  report.links_extrapolated = time.links_extrapolated();
  summarize(config, derived, machine, report);
  return report;
}

}  // namespace cambium::sim
