// The simulator's own speed: a switch of fibers, and events of runs that compute nothing.
//
//   cambium_bench --benchmark_filter=sim_
// sim_fiber_switch: into a fiber and back are two switches; the time shown is one.
// sim_events: virtual-time runs of ranks that launch ops and collectives; an event is an op charged
// or a rank's transfer completed. sim_rendezvous: the same transfers with data, a barrier of all.
#include <benchmark/benchmark.h>

#include "sim/cluster.h"
#include "sim/fiber.h"
#include "sim/machine.h"
#include "sim/virtual_time.h"

namespace cambium::sim {
namespace {

constexpr int64_t kSwitches = 1'000'000;

struct Bouncer {
  Fiber* fiber = nullptr;
  int64_t left = 0;
  static void bounce(void* argument) {
    auto& bouncer = *static_cast<Bouncer*>(argument);
    while (--bouncer.left > 0) bouncer.fiber->suspend();
  }
};

void sim_fiber_switch(benchmark::State& state) {
  for (auto _ : state) {
    Bouncer bouncer{nullptr, kSwitches / 2};
    Fiber fiber(64 << 10, &Bouncer::bounce, &bouncer);
    bouncer.fiber = &fiber;
    while (!fiber.finished()) fiber.resume();
  }
  state.SetItemsProcessed(state.iterations() * kSwitches);
}
BENCHMARK(sim_fiber_switch)->Unit(benchmark::kMillisecond);

constexpr int64_t kRounds = 2000, kOpsOfARound = 20;

void events(RankEnvironment& environment) {
  std::vector<int> members;
  for (int rank = 0; rank < environment.ranks(); ++rank) members.push_back(rank);
  Stream& compute = environment.make_stream("compute");
  Stream& comm = environment.make_stream("comm");
  const auto world = environment.make_communicator("world", members);
  float send[4], recv[4];
  Ticket last;
  for (int64_t round = 0; round < kRounds; ++round) {
    for (int64_t op = 0; op < kOpsOfARound; ++op) {
      environment.shape_only()->charge(
          {.op = "copy_bytes", .shape_key = {1 << 20}, .flops = 0, .bytes = 2 << 20}, compute);
    }
    comm.wait(compute.record());
    last = all_reduce(
        {.communicator = *world, .stream = comm, .send = send, .recv = recv, .count = 4});
    compute.wait(last);
  }
  environment.host().wait(compute.record());
}

void sim_events(benchmark::State& state) {
  const auto ranks = static_cast<int>(state.range(0));
  const Machine machine = load_machine("dgx-h200");
  Config config = parse_config("[model]\npreset = \"tiny\"\n", "sim_events", {});
  config.parallel.dp = config.train.global_batch_sequences = ranks;
  for (auto _ : state) {
    VirtualTime time(machine, config, nullptr);
    run_cluster({.ranks = ranks, .time = &time, .stack_bytes = 256 << 10}, events);
  }
  state.SetItemsProcessed(state.iterations() * ranks * kRounds * (kOpsOfARound + 1));
}
BENCHMARK(sim_events)->Arg(8)->Arg(64)->Unit(benchmark::kMillisecond);

void sim_rendezvous(benchmark::State& state) {
  const auto ranks = static_cast<int>(state.range(0));
  for (auto _ : state) {
    run_cluster({.ranks = ranks}, [](RankEnvironment& environment) {
      std::vector<int> members;
      for (int rank = 0; rank < environment.ranks(); ++rank) members.push_back(rank);
      Stream& comm = environment.make_stream("comm");
      const auto world = environment.make_communicator("world", members);
      for (int64_t round = 0; round < kRounds; ++round) {
        environment.host().wait(barrier({.communicator = *world, .stream = comm}));
      }
    });
  }
  state.SetItemsProcessed(state.iterations() * ranks * kRounds);
}
BENCHMARK(sim_rendezvous)->Arg(8)->Arg(64)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace cambium::sim
