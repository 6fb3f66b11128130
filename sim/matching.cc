#include "sim/matching.h"

#include "sim/cluster.h"
#include "sim/routing.h"
#include "src/config/derive.h"
#include "src/train/plan_report.h"

namespace cambium::sim {

namespace {

constexpr int64_t kMatchingStackBytes = 256 << 10;

void match_rank(RankEnvironment& environment, const Config& config, int64_t steps) {
  Rank rank(config, environment);
  rank.ops.totals = nullptr;
  TrainStep step(rank, config.model);
  const ShapeOnlySequences source(config);
  const bool has_digests = config.logging.digest_every_steps == 1;
  for (int64_t now = 1; now <= steps; ++now) {
    rank.step = now;
    environment.set_step(now);
    step.accumulate(source, now - 1);
    step.update(now, config.optimizer.lr, has_digests ? WithDigests::yes : WithDigests::no);
  }
}

}  // namespace

int64_t prove_matching(const MatchingProof& proof) {
  const Config& config = proof.config;
  CHECK(config.faults.empty());
  const Derived derived = derive(config, ConfigUse::planned);
  std::vector<RoutingModel> routing;
  routing.emplace_back(config, derived.tokens_per_micro_batch);
  Config concentrated = config;
  concentrated.plan.routing = "concentrated";
  routing.emplace_back(concentrated, derived.tokens_per_micro_batch);
  ClusterOptions cluster;
  cluster.ranks = static_cast<int>(derived.ranks);
  cluster.stack_bytes = kMatchingStackBytes;
  cluster.matching = &routing;
  cluster.faults = proof.faults;
  const ClusterReport report = run_cluster(
      cluster, [&](RankEnvironment& environment) { match_rank(environment, config, proof.steps); });
  return report.races.launches;
}

}  // namespace cambium::sim
