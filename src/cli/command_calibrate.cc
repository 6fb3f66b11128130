// cambium calibrate: measures this machine into a machine file, and checks one against steps that
// it was not fitted to.
//
// What is measured is the trainer's own step: every op of small configurations, timed where it runs
// (by CUDA events on a GPU), so no op needs a benchmark of its own here. On the CPU the simulated
// transfers are measured too; links between GPUs are taken from dgx-h200 until `--links` measures
// them (src/cli/calibrate_links.cc).
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <map>

#include "kernels/copy.h"
#include "kernels/cuda_stream.h"
#include "src/cli/commands.h"
#include "src/cli/launch.h"
#include "src/train/synthetic.h"

namespace cambium {

namespace {

constexpr int64_t kWarmUpSteps = 2, kTimedSteps = 7, kCheckedSteps = 15;
constexpr double kMostMeanError = 0.05;  // of step times: what a calibration promises

// A model and a micro-batch: D, heads, their width, E, k, F, V; S and sequences; layers.
struct Shapes {
  int64_t hidden, heads, head_dim, experts, top_k, expert_hidden, vocab, sequence, sequences,
      layers;
};

constexpr Shapes kCpuFit[] = {
    {32, 4, 8, 4, 2, 32, 512, 64, 2, 2},       {64, 4, 16, 8, 2, 64, 256, 64, 8, 2},
    {128, 4, 32, 8, 2, 256, 512, 128, 1, 2},   {128, 4, 32, 8, 2, 256, 1024, 128, 8, 2},
    {256, 8, 32, 8, 2, 256, 1024, 256, 2, 2},  {256, 8, 32, 32, 4, 128, 4096, 512, 1, 1},
    {512, 8, 64, 16, 4, 512, 2048, 256, 2, 1}, {128, 4, 32, 16, 4, 128, 512, 256, 4, 2},
    {64, 4, 16, 4, 2, 128, 1024, 128, 4, 2},   {192, 8, 32, 8, 4, 192, 512, 256, 1, 2},
    {384, 8, 64, 8, 2, 512, 1024, 128, 4, 1},  {96, 4, 32, 16, 4, 96, 512, 64, 16, 2},
    {256, 4, 64, 8, 2, 512, 512, 128, 4, 2},   {32, 4, 8, 8, 2, 64, 256, 128, 8, 2},
};
constexpr Shapes kCpuCheck[] = {
    {48, 4, 16, 8, 2, 48, 512, 64, 4, 2},      {96, 4, 32, 8, 2, 128, 512, 128, 4, 2},
    {128, 4, 32, 8, 2, 256, 512, 128, 4, 4},   {128, 4, 32, 8, 2, 192, 1024, 128, 2, 3},
    {160, 4, 32, 8, 2, 256, 768, 192, 2, 2},   {192, 8, 32, 8, 2, 256, 1024, 128, 4, 2},
    {192, 8, 32, 16, 4, 192, 1024, 256, 2, 2}, {256, 8, 32, 8, 2, 384, 1024, 128, 2, 2},
    {256, 8, 32, 16, 2, 256, 2048, 256, 1, 2}, {384, 8, 32, 8, 2, 384, 1024, 128, 2, 1},
    {384, 8, 64, 16, 4, 256, 2048, 256, 1, 1}, {64, 4, 16, 8, 4, 128, 512, 128, 8, 3},
};
constexpr Shapes kCudaFit[] = {
    {256, 4, 64, 8, 2, 256, 4096, 512, 1, 2},
    {1024, 16, 64, 16, 4, 512, 32000, 2048, 2, 2},
    {1024, 16, 64, 64, 8, 512, 32000, 2048, 8, 1},
    {2048, 32, 128, 128, 8, 768, 151936, 4096, 4, 1},
    {2048, 32, 128, 64, 8, 1024, 50304, 4096, 1, 2},
    {2048, 16, 128, 64, 8, 1024, 50304, 2048, 4, 1},
    {2048, 32, 128, 128, 8, 768, 32000, 8192, 2, 1},
    {4096, 32, 128, 8, 2, 4096, 32000, 4096, 1, 1},
    {4096, 32, 128, 8, 2, 2048, 32000, 2048, 8, 1},
    {1024, 8, 128, 32, 4, 768, 65536, 1024, 16, 2},
};
constexpr Shapes kCudaCheck[] = {
    {2048, 32, 128, 128, 8, 768, 151936, 4096, 4, 4},
    {2048, 32, 128, 128, 8, 768, 151936, 4096, 2, 3},
    {2048, 32, 128, 64, 8, 768, 100352, 2048, 4, 3},
    {2048, 16, 128, 64, 8, 1024, 50304, 4096, 2, 4},
    {2048, 16, 128, 64, 8, 1024, 50304, 2048, 6, 3},
    {1536, 16, 128, 64, 4, 768, 65536, 2048, 4, 3},
    {1536, 24, 64, 32, 4, 1024, 32000, 2048, 6, 3},
    {3072, 24, 128, 16, 2, 2048, 32000, 2048, 4, 2},
    {1024, 16, 64, 32, 4, 768, 32000, 2048, 6, 4},
    {4096, 32, 128, 8, 2, 3072, 32000, 4096, 2, 2},
    {2048, 32, 128, 32, 4, 1536, 50304, 4096, 3, 3},
    {1024, 8, 128, 64, 8, 512, 50304, 4096, 3, 4},
};

Config shapes_config(const Shapes& s, DeviceKind device, ReductionMode reduction) {
  Config config = parse_config(
      fmt::format(
          "[model]\npreset = \"qwen3-30b-a3b\"\nlayers = {}\nhidden = {}\nheads = {}\n"
          "kv_heads = {}\nhead_dim = {}\nexperts = {}\ntop_k = {}\nexpert_hidden = {}\n"
          "vocab = {}\n[train]\nglobal_batch_sequences = {}\nmicro_batch_sequences = {}\n"
          "sequence_length = {}\n[data]\ndocument_mask = false\n[logging]\n"
          "digest_every_steps = 1000\n[run]\ndevice = \"{}\"\n[numerics]\ncompute = \"{}\"\n",
          s.layers, s.hidden, s.heads, std::max<int64_t>(1, s.heads / 4), s.head_dim, s.experts,
          s.top_k, s.expert_hidden, s.vocab, s.sequences, s.sequences, s.sequence,
          choice_name(device), device == DeviceKind::cuda ? "bf16" : "fp32"),
      "calibrate", {});
  config.numerics.reduction = reduction;
  return config;
}

// The same tokens in every step: drawing them would take the host's time.
class RepeatedSequences : public SequenceSource {
 public:
  explicit RepeatedSequences(const Config& config) {
    const SyntheticSequences source(config);
    source.fill(0, {0, config.train.global_batch_sequences}, batch_);
    targets_ = source.target_count(0);
  }
  void fill(int64_t, SequenceRange range, Batch& batch) const override {
    CHECK_EQ(range.first_sequence, 0);
    batch = batch_;
  }
  int64_t target_count(int64_t) const override { return targets_; }

