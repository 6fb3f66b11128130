// cambium calibrate --links: what collectives take between the processes of a job, one GPU each, by
// size: an all-to-all, all-gather, reduce-scatter and all-reduce of 4 KiB to 1 GiB a rank. Without
// a launcher the same calls run between simulated ranks of the CPU, to 16 MiB.
//
// The time of a size is that of a call among many in a row, so that launches overlap as they do in
// a step; the median of five rows, on the slowest rank. A curve's sizes are the bytes that the
// busiest rank moves, as `cambium plan` counts them (sim/network_time.cc).
#include <unistd.h>

#include <algorithm>
#include <fstream>

#include "src/cli/commands.h"
#include "src/cli/launch.h"
#include "src/parallel/rank.h"

namespace cambium {

namespace {

constexpr int64_t kLeastBytes = 4 << 10, kMostBytes = int64_t{1} << 30, kMostBytesCpu = 16 << 20;
constexpr int64_t kBytesOfARow = 256 << 20;  // that the calls of a row move in all, at most
constexpr int64_t kMostCalls = 50, kRows = 5;

Config links_config(int64_t ranks, DeviceKind device) {
  Config config = parse_config("[model]\npreset = \"tiny\"\n", "calibrate --links", {});
  config.parallel.dp = config.train.global_batch_sequences = ranks;
  config.run.device = device;
  if (device == DeviceKind::cuda) {
    config.numerics.compute = ComputeType::bf16;
    config.run.transport = Transport::nccl;
  }
  return config;
}

// One call whose larger side holds `bytes`, on `rank.comm`.
Ticket post_collective(Rank& rank, CollectiveKind kind, int64_t bytes, const Buffer& from,
                       const Buffer& to) {
  const int64_t ranks = rank.mesh.ranks(), whole = bytes / 4, share = whole / ranks;
  switch (kind) {
    case CollectiveKind::all_gather:
      return all_gather({.communicator = *rank.world,
                         .stream = rank.comm,
                         .send = from.data(),
                         .recv = to.data(),
                         .count = share});
    case CollectiveKind::reduce_scatter:
      return reduce_scatter({.communicator = *rank.world,
                             .stream = rank.comm,
                             .send = from.data(),
                             .recv = to.data(),
                             .count = share});
    case CollectiveKind::all_reduce:
      return all_reduce({.communicator = *rank.world,
                         .stream = rank.comm,
                         .send = from.data(),
                         .recv = to.data(),
                         .count = whole});
    default: {
      const std::vector<int64_t> counts(static_cast<size_t>(ranks), share);
      return all_to_all_v({.communicator = *rank.world,
                           .stream = rank.comm,
                           .send = from.data(),
                           .recv = to.data(),
                           .send_counts = counts,
                           .recv_counts = counts});
    }
  }
}

// What every rank moves out and in, of a call whose larger side holds `bytes`.
double moved_bytes(CollectiveKind kind, int64_t bytes, int64_t ranks) {
  const double away = static_cast<double>(bytes / 4 / ranks * 4) * static_cast<double>(ranks - 1);
  return kind == CollectiveKind::all_reduce ? 2 * away : away;
}

// The slowest rank's time.
double slowest(Rank& rank, double ns) {
  const std::vector<float> own(1, static_cast<float>(ns));
  const Buffer sent = rank.upload(own, "time"), most = rank.workspace(4, "slowest time");
  rank.comm_waits_for_compute();
  rank.compute_waits(all_reduce({.communicator = *rank.world,
                                 .stream = rank.comm,
                                 .send = sent.data(),
                                 .recv = most.data(),
                                 .count = 1,
                                 .reduce = ReduceOp::max}));
  const float value = rank.read<float>(most.data(), 1).front();
  rank.finish_step();
  return value;
}

double call_ns(Rank& rank, CollectiveKind kind, int64_t bytes, const Buffer& from,
               const Buffer& to) {
  const int64_t calls = std::clamp<int64_t>(kBytesOfARow / bytes, 2, kMostCalls);
  std::vector<double> rows;
  for (int64_t row = 0; row <= kRows; ++row) {  // the first is a warm-up
    rank.host.wait(barrier({.communicator = *rank.world, .stream = rank.comm}));
    const int64_t start = rank.host.now_ns();
    Ticket last;
    for (int64_t call = 0; call < calls; ++call) {
      last = post_collective(rank, kind, bytes, from, to);
    }
    rank.host.wait(last);
    const auto taken = static_cast<double>(rank.host.now_ns() - start);
    if (row > 0) rows.push_back(taken / static_cast<double>(calls));
  }
  std::nth_element(rows.begin(), rows.begin() + kRows / 2, rows.end());
  return slowest(rank, rows[kRows / 2]);
}

std::vector<MeasuredCollective> measure_collectives(RankEnvironment& environment,
                                                    const Config& config) {
  Rank rank(config, environment);
  const int64_t most = config.run.device == DeviceKind::cuda ? kMostBytes : kMostBytesCpu;
  const Buffer from = rank.workspace(most, "sent"), to = rank.workspace(most, "received");
  rank.zero(from);
  rank.finish_step();
  std::vector<MeasuredCollective> measured;
  const int64_t ranks = rank.mesh.ranks();
  for (const CollectiveKind kind : kMeasuredCollectives) {
    for (int64_t bytes = kLeastBytes; bytes <= most; bytes *= 2) {
      const double ns = call_ns(rank, kind, bytes, from, to);
      measured.push_back({kind, ranks, moved_bytes(kind, bytes, ranks), ns});
    }
  }
  return measured;
}

// Links of one tier are measured: those within a host.
void require_one_host(Job& job) {
  char host[256] = {};
  gethostname(host, sizeof host - 1);
  if (job.rank() == 0) return job.publish("host", host);
  const std::string first = job.await("host");
  if (first == host) return;
  fail(
      ExitCode::usage,
      "calibrate --links measures the links within one host: rank 0 is on {}, rank {} on {}; next: "
      "as many processes as one host has GPUs",
      first, job.rank(), host);
}

// The name of the machine that FILE describes: here.toml describes "here".
std::string machine_name(const std::string& path) {
  std::string name = path.substr(path.rfind('/') == std::string::npos ? 0 : path.rfind('/') + 1);
  return name.substr(0, name.find(".toml"));
}

void print_curves(const std::vector<MeasuredCollective>& measured) {
  for (const MeasuredCollective& call : measured) {
    fmt::print("{:14} {:4} ranks {:14.0f} bytes {:12.1f} us {:8.2f} GB/s\n",
               collective_name(call.kind), call.ranks, call.bytes, 1e-3 * call.ns,
               call.bytes / call.ns);
  }
}

}  // namespace

int calibrate_links(const CalibrateOptions& options) {
  const std::optional<LaunchedProcess> process = launched_process(options.environment);
  const bool is_job = process && process->world_size > 1;
  if (!is_job && options.device == "cuda") {
    fail(ExitCode::usage,
         "links between GPUs are measured by one process for each; next: torchrun --nproc-per-node "
         "2 --no-python cambium calibrate --links {} --out {}",
         options.links, options.out);
  }
  if (is_job && options.device == "cpu") {
    fail(ExitCode::usage, "processes of the CPU have no transport; next: --device cuda");
  }
  const int64_t ranks = is_job ? process->world_size : options.ranks;
  const Config config = links_config(ranks, is_job ? DeviceKind::cuda : DeviceKind::cpu);
  machine_with_collectives(options.links, "checked", "nothing", {});  // refuses a wrong BASE first
  std::unique_ptr<Job> job;
  if (is_job) {
    resolve_transport(options.environment, config, static_cast<int>(ranks));
    job = join_job(options.environment, config, static_cast<int>(ranks));
  }
  std::vector<MeasuredCollective> measured;
  try {
    if (job != nullptr) require_one_host(*job);
    launch_ranks({.job = job.get(), .ranks = ranks, .device = config.run.device, .workers = 1},
                 [&](RankEnvironment& environment) {
                   const auto own = measure_collectives(environment, config);
                   if (environment.rank() == 0) measured = own;
                 });
  } catch (const Error& error) {
    if (job != nullptr) job->announce_failure(error.exit_code(), error.what());
    throw;
  }
  if (job != nullptr && job->rank() != 0) return static_cast<int>(ExitCode::done);
  const std::string source = fmt::format("cambium calibrate --links {}: {} {} on {}", options.links,
                                         ranks, is_job ? "processes over NCCL" : "simulated ranks",
                                         device_name(config.run.device));
  std::ofstream file(options.out);
  file << machine_with_collectives(options.links, machine_name(options.out), source, measured);
  if (!file.flush()) fail(ExitCode::io, "cannot write '{}'", options.out);
  print_curves(measured);
  fmt::print("{}: {} with {} measured times of collectives\n", options.out, options.links,
             measured.size());
  return static_cast<int>(ExitCode::done);
}

}  // namespace cambium
