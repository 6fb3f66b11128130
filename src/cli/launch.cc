#include "src/cli/launch.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <thread>

#include "fmt/format.h"
#include "kernels/nccl_comm.h"
#include "sim/cluster.h"
#include "sim/machine_writer.h"
#include "sim/matching.h"
#include "sim/planner.h"
#include "src/base/digest.h"
#include "src/comm/nccl_environment.h"
#include "src/config/faults.h"

namespace cambium {

namespace {

constexpr int64_t kCudaStackBytes = 8 << 20;  // the driver and cuBLAS run on the ranks' stacks
constexpr int kComputeCapability = 90;        // of CMakeLists.txt: sm_90a
constexpr double kFlopsPerCycle = 4096;      // of one multiprocessor: 512 bf16 FMA x 4 tensor cores
constexpr double kBoostCyclesPerS = 1.83e9;  // of the H100 SXM data sheet: 989 TFLOP/s in all

void require_gpu() {
  if (cuda::device_count() > 0) return;
  fail(ExitCode::usage,
       "run.device = cuda, but no GPU is visible (or the driver is older than CUDA 13); next: "
       "`cambium doctor`, or run.device = cpu with numerics.compute = bf16");
}

// The process's GPU: the one of its local rank, or the only one that its launcher shows it.
int gpu_of(const std::optional<LaunchedProcess>& process) {
  const int gpus = cuda::device_count();
  const int local_rank = process && process->local_rank >= 0 ? process->local_rank : 0;
  if (gpus == 1 || !process) return 0;
  if (process->local_rank < 0 || local_rank >= gpus) {
    fail(ExitCode::usage,
         "rank {} cannot tell which of {} GPUs is its own: its local rank is {}; next: one process "
         "per GPU of a host, or CUDA_VISIBLE_DEVICES with one GPU for each process",
         process->rank, gpus,
         process->local_rank < 0 ? "unknown" : fmt::format("{}", process->local_rank));
  }
  return local_rank;
}

// The order of NCCL's sums is fixed by these. NOTE: before NCCL's first call and any thread.
void pin_nccl() {
  setenv("NCCL_ALGO", "Ring", 1);
  setenv("NCCL_PROTO", "Simple", 1);
}

// Hands the tape on, whether the run returns or throws.
struct RecordSchedule {
  const sim::ScheduleTape& tape;
  std::string* text;
  ~RecordSchedule() {
    if (text != nullptr) *text = sim::tape_text(tape);
  }
};

void add_fault(const FaultConfig& fault, sim::ClusterOptions& cluster) {
  const int rank = static_cast<int>(fault.rank);
  if (fault.kind == "missing_wait") cluster.left_out_wait = {fault.site, rank};
  if (fault.kind == "slow_rank") cluster.slow_ranks.push_back(rank);
  if (fault.kind == "arrival_order_sum") cluster.reduction_order = sim::ReductionOrder::arrival;
  if (fault_site(fault.kind) != FaultSite::communicator) return;
  const FaultPlace place = fault_place(fault);
  cluster.faults.push_back({.kind = sim::comm_fault_kind(fault.kind),
                            .rank = rank,
                            .step = fault.step,
                            .communicator = place.name,
                            .skip_calls = place.number,
                            .delay_ns = std::llround(1e9 * fault.seconds)});
}

}  // namespace

std::unique_ptr<Job> join_job(const Environment& environment, const Config& config, int ranks) {
  CHECK(kHasCuda);
  const std::optional<LaunchedProcess> process = launched_process(environment);
  JobOptions options;
  options.ranks = ranks;
  options.watchdog_s = options.arrival_limit_s = config.run.watchdog_s;
  std::string token = resolved_toml(config);
  if (process) {
    options.rank = process->rank;
    options.endpoint = rendezvous_endpoint(environment, *process);
    token += process->job;
  }
  options.token = xxh3_128(token.data(), token.size()).hex();
  if constexpr (kHasCuda) {
    require_gpu();
    pin_nccl();
    cuda::check_nccl_version();
    options.library_version = cuda::nccl_version();
    cuda::select_device(gpu_of(process));
  }
  return std::make_unique<Job>(options);
}

void require_memory(int64_t needed_bytes, int64_t free_bytes) {
  if (needed_bytes <= free_bytes) return;
  fail(
      ExitCode::out_of_memory,
      "out of memory: weights, gradients and optimizer state need {:.1f} GB before any activation; "
      "the GPU has {:.1f} GB free; next: fewer model.layers or model.experts",
      1e-9 * static_cast<double>(needed_bytes), 1e-9 * static_cast<double>(free_bytes));
}

void require_device(DeviceKind device, int64_t state_bytes) {
  if (device == DeviceKind::cpu) return;
  if constexpr (kHasCuda) {
    require_gpu();
    const cuda::DeviceInfo info = cuda::device_info();
    if (info.compute_capability != kComputeCapability) {
      fail(ExitCode::usage,
           "run.device = cuda: the kernels are built for compute capability 9.0 (H100, H200); '{}' "
           "has {}.{}; next: run.device = cpu with numerics.compute = bf16",
           info.name, info.compute_capability / 10, info.compute_capability % 10);
    }
    require_memory(state_bytes, info.free_bytes);
  }
}

double peak_flops_per_s(DeviceKind device) {
  if constexpr (kHasCuda) {
    if (device == DeviceKind::cuda) {
      return kFlopsPerCycle * kBoostCyclesPerS * cuda::device_info().multiprocessors;
    }
  }
  return 0;
}

std::string device_name(DeviceKind device) {
  if constexpr (kHasCuda) {
    if (device == DeviceKind::cuda) return cuda::device_info().name;
  }
  return "cpu";
}

std::string calibrated_machine(const Measurements& measured) { return sim::machine_text(measured); }
std::string machine_with_collectives(const std::string& base, const std::string& name,
                                     const std::string& source,
                                     const std::vector<MeasuredCollective>& collectives) {
  return sim::machine_text(sim::MeasuredLinks{base, name, source, collectives});
}
int64_t match_layout(const Config& config, int64_t steps) {
  constexpr const char* kPostOtherwise[] = {"wrong_count", "swapped_collectives",
                                            "skipped_collective"};
  sim::ClusterOptions struck;
  for (const FaultConfig& fault : config.faults) {
    if (std::ranges::find(kPostOtherwise, fault.kind) != std::end(kPostOtherwise)) {
      add_fault(fault, struck);
    }
  }
  sim::MatchingProof proof{.config = config, .steps = steps, .faults = struck.faults};
  proof.config.faults.clear();
  return sim::prove_matching(proof);
}
PlanReport plan_layout(const PlanRun& run) { return sim::plan_step(run); }

int64_t worker_threads(int64_t configured) {
  if (configured > 0) return configured;
  return std::max<int64_t>(1, std::thread::hardware_concurrency());
}

void launch_detail::launch(const LaunchOptions& options,
                           void (*main)(void* body, RankEnvironment& environment), void* body) {
  require_device(options.device, 0);
  if constexpr (kHasCuda) {
    if (options.job != nullptr) {
      for (const FaultConfig& fault : options.faults) {
        if (fault_site(fault.kind) != FaultSite::communicator) continue;
        fail(ExitCode::usage, "faults.kind = {} strikes simulated ranks; next: run.transport = sim",
             fault.kind);
      }
      const NcclOptions nccl{.job = options.job,
                             .worker_threads = static_cast<int>(worker_threads(options.workers)),
                             .poison = options.poison};
      return run_nccl_rank(nccl, main, body);
    }
  }
  sim::ClusterOptions cluster;
  if (options.device == DeviceKind::cuda) {
    cluster.device = sim::Device::cuda;
    cluster.stack_bytes = kCudaStackBytes;
  }
  cluster.ranks = static_cast<int>(options.ranks);
  cluster.worker_threads = static_cast<int>(worker_threads(options.workers));
  cluster.schedule_seed = options.schedule_seed;
  cluster.poison = options.poison;
  cluster.cuda_graphs = options.cuda_graphs;
  cluster.watchdog_ns = std::llround(1e9 * options.watchdog_s);
  if (options.fast_order == FastOrder::ring) {
    cluster.reduction_order = sim::ReductionOrder::ring;
  }
  for (const FaultConfig& fault : options.faults) add_fault(fault, cluster);
  if (options.races != nullptr) cluster.races = sim::Races::detected;
  sim::ScheduleTape replay, taken;
  if (options.schedule_seed % 2 == 0) cluster.exploration = sim::Exploration::pct;
  if (!options.schedule.empty()) {
    replay = sim::parse_tape(options.schedule);
    cluster.replay = &replay;
  }
  cluster.record = &taken;
  const RecordSchedule record{taken, options.schedule_taken};
  const sim::ClusterReport report =
      sim::run_cluster(cluster, [&](RankEnvironment& environment) { main(body, environment); });
  if (options.races != nullptr) *options.races = report.races;
}

}  // namespace cambium
