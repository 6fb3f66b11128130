#include "src/cli/launch.h"

#include <algorithm>
#include <thread>

#include "kernels/cuda_stream.h"
#include "sim/cluster.h"

namespace cambium {

namespace {

bool is_comm_fault(const std::string& kind) {
  return kind == "wrong_count" || kind == "swapped_collectives" || kind == "skipped_collective";
}

constexpr int64_t kCudaStackBytes = 8 << 20;  // the driver and cuBLAS run on the ranks' stacks
constexpr int kComputeCapability = 90;        // of CMakeLists.txt: sm_90a
constexpr double kFlopsPerCycle = 4096;      // of one multiprocessor: 512 bf16 FMA x 4 tensor cores
constexpr double kBoostCyclesPerS = 1.83e9;  // of the H100 SXM data sheet: 989 TFLOP/s in all

}  // namespace

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
    if (cuda::device_count() == 0) {
      fail(ExitCode::usage,
           "run.device = cuda, but no GPU is visible (or the driver is older than CUDA 13); next: "
           "`cambium doctor`, or run.device = cpu with numerics.compute = bf16");
    }
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

int64_t worker_threads(int64_t configured) {
  if (configured > 0) return configured;
  return std::max<int64_t>(1, std::thread::hardware_concurrency());
}

void launch_detail::launch(const LaunchOptions& options,
                           void (*main)(void* body, RankEnvironment& environment), void* body) {
  require_device(options.device, 0);
  sim::ClusterOptions cluster;
  if (options.device == DeviceKind::cuda) {
    cluster.device = sim::Device::cuda;
    cluster.stack_bytes = kCudaStackBytes;
  }
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
