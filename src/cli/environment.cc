// Launcher variables to a rank and a world size, and those to a transport.
#include "src/cli/environment.h"

#include <algorithm>
#include <charconv>
#include <cstring>

#include "kernels/op.h"
#include "src/base/error.h"

namespace cambium {

namespace {

// The variables by which launchers number their processes; the innermost launcher first, because
// torchrun and mpirun run inside srun's allocations.
struct LauncherVariables {
  const char* launcher;
  const char* rank;
  const char* world_size;
  const char* local_rank;
  const char* job;
};
constexpr LauncherVariables kLaunchers[] = {
    {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"},
    {"mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
     "PMIX_NAMESPACE"},
    {"mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "PMI_JOBID"},
    {"srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID"},
    {"srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID"},
};
// Processes of this launcher on this host.
constexpr const char* kLocalSizes[] = {"LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE",
                                       "MPI_LOCALNRANKS"};
constexpr const char* kOtherVariables[] = {"MASTER_ADDR",
                                           "MASTER_PORT",
                                           "SLURM_STEP_ID",
                                           "SLURM_STEP_NODELIST",
                                           "SLURM_JOB_NODELIST",
                                           "TORCHELASTIC_USE_AGENT_STORE",
                                           "TORCHELASTIC_RESTART_COUNT",
                                           "NO_COLOR",
                                           "TERM"};
constexpr int kDefaultPort = 29500;
constexpr int kFirstJobPort = 20000;  // of 10,000 that srun's job numbers choose from

bool is_heeded(const std::string& name) {
  for (const LauncherVariables& row : kLaunchers) {
    for (const char* each : {row.rank, row.world_size, row.local_rank, row.job}) {
      if (name == each) return true;
    }
  }
  const auto is_name = [&](const char* each) { return name == each; };
  return std::any_of(std::begin(kLocalSizes), std::end(kLocalSizes), is_name) ||
         std::any_of(std::begin(kOtherVariables), std::end(kOtherVariables), is_name);
}

int parse_variable(const std::string& name, const std::string& text) {
  int value = -1;
  const char* const end = text.data() + text.size();
  const auto [stop, status] = std::from_chars(text.data(), end, value);
  if (status != std::errc() || stop != end || value < 0) {
    fail(ExitCode::usage,
         "environment variable {} = '{}' is not a count or number: unset it, or start with srun, "
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
    const std::string local_rank = environment.get(row.local_rank);
    if (!local_rank.empty()) process.local_rank = parse_variable(row.local_rank, local_rank);
    process.job = environment.get(row.job) + "." + environment.get("SLURM_STEP_ID") + "." +
                  environment.get("TORCHELASTIC_RESTART_COUNT");
    return process;
  }
  return std::nullopt;
}

std::string first_host(const std::string& list) {
  std::string host;
  for (size_t at = 0; at < list.size() && list[at] != ','; ++at) {
    if (list[at] != '[') {
      host += list[at];
      continue;
    }
    const size_t end = list.find_first_of("-,]", at);
    host += list.substr(at + 1, end - at - 1);
    at = std::min(list.find(']', at), list.size());
  }
  return host;
}

Endpoint rendezvous_endpoint(const Environment& environment, const LaunchedProcess& process) {
  Endpoint endpoint;
  endpoint.address = environment.get("MASTER_ADDR");
  if (endpoint.address.empty() && process.launcher == "srun") {
    const std::string step = environment.get("SLURM_STEP_NODELIST");
    endpoint.address = first_host(step.empty() ? environment.get("SLURM_JOB_NODELIST") : step);
  }
  for (const char* name : kLocalSizes) {
    const std::string size = environment.get(name);
    if (!endpoint.address.empty() || size.empty()) continue;
    if (parse_variable(name, size) == process.world_size) endpoint.address = "127.0.0.1";
  }
  if (endpoint.address.empty()) {
    fail(ExitCode::usage,
         "{} started {} processes, but nothing says where rank 0 is; next: MASTER_ADDR = its host, "
         "in the environment of every process",
         process.launcher, process.world_size);
  }
  const std::string port = environment.get("MASTER_PORT");
  const std::string slurm_job = environment.get("SLURM_JOB_ID");
  if (!port.empty()) {
    endpoint.port = parse_variable("MASTER_PORT", port);
    if (environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True") ++endpoint.port;
  } else if (!slurm_job.empty()) {
    endpoint.port = kFirstJobPort + parse_variable("SLURM_JOB_ID", slurm_job) % 10000;
  } else {
    endpoint.port = kDefaultPort;
  }
  if (endpoint.port < 1 || endpoint.port > 65535) {
    fail(ExitCode::usage, "port {} is not one of 1..65535; next: another MASTER_PORT",
         endpoint.port);
  }
  return endpoint;
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
  if (config.run.device != DeviceKind::cuda) {
    fail(ExitCode::usage,
         "run.transport = {}: {} processes exchange GPU memory, but run.device = cpu; next: "
         "run.device = cuda, or one process with run.transport = sim",
         choice_name(given), world_size);
  }
  if (!kHasCuda) {
    fail(ExitCode::usage,
         "run.transport = {}: {} processes need NCCL, which this build does not have; start one "
         "process with run.transport = sim",
         choice_name(given), world_size);
  }
  return Transport::nccl;
}

}  // namespace cambium
