// The wiring: how ranks come to life. The one place where src/ meets sim/.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "src/base/arena.h"
#include "src/comm/rank_environment.h"
#include "src/config/config.h"

namespace cambium {

struct LaunchOptions {
  int64_t ranks = 1;
  int64_t workers = 0;         // worker threads; 0 = the machine's cores
  uint64_t schedule_seed = 0;  // 0 = rank order; else a seeded random schedule
  Poison poison = Poison::off;
  std::vector<FaultConfig> faults;  // those of the communicator strike; others are the trainer's
};

namespace launch_detail {
void launch(const LaunchOptions& options, void (*main)(void* body, RankEnvironment& environment),
            void* body);
}

// Runs body(environment) once per rank, all ranks simulated in this process.
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

}  // namespace cambium
