// The environment variables that Cambium heeds, read once by `main` and passed down.
#pragma once

#include <map>
#include <optional>
#include <string>

#include "src/config/config.h"

namespace cambium {

struct Environment {
  std::map<std::string, std::string> variables;
  // The variable's value; empty when it is not set.
  std::string get(const std::string& name) const;
};

// Keeps the variables of `environment` ("NAME=value", null-terminated, as `environ`) that are
// heeded: rank variables of srun, mpirun and torchrun, the rendezvous address, NO_COLOR and TERM.
Environment read_environment(const char* const* environment);

// This process as one of several that a launcher started.
struct LaunchedProcess {
  std::string launcher;  // torchrun | mpirun | srun
  int rank = 0;
  int world_size = 1;
};

// From the rank variables; none when no launcher set them. Exit 2 when they make no sense.
std::optional<LaunchedProcess> launched_process(const Environment& environment);

// What run.transport = auto means here, and whether the given one can be used (design.md section
// 2): rank variables with a world size equal to `ranks` mean nccl; none, or a world size of 1,
// mean sim; anything else exits 2, as does nccl in a build without NCCL.
Transport resolve_transport(const Environment& environment, const Config& config, int ranks);

}  // namespace cambium
