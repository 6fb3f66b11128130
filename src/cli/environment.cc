// Launcher variables to a rank and a world size, and those to a transport.
#include "src/cli/environment.h"

#include <charconv>
#include <cstring>

#include "src/base/error.h"

namespace cambium {

namespace {

constexpr bool kHasNccl = false;  // no build links NCCL yet

// The pairs of variables by which launchers number their processes; the innermost launcher first,
// because torchrun and mpirun run inside srun's allocations.
struct LauncherVariables {
  const char* launcher;
  const char* rank;
  const char* world_size;
};
constexpr LauncherVariables kLaunchers[] = {
    {"torchrun", "RANK", "WORLD_SIZE"},
    {"mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"},
    {"mpirun", "PMI_RANK", "PMI_SIZE"},
    {"srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"},
    {"srun", "SLURM_PROCID", "SLURM_NTASKS"},
};
constexpr const char* kOtherVariables[] = {
    "LOCAL_RANK",   "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", "MASTER_ADDR", "MASTER_PORT",
    "SLURM_JOB_ID", "SLURM_LAUNCH_NODE_IPADDR",   "NO_COLOR",      "TERM"};

bool is_heeded(const std::string& name) {
  for (const LauncherVariables& row : kLaunchers) {
    if (name == row.rank || name == row.world_size) return true;
  }
  for (const char* other : kOtherVariables) {
    if (name == other) return true;
  }
  return false;
}

int parse_variable(const std::string& name, const std::string& text) {
  int value = -1;
  const char* const end = text.data() + text.size();
  const auto [stop, status] = std::from_chars(text.data(), end, value);
  if (status != std::errc() || stop != end || value < 0) {
    fail(ExitCode::usage,
         "environment variable {} = '{}' is not a number of ranks: unset it, or start with srun, "
         "mpirun or torchrun",
         name, text);
  }
  return value;
}

}  // namespace

std::string Environment::get(const std::string& name) const {
  const auto found = variables.find(name);
  return found == variables.end() ? "" : found->second;
}

Environment read_environment(const char* const* environment) {
  Environment result;
  for (const char* const* entry = environment; entry != nullptr && *entry != nullptr; ++entry) {
    const char* const equals = std::strchr(*entry, '=');
    if (equals == nullptr) continue;
    const std::string name(*entry, equals);
    if (is_heeded(name)) result.variables[name] = equals + 1;
  }
  return result;
}

std::optional<LaunchedProcess> launched_process(const Environment& environment) {
  for (const LauncherVariables& row : kLaunchers) {
    const std::string rank = environment.get(row.rank);
    const std::string world_size = environment.get(row.world_size);
    if (rank.empty() || world_size.empty()) continue;
    LaunchedProcess process;
    process.launcher = row.launcher;
    process.rank = parse_variable(row.rank, rank);
    process.world_size = parse_variable(row.world_size, world_size);
    if (process.rank >= process.world_size) {
      fail(ExitCode::usage, "environment variable {} = {} is not below {} = {}", row.rank,
           process.rank, row.world_size, process.world_size);
    }
    return process;
  }
  return std::nullopt;
}

Transport resolve_transport(const Environment& environment, const Config& config, int ranks) {
  const Transport given = config.run.transport;
  if (given == Transport::sim) return Transport::sim;
  const std::optional<LaunchedProcess> process = launched_process(environment);
  const int world_size = process ? process->world_size : 1;
  if (given == Transport::automatic && world_size == 1) return Transport::sim;
  if (world_size != ranks) {
    fail(ExitCode::usage,
         "run.transport = {}: {} started {} processes, but the layout has {} ranks "
         "(parallel.pp * parallel.dp * parallel.cp); start {} processes, or set run.transport = "
         "sim to run every rank in one process",
         choice_name(given), process ? process->launcher : "no launcher", world_size, ranks, ranks);
  }
  if (!kHasNccl) {
    fail(ExitCode::usage,
         "run.transport = {}: {} processes need NCCL, which this build does not have; start one "
         "process with run.transport = sim",
         choice_name(given), world_size);
  }
  return Transport::nccl;
}

}  // namespace cambium
