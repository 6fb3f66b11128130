// One GPU, Qwen3-30B-A3B shapes, 4 sequences of 4,096 tokens in bf16: the MoE part of a layer alone
// (router to combine), a decoder layer forward and backward, and a whole training step of 4 layers
// with the vocabulary of 151,936 (3.1 B parameters; loss, clip, AdamW with fp32 master weights, and
// moments in fp32 or bf16).
//
//   cambium_bench --benchmark_filter=gpu_
// Beside them: bench/peers. The layer's time is the mean of 10 in one queue, the step's the median;
// TFLOP/s count a causal score matrix as half a square. Printed with the GPU's peak memory.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <array>
#include <numeric>

#include "kernels/cuda_stream.h"
#include "src/base/philox.h"
#include "src/cli/launch.h"
#include "src/model/layer_tools.h"
#include "src/train/synthetic.h"
#include "src/train/train_step.h"

namespace cambium {

namespace {

constexpr int64_t kSequences = 4, kSequenceLength = 4096;
constexpr const char* kNoGpu = "skipped: no GPU";
const LaunchOptions kOneGpu{.ranks = 1, .device = DeviceKind::cuda, .cuda_graphs = true};

Config gpu_config(int64_t layers, int64_t vocab, const char* state_dtype = "fp32") {
  return parse_config(
      fmt::format("[model]\npreset = \"qwen3-30b-a3b\"\nlayers = {}\nvocab = {}\n[train]\n"
                  "global_batch_sequences = {}\nmicro_batch_sequences = {}\nsteps = 1000\n"
                  "sequence_length = {}\n[data]\ndocument_mask = false\n[run]\n"
                  "device = \"cuda\"\n[optimizer]\nstate_dtype = \"{}\"\n",
                  layers, vocab, kSequences, kSequences, kSequenceLength, state_dtype),
      "gpu_step_bench", {});
}

// Embeddings of variance 1, as the peers' are, rows repeated: beside smaller ones the sums of
// attention, much the same at all late positions, would send most tokens to the same experts.
void spread_tokens(Model& model) {
  constexpr int64_t kDrawn = int64_t{1} << 22;
  std::vector<float> drawn(kDrawn);
  fill_normal(drawn.data(), 0, kDrawn, 1.0f, 1, 1);
  for (const auto& group : model.groups()) {
    for (const ParamPiece& piece : group->stored_pieces()) {
      if (piece.tensor->canonical.role != TensorRole::embed) continue;
      std::vector<float> values(static_cast<size_t>(piece.elements));
      for (size_t i = 0; i < values.size(); ++i) values[i] = drawn[i % drawn.size()];
      group->set_weights(piece, values);
      group->refresh_compute_copy();
    }
  }
}

// Rows of the busiest expert over the mean, layers alike; of experts drawn at random it is 1.1.
void report_loads(benchmark::State& state, Model& model) {
  const int64_t layers = model.config().layers, experts = model.config().experts;
  std::vector<int32_t> count(static_cast<size_t>(layers * experts));
  if constexpr (kHasCuda) {
    cuda::copy_bytes(model.router().count_LE.data(), count.data(), 4 * std::ssize(count));
  }
  const double sum = std::accumulate(count.begin(), count.end(), 0.0);
  state.counters["busiest/mean"] =
      *std::max_element(count.begin(), count.end()) * static_cast<double>(layers * experts) / sum;
}

// Batches drawn before the clock runs, as the peers' are: drawing one takes the host milliseconds.
class DrawnSequences : public SequenceSource {
 public:
  explicit DrawnSequences(const Config& config) {
    const SyntheticSequences source(config);
    for (size_t i = 0; i < batches_.size(); ++i) {
      source.fill(static_cast<int64_t>(i), {0, kSequences}, batches_[i]);
      draw_tokens(config.model.vocab, static_cast<uint64_t>(i), batches_[i]);
      counts_[i] = source.target_count(static_cast<int64_t>(i));
    }
  }
  void fill(int64_t batch_index, SequenceRange range, Batch& batch) const override {
    CHECK_EQ(range.sequence_count, kSequences);
    batch = batches_[static_cast<size_t>(batch_index) % batches_.size()];
  }
  int64_t target_count(int64_t batch_index) const override {
    return counts_[static_cast<size_t>(batch_index) % batches_.size()];
  }

