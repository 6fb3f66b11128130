// run_cluster: a whole cluster in this process, one fiber per rank, one scheduler.
//
// Every rank runs the same `main(RankEnvironment&)`. A rank's host code runs on the calling thread
// until it waits for an event that is not complete; when no rank can go on, all streams with
// runnable tasks are drained on the worker threads until nothing can run; then the ranks whose
// events completed go on, in rank order. Given the options, every choice is fixed, and no result
// depends on the number of worker threads.
//
// With a schedule seed, fibers and single stream tasks run in a seeded random order instead: any
// order that the events and collectives allow (schedule exploration). A correct program gives the
// same bits for every seed.
//
// Errors (all as cambium::Error, the message headed by rank, step and seed):
//   22 collective mismatch: two ranks' n-th calls of a communicator differ; found at arrival.
//   23 deadlock: nothing ready, nothing runnable, ranks unfinished; exact, without a timeout.
//   A rank's own error ends the run; the other ranks' stacks are unwound.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "src/comm/race_report.h"
#include "src/comm/rank_environment.h"

namespace cambium::sim {

class RoutingModel;
class VirtualTime;

// Reductions: `rank` adds contributions 0, 1, .. n-1 in fp32 and rounds once; `ring` adds chunk c
// from rank (c+1) % n on, rounding to the dtype at every hop, as NCCL's ring does.
// `arrival` adds in the order in which ranks came, as atomics do: a mistake to be found.
enum class ReductionOrder { rank, ring, arrival };

// Faults at the communicator, each injected by one line at its site (sim/sim_communicator.cc).
enum class CommFaultKind {
  wrong_count,
  swapped_collectives,
  skipped_collective,
  rank_crash,
  stuck_rank,
  pause,
  slow_link,
  flapping_link
};
// The kind of that name in `[[faults]]`; an Error with exit code 2 for other names.
CommFaultKind comm_fault_kind(const std::string& name);
const char* comm_fault_name(CommFaultKind kind);

// Where ranks' streams run. On a GPU, N virtual ranks share it: each has its own CUDA streams, and
// collectives are device copies and fixed-order reductions with the bits of the CPU's.
enum class Device { cpu, cuda };

// One fault: strikes once, at the first call that fits on `rank` in `step` (set_step), in groups
// of two ranks or more. A run in which it finds no place ends with an Error of exit code 2.
//   wrong_count: posts one element more.
//   swapped_collectives: two consecutive calls on one stream, without a host wait between them,
//     are posted in the other order (calls that differ, or two groups that share a peer).
//   skipped_collective: does not post; without `communicator` only a payload (f32, bf16)
//     all_to_all_v is skipped, as by a rank that has no tokens to send.
//   rank_crash: the rank ends before it posts; the run ends with exit code 20.
//   stuck_rank: the rank stays alive and never posts; when its peers can do nothing more, the run
//     ends with exit code 21, as the watchdog of a real job would end it.
//   pause: the rank stops for `delay_ns` of virtual time before it posts, and goes on.
//   slow_link: each of the rank's transfers in the step starts `delay_ns` after its turn came.
//   flapping_link: the link is down for `delay_ns` at every other transfer of the step.
// Where these make a rank wait for longer than `watchdog_ns`, the run ends with exit code 21.
struct CommFault {
  CommFaultKind kind = CommFaultKind::wrong_count;
  int rank = 0;
  int64_t step = 1;
  std::string communicator = {};  // empty = any
  int64_t skip_calls = 0;         // fitting calls that are left alone first
  int64_t delay_ns = 0;           // virtual
  int64_t struck = 0;             // calls so far
};

// Race detection (sim/race_detector.h): on the CPU, streams one after another.
enum class Races { ignored, detected };

// How a seed explores. `random` draws every choice evenly; `pct` gives every fiber and stream a
// random priority and lowers the leader's at two random moments (Burckhardt et al., ASPLOS 2010).
// Both let some transfers start late (on the CPU), in virtual time, which is a choice as well.
enum class Exploration { random, pct };

// Choices of an explored run that were not the oldest candidate: what replays it.
struct Deviation {
  uint64_t decision = 0;
  uint32_t choice = 0;
  bool operator==(const Deviation&) const = default;
};
using ScheduleTape = std::vector<Deviation>;
std::string tape_text(const ScheduleTape& tape);  // "12:3,57:1"; "fifo" without deviations
ScheduleTape parse_tape(const std::string& text);

// Waits that do nothing, to see what they are good for: those of WaitSites whose name holds `site`,
// on one rank or on all (-1). Needs race detection.
struct LeftOutWait {
  std::string site = {};
  int rank = -1;
};

struct ClusterOptions {
  int ranks = 1;
  Device device = Device::cpu;
  Workers* workers = nullptr;  // null = a pool of `worker_threads` for this run
  int worker_threads = 1;
  uint64_t schedule_seed = 0;  // 0 = rank order
  Exploration exploration = Exploration::random;
  const ScheduleTape* replay = nullptr;  // instead of a seed's choices
  ScheduleTape* record = nullptr;        // an explored run's deviations, of a failing one too
  std::vector<int> slow_ranks = {};      // explored runs: go on only when no other rank can
  Poison poison = Poison::off;
  bool cuda_graphs = false;  // of launches that repeat: one rank on a GPU, nothing explored
  ReductionOrder reduction_order = ReductionOrder::rank;
  std::vector<CommFault> faults = {};
  int64_t watchdog_ns = INT64_MAX;  // of virtual time that a rank may wait for a delayed one
  // Transfers that a rank's device holds at a time, from when they reach their stream's head until
  // their peers came (0 = any number). One finds collectives of two streams whose order nothing
  // fixes: on a GPU that has no room for both kernels, ranks that start different ones deadlock.
  int transfer_slots = 0;
  Races races = Races::ignored;
  LeftOutWait left_out_wait = {};
  // Shape-only: nothing is computed, ops and transfers take their virtual time (one thread).
  VirtualTime* time = nullptr;
  // Shape-only without time: ops do nothing, transfers meet, and are compared, but move nothing.
  // Step s routes by the (s - 1)-th of these, in turn; a fault may find no place.
  std::vector<RoutingModel>* matching = nullptr;
  // Folding: the ranks that stand for all; the others' calls are taken for theirs. Empty = all.
  std::vector<int> only_ranks = {};
  int64_t stack_bytes = 1 << 20;  // per rank; only touched pages cost memory
};

bool is_simulated(const ClusterOptions& options, int rank);

// What a run did, for tests and benchmarks.
struct ClusterReport {
  int64_t fiber_switches = 0;
  int64_t compute_phases = 0;
  int64_t tasks = 0;
  int64_t virtual_ns = 0;  // that delays took, injected ones and drawn ones
  RaceReport races;
};

namespace cluster_detail {
using RankMain = void (*)(void* body, RankEnvironment& environment);
ClusterReport run(const ClusterOptions& options, RankMain main, void* body);
}  // namespace cluster_detail

// Runs body(environment) once per rank and returns when all returned. All streams of a rank must be
// idle when its body returns (wait for the last event): its buffers die with it.
// NOTE: a body never waits inside `catch`: store what is needed and wait after the handler.
template <class Body>
ClusterReport run_cluster(const ClusterOptions& options, Body&& body) {
  auto* pointer = std::addressof(body);  // of a callable object or of a function
  return cluster_detail::run(
      options,
      [](void* stored, RankEnvironment& environment) {
        (**static_cast<decltype(pointer)*>(stored))(environment);
      },
      &pointer);
}

}  // namespace cambium::sim
