// The wiring: how ranks come to life. The one place where src/ meets sim/.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "src/base/arena.h"
#include "src/cli/environment.h"
#include "src/comm/job.h"
#include "src/comm/race_report.h"
#include "src/comm/rank_environment.h"
#include "src/config/config.h"
#include "src/train/measurements.h"
#include "src/train/plan_report.h"

namespace cambium {

struct LaunchOptions {
  Job* job = nullptr;  // this process is one of its ranks; null = all ranks are simulated here
  int64_t ranks = 1;
  DeviceKind device = DeviceKind::cpu;  // cuda: all simulated ranks share this process's GPU
  int64_t workers = 0;                  // worker threads; 0 = the machine's cores
  uint64_t schedule_seed = 0;           // 0 = rank order; odd random, even PCT
  std::string schedule = {};  // not empty: replays this one ("fifo", or what `schedule_taken` held)
  std::string* schedule_taken = nullptr;  // an explored run's schedule, of a failing one too
  Poison poison = Poison::off;
  RaceReport* races = nullptr;      // not null: races are looked for, and this is what was seen
  std::vector<FaultConfig> faults;  // those of the communicator strike; others are the trainer's
  FastOrder fast_order = FastOrder::rank;
  double watchdog_s = 300;   // of virtual time that a rank may wait for a delayed one
  bool cuda_graphs = false;  // of launches that repeat, where one rank has the GPU to itself
};

namespace launch_detail {
void launch(const LaunchOptions& options, void (*main)(void* body, RankEnvironment& environment),
            void* body);
}

// Collective matching and freedom from deadlock at full shape (sim/matching.h).
// Of the faults those strike that change what a rank posts. Returns how many launches were compared
// between two ranks each; an Error of exit code 22 or 23 where they do not match.
int64_t match_layout(const Config& config, int64_t steps);
// One step, shapes alone, on a machine that need not be there (sim/planner.h).
PlanReport plan_layout(const PlanRun& run);
// The text of a machine file, and of one with other measured collectives (sim/machine_writer.h).
std::string calibrated_machine(const Measurements& measured);
std::string machine_with_collectives(const std::string& base, const std::string& name,
                                     const std::string& source,
                                     const std::vector<MeasuredCollective>& collectives);

// Runs body(environment) for each rank that lives in this process.
template <class Body>
void launch_ranks(const LaunchOptions& options, Body&& body) {
  using Stored = std::remove_reference_t<Body>;
  launch_detail::launch(
      options,
      [](void* stored, RankEnvironment& environment) {
        (*static_cast<Stored*>(stored))(environment);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

int64_t worker_threads(int64_t configured);

// Makes this process a rank of the job that the launcher's variables describe, on the GPU of its
// local rank, and waits for the others. For run.transport = nccl in a build with CUDA.
std::unique_ptr<Job> join_job(const Environment& environment, const Config& config, int ranks);

// Refuses a device that this machine does not have, before anything is made: no GPU or another
// generation's (2), or one with less memory than `state_bytes` (40).
void require_device(DeviceKind device, int64_t state_bytes);
// The message's part that needs no GPU: 40 when `needed_bytes` exceeds `free_bytes`.
void require_memory(int64_t needed_bytes, int64_t free_bytes);
// bf16 products per second that the GPU can do at most, as its data sheet counts; 0 on the CPU.
double peak_flops_per_s(DeviceKind device);
// "NVIDIA H100 80GB HBM3"; "cpu" without a GPU.
std::string device_name(DeviceKind device);

}  // namespace cambium