 private:
  // All tokens alike likely, as the peers draw theirs.
  static void draw_tokens(int64_t vocab, uint64_t batch_index, Batch& batch) {
    const RandomSequence random{1, RandomStream::data, batch_index};
    for (size_t i = 0; i < batch.token_T.size(); ++i) {
      const double u = random_uniform(random, i);
      batch.token_T[i] = static_cast<int32_t>(u * static_cast<double>(vocab));
    }
  }

  std::array<Batch, 4> batches_;
  std::array<int64_t, 4> counts_{};
};

bool has_gpu(benchmark::State& state) {
  try {
    require_device(DeviceKind::cuda, 0);
    return kHasCuda;
  } catch (const Error&) {
    state.SkipWithError(kNoGpu);
    return false;
  }
}

void report(benchmark::State& state, double seconds, double flops, const Rank& rank) {
  state.SetIterationTime(seconds);
  state.counters["TFLOP/s"] = 1e-12 * flops / seconds;
  state.counters["tokens/s"] = static_cast<double>(kSequences * kSequenceLength) / seconds;
  state.counters["peak_GB"] = 1e-9 * static_cast<double>(rank.arena.peak_bytes());
}

// One more step with events around every op: where its time goes, largest first, to stderr.
void print_op_times(Rank& rank, TrainStep& step, const SequenceSource& source, int64_t now) {
  if constexpr (kHasCuda) {
    cuda::EventTimer timer;
    rank.ops.timer = &timer;
    step.accumulate(source, now - 1);
    step.update(now, 1e-4, WithDigests::no);
    rank.ops.timer = nullptr;
    std::map<std::string, double> totals;
    for (const auto& [cost, ms] : timer.take_ms()) totals[cost.op] += ms;
    std::vector<std::pair<double, std::string>> rows;
    double sum = 0;
    for (const auto& [op, ms] : totals) {
      rows.emplace_back(ms, op);
      sum += ms;
    }
    std::sort(rows.rbegin(), rows.rend());
    for (const auto& [ms, op] : rows) {
      fmt::print(stderr, "{:9.3f} ms  {:4.1f} %  {}\n", ms, 100 * ms / sum, op);
    }
    fmt::print(stderr, "{:9.3f} ms in all ops\n", sum);
  }
}

// Seconds of one call, the mean of `counted` in one queue; then one more, which a profiler records
// (bench/timeline).
template <class Body>
double mean_seconds(Rank& rank, int warm_up, int counted, Body&& body) {
  for (int i = 0; i < warm_up; ++i) body();
  rank.host.wait(rank.compute.record());
  const int64_t start = rank.host.now_ns();
  for (int i = 0; i < counted; ++i) body();
  rank.host.wait(rank.compute.record());
  const double seconds = 1e-9 * static_cast<double>(rank.host.now_ns() - start) / counted;
  if constexpr (kHasCuda) {
    const cuda::StepProfile profile;
    body();
    rank.host.wait(rank.compute.record());
  }
  return seconds;
}

enum class Passes { forward, both };

// As a step's first micro-batch: weight gradients are stored.
void begin_step(const Model& model) {
  for (const auto& group : model.groups()) group->begin_step();
}

// Router, routing, experts and combination of one layer, from the second norm's output on.
void run_moe(Model& model, const MicroBatch& batch, LayerState& attended, Buffer& d_out_TD,
             Passes passes) {
  const LayerContext c = model.layer_context(0);
  LayerState s;
  s.mlp_normed_TD = std::move(attended.mlp_normed_TD);
  s.sum_TD = std::move(attended.sum_TD);
  router_forward(c, batch, s);
  plan_dispatch(c, batch, s);
  dispatch_forward(c, batch, s);
  expert_forward(c, batch, s);
  combine_forward(c, batch, s);
  Buffer out_TD = aggregate_forward(c, batch, s);
  if (d_out_TD.empty()) d_out_TD = std::move(out_TD);
  if (passes == Passes::both) {
    LayerGradients g;
    g.d_out_TD = std::move(d_out_TD);
    model.begin_layer(0, batch);
    aggregate_backward(c, batch, s, g);
    expert_backward_input(c, s, g);
    expert_backward_weight(c, s, g);
    dispatch_backward(c, s, g);
    router_backward(c, batch, s, g);
    model.end_layer(0);
    d_out_TD = std::move(g.d_out_TD);
  }
  attended.mlp_normed_TD = std::move(s.mlp_normed_TD);
  attended.sum_TD = std::move(s.sum_TD);
}

void gpu_moe(benchmark::State& state) {
  if (!kHasCuda || !has_gpu(state)) return state.SkipWithError(kNoGpu);
  const Config config = gpu_config(1, 65536);
  const DrawnSequences source(config);
  const ModelConfig& m = config.model;
  const Passes passes = state.range(0) == 0 ? Passes::forward : Passes::both;
  const double flops = (passes == Passes::both ? 18.0 : 6.0) * kSequences * kSequenceLength *
                       static_cast<double>(m.top_k * m.hidden * m.expert_hidden);
  for (auto _ : state) {
    launch_ranks(kOneGpu, [&](RankEnvironment& environment) {
      Rank rank(config, environment);
      TrainStep step(rank, config.model);
      Model& model = step.model();
      model.initialize(1);
      spread_tokens(model);
      step.begin(0, source);
      {
        const MicroBatch batch = step.upload_micro_batch(source, 0, 0);
        LayerState attended;
        attend_forward(model.layer_context(0), batch, model.embed(batch), attended);
        Buffer d_out_TD;
        const double seconds = mean_seconds(rank, 5, 20, [&] {
          begin_step(model);
          run_moe(model, batch, attended, d_out_TD, passes);
        });
        report(state, seconds, flops, rank);
        report_loads(state, model);
      }
      rank.finish_step();
    });
  }
}

void gpu_layer(benchmark::State& state) {
  if (!kHasCuda || !has_gpu(state)) return state.SkipWithError(kNoGpu);
  const Config config = gpu_config(1, 65536);
  const Derived derived = derive(config);
  const DrawnSequences source(config);
  const double head_flops = 6.0 * static_cast<double>(config.model.vocab * config.model.hidden);
  const double flops = (derived.training_flops_per_token - head_flops) *
                       static_cast<double>(derived.tokens_per_step);
  for (auto _ : state) {
    launch_ranks(kOneGpu, [&](RankEnvironment& environment) {
      Rank rank(config, environment);
      TrainStep step(rank, config.model);
      Model& model = step.model();
      model.initialize(1);
      spread_tokens(model);
      step.begin(0, source);
      {
        const MicroBatch batch = step.upload_micro_batch(source, 0, 0);
        const double seconds = mean_seconds(rank, 3, 10, [&] {
          begin_step(model);
          LayerState layer;
          LayerGradients gradients;
          gradients.d_out_TD =
              model.layer_forward(batch, 0, model.embed(batch), layer, Keep::for_backward);
          model.begin_layer(0, batch);
          model.layer_backward(batch, 0, layer, gradients);
          model.end_layer(0);
        });
        report(state, seconds, flops, rank);
        report_loads(state, model);
      }
      rank.finish_step();
    });
  }
}

void gpu_step(benchmark::State& state) {
  if (!kHasCuda || !has_gpu(state)) return state.SkipWithError(kNoGpu);
  const Config config = gpu_config(4, 151936, state.range(0) == 0 ? "fp32" : "bf16");
  const Derived derived = derive(config);
  const DrawnSequences source(config);
  constexpr int64_t kWarmUp = 3, kCounted = 9;
  for (auto _ : state) {
    std::vector<int64_t> times;
    launch_ranks(kOneGpu, [&](RankEnvironment& environment) {
      Rank rank(config, environment);
      TrainStep step(rank, config.model);
      step.model().initialize(1);
      spread_tokens(step.model());
      rank.finish_step();
      for (int64_t now = 1; now <= kWarmUp + kCounted; ++now) {
        const int64_t start = rank.host.now_ns();
        step.accumulate(source, now - 1);
        step.update(now, 1e-4, WithDigests::no);
        if (now > kWarmUp) times.push_back(rank.host.now_ns() - start);
      }
      print_op_times(rank, step, source, kWarmUp + kCounted + 1);
      std::nth_element(times.begin(), times.begin() + kCounted / 2, times.end());
      report(state, 1e-9 * static_cast<double>(times[kCounted / 2]),
             derived.training_flops_per_token * static_cast<double>(derived.tokens_per_step), rank);
      report_loads(state, step.model());
    });
  }
}

BENCHMARK(gpu_moe)
    ->ArgName("with_backward")
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond)
    ->Iterations(1)
    ->Arg(0)
    ->Arg(1);
BENCHMARK(gpu_layer)->UseManualTime()->Unit(benchmark::kMillisecond)->Iterations(1);
BENCHMARK(gpu_step)
    ->ArgName("bf16_state")
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond)
    ->Iterations(1)
    ->Arg(0)
    ->Arg(1);

}  // namespace

}  // namespace cambium
