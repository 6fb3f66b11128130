// The environment variables that Cambium heeds, read once by `main` and passed down.
#pragma once

#include <map>
#include <optional>
#include <string>

#include "src/comm/tcp.h"
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
  int local_rank = -1;  // among the processes of its host; -1 = not told
  std::string job;      // what the launcher calls this job; may be empty
};

// From the rank variables; none when no launcher set them. Exit 2 when they make no sense.
std::optional<LaunchedProcess> launched_process(const Environment& environment);

// Where rank 0 listens: MASTER_ADDR, else the first host of srun's list, else this host when every
// process is on it; MASTER_PORT, else a port made from srun's job number, else 29500. torchrun's
// agent listens on MASTER_PORT itself, so there it is the next one. Exit 2 when nothing tells.
Endpoint rendezvous_endpoint(const Environment& environment, const LaunchedProcess& process);

// The first host of a list as srun writes it: "gpu03" of "gpu[03-07,12],login1".
std::string first_host(const std::string& list);

// What run.transport = auto means here, and whether the given one can be used (design.md section
// 2): rank variables with a world size equal to `ranks` mean nccl; none, or a world size of 1,
// mean sim; anything else exits 2, as does nccl in a build without NCCL.
Transport resolve_transport(const Environment& environment, const Config& config, int ranks);

}  // namespace cambium
