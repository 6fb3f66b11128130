#include "src/cli/launch.h"

#include <algorithm>
#include <thread>

#include "sim/cluster.h"

namespace cambium {

namespace {

bool is_comm_fault(const std::string& kind) {
  return kind == "wrong_count" || kind == "swapped_collectives" || kind == "skipped_collective";
}

}  // namespace

int64_t worker_threads(int64_t configured) {
  if (configured > 0) return configured;
  return std::max<int64_t>(1, std::thread::hardware_concurrency());
}

void launch_detail::launch(const LaunchOptions& options,
                           void (*main)(void* body, RankEnvironment& environment), void* body) {
  sim::ClusterOptions cluster;
  cluster.ranks = static_cast<int>(options.ranks);
  cluster.worker_threads = static_cast<int>(worker_threads(options.workers));
  cluster.schedule_seed = options.schedule_seed;
  cluster.poison = options.poison;
  for (const FaultConfig& fault : options.faults) {
    if (!is_comm_fault(fault.kind)) continue;
    cluster.faults.push_back({.kind = sim::comm_fault_kind(fault.kind),
                              .rank = static_cast<int>(fault.rank),
                              .step = fault.step});
  }
  sim::run_cluster(cluster, [&](RankEnvironment& environment) { main(body, environment); });
}

}  // namespace cambium