 private:
  Batch batch_;
  int64_t targets_ = 0;
};

int64_t wall_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// The median on a GPU, which is ours; the fastest on cores, whose other users are not the machine.
double typical(std::vector<double> values, DeviceKind device) {
  const auto middle = values.begin() + (device == DeviceKind::cuda ? std::ssize(values) / 2 : 0);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// Ops of the CPU, timed where they run, one at a time.
class WallTimer final : public OpTimer {
 public:
  void before(const Cost& cost, Stream&) override {
    cost_ = cost;
    start_ns_ = wall_ns();
  }
  void after(Stream&) override {
    calls.emplace_back(cost_, static_cast<double>(wall_ns() - start_ns_));
  }
  std::vector<std::pair<Cost, double>> calls;  // ns

 private:
  Cost cost_;
  int64_t start_ns_ = 0;
};

using OpCalls =
    std::map<std::pair<std::string, std::array<int64_t, 6>>, std::pair<Cost, std::vector<double>>>;

void add_calls(const std::vector<std::pair<Cost, double>>& calls, double ns_each, OpCalls& all) {
  for (const auto& [cost, time] : calls) {
    auto& entry = all[{cost.op, cost.shape_key}];
    entry.first = cost;
    entry.second.push_back(time * ns_each);
  }
}

struct MeasuredStep {
  double ns = 0;
  int64_t peak_bytes = 0;
  int64_t ops = 0;  // calls
  double host_wait_ns = 0;
};

// Steps of one rank; with `calls` the ops of further steps are timed.
MeasuredStep measure_step(const Config& config, int64_t steps, OpCalls* calls) {
  const RepeatedSequences source(config);
  MeasuredStep measured;
  launch_ranks({.ranks = 1, .device = config.run.device}, [&](RankEnvironment& environment) {
    Rank rank(config, environment);
    TrainStep step(rank, config.model);
    step.model().initialize(1);
    rank.finish_step();
    rank.arena.reset_peak();
    int64_t now = 0;
    const auto run = [&] {
      const int64_t start = wall_ns();
      step.accumulate(source, 0);
      step.update(++now, 1e-5, WithDigests::no);
      return static_cast<double>(wall_ns() - start);
    };
    for (int64_t i = 0; i < kWarmUpSteps; ++i) run();
    rank.totals.clear();
    std::vector<double> times;
    for (int64_t i = 0; i < steps; ++i) times.push_back(run());
    measured.ns = typical(times, config.run.device);
    measured.peak_bytes = rank.arena.peak_bytes();
    for (const auto& [op, totals] : rank.totals) measured.ops += totals.calls / steps;
    if (calls == nullptr) return;
    WallTimer wall;
    const auto timed_steps = [&](OpTimer& timer) {
      rank.ops.timer = &timer;
      for (int64_t i = 0; i < steps; ++i) run();
      rank.ops.timer = nullptr;
    };
    if (config.run.device == DeviceKind::cpu) {
      timed_steps(wall);
      add_calls(wall.calls, 1, *calls);
    }
    if constexpr (kHasCuda) {
      if (config.run.device == DeviceKind::cuda) {
        cuda::EventTimer timer;
        timed_steps(timer);
        add_calls(timer.take_ms(), 1e6, *calls);
      }
    }
    // A wait for an op that takes no time.
    const Buffer small = rank.workspace(256, "waited for");
    std::vector<double> waits;
    for (int i = 0; i < 50; ++i) {
      rank.zero(small);
      const int64_t start = wall_ns();
      rank.host.wait(rank.compute.record());
      waits.push_back(static_cast<double>(wall_ns() - start));
    }
    measured.host_wait_ns = typical(waits, config.run.device);
    rank.finish_step();
  });
  return measured;
}

// Simulated transfers: a barrier of few and of many ranks, and an all_gather that copies.
void measure_transfers(Measurements& measured) {
  constexpr int64_t kBytes = 4 << 20;
  constexpr int kFew = 2, kMany = 16, kCalls = 100;
  const auto per_call = [&](int ranks, int64_t bytes) {
    const int64_t start = wall_ns();
    launch_ranks({.ranks = ranks, .workers = 1}, [&](RankEnvironment& environment) {
      Stream& stream = environment.make_stream("calls");
      std::vector<int> members;
      for (int r = 0; r < ranks; ++r) members.push_back(r);
      const auto group = environment.make_communicator("group", members);
      std::vector<std::byte> data(static_cast<size_t>(std::max<int64_t>(1, bytes * ranks)));
      for (int i = 0; i < kCalls; ++i) {
        environment.host().wait(bytes == 0
                                    ? barrier({.communicator = *group, .stream = stream})
                                    : all_gather({.communicator = *group,
                                                  .stream = stream,
                                                  .send = data.data() + environment.rank() * bytes,
                                                  .recv = data.data(),
                                                  .count = bytes,
                                                  .dtype = DType::u8}));
      }
    });
    return static_cast<double>(wall_ns() - start) / kCalls;
  };
  const double few = per_call(kFew, 0), many = per_call(kMany, 0);
  measured.call_rank_ns = std::max(0.0, (many - few) / (kMany - kFew));
  measured.call_ns = std::max(1.0, few - kFew * measured.call_rank_ns);
  // Two ranks copy `kBytes` each, one after the other.
  measured.copy_bytes_per_s = 2e9 * kBytes / std::max(1.0, per_call(kFew, kBytes) - few);
}

DeviceKind chosen_device(const std::string& name) {
  bool has_gpu = false;
  if constexpr (kHasCuda) has_gpu = cuda::device_count() > 0;
  if (name == "cuda" || (name.empty() && has_gpu)) {
    require_device(DeviceKind::cuda, 0);
    if (!kHasCuda) {
      fail(ExitCode::usage, "this build has no CUDA kernels; next: `cmake --preset cuda`");
    }
    return DeviceKind::cuda;
  }
  return DeviceKind::cpu;
}

std::span<const Shapes> fit_shapes(DeviceKind device) {
  if (device == DeviceKind::cuda) return kCudaFit;
  return kCpuFit;
}
std::span<const Shapes> check_shapes(DeviceKind device) {
  if (device == DeviceKind::cuda) return kCudaCheck;
  return kCpuCheck;
}

// What the device is, and how much memory it has.
void describe_device(Measurements& measured) {
  measured.multiprocessors = static_cast<int>(worker_threads(0));
  measured.memory_bytes =
      static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  if constexpr (kHasCuda) {
    if (measured.device == DeviceKind::cuda) {
      const cuda::DeviceInfo info = cuda::device_info();
      measured.multiprocessors = info.multiprocessors;
      measured.memory_bytes = static_cast<double>(info.total_bytes);
    }
  }
}

void calibrate(const CalibrateOptions& options, DeviceKind device) {
  Measurements measured;
  const size_t slash = options.out.rfind('/');
  measured.name = options.out.substr(slash == std::string::npos ? 0 : slash + 1);
  measured.name = measured.name.substr(0, measured.name.find(".toml"));
  measured.command = fmt::format("cambium calibrate on {}", device_name(device));
  measured.device = device;
  measured.compute = device == DeviceKind::cuda ? ComputeType::bf16 : ComputeType::fp32;
  measured.peak_flops_per_s = peak_flops_per_s(device);
  describe_device(measured);
  OpCalls calls;
  std::vector<double> launches;
  for (const Shapes& shapes : fit_shapes(device)) {
    for (const ReductionMode mode : {ReductionMode::fast, ReductionMode::exact}) {
      if (device == DeviceKind::cuda && mode == ReductionMode::exact) continue;
      const Config config = shapes_config(shapes, device, mode);
      const MeasuredStep step = measure_step(config, kTimedSteps, &calls);
      fmt::print(stderr, "  hidden {}, {} experts, {} x {} tokens: {:.3f} ms\n", shapes.hidden,
                 shapes.experts, shapes.sequences, shapes.sequence, 1e-6 * step.ns);
      launches.push_back(step.ns / static_cast<double>(std::max<int64_t>(1, step.ops)));
      measured.host_wait_ns = step.host_wait_ns;
    }
  }
  // The smallest step does not fill a GPU: its ops take the host's time. On the CPU handing an op
  // over is a small part of it, measured by waiting for one that does nothing.
  measured.launch_ns =
      device == DeviceKind::cuda ? *std::ranges::min_element(launches) : measured.host_wait_ns;
  if (device == DeviceKind::cpu) measure_transfers(measured);
  for (const auto& [key, entry] : calls) {
    measured.ops.push_back({entry.first, typical(entry.second, device)});
  }
  std::ofstream file(options.out);
  file << calibrated_machine(measured);
  if (!file.flush()) fail(ExitCode::io, "cannot write '{}'", options.out);
  fmt::print("{}: {} shapes of {} ops\n", options.out, measured.ops.size(),
             std::ssize(measured.ops));
}

int check_machine(const std::string& machine, DeviceKind device) {
  double errors = 0;
  int64_t count = 0;
  bool memory_equal = true;
  fmt::print("hidden experts  tokens layers | step ms: run, plan, error | peak bytes: run, plan\n");
  for (const Shapes& shapes : check_shapes(device)) {
    Config config = shapes_config(shapes, device, ReductionMode::fast);
    const MeasuredStep run = measure_step(config, kCheckedSteps, nullptr);
    const PlanReport plan = plan_layout({.config = config, .machine = machine});
    const double error = static_cast<double>(plan.step_ns) / run.ns - 1;
    const int64_t peak = plan.fullest().peak_bytes;
    memory_equal = memory_equal && peak == run.peak_bytes;
    errors += std::abs(error);
    ++count;
    fmt::print("{:6} {:7} {:7} {:6} | {:10.3f} {:10.3f} {:+6.1f} % | {} {}{}\n", shapes.hidden,
               shapes.experts, shapes.sequences * shapes.sequence, shapes.layers, 1e-6 * run.ns,
               1e-6 * static_cast<double>(plan.step_ns), 100 * error, run.peak_bytes, peak,
               peak == run.peak_bytes ? "" : " DIFFERENT");
  }
  const double mean = errors / static_cast<double>(count);
  fmt::print("mean error of {} steps not used in the fit: {:.1f} %; memory {}\n", count, 100 * mean,
             memory_equal ? "equal to the byte" : "DIFFERS");
  return static_cast<int>(mean <= kMostMeanError && memory_equal ? ExitCode::done
                                                                 : ExitCode::verification_mismatch);
}

}  // namespace

int command_calibrate(const CalibrateOptions& options) {
  if (options.out.empty() && options.check.empty()) {
    fail(ExitCode::usage, "give --out FILE to measure this machine, or --check FILE");
  }
  if (!options.links.empty()) return calibrate_links(options);
  const DeviceKind device = chosen_device(options.device);
  if (!options.check.empty()) return check_machine(options.check, device);
  calibrate(options, device);
  return static_cast<int>(ExitCode::done);
}

}  // namespace cambium
