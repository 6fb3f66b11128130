#include "src/train/train_run.h"

#include <cmath>
#include <deque>
#include <limits>

#include "kernels/copy.h"
#include "kernels/cuda_stream.h"
#include "src/checkpoint/save_faults.h"
#include "src/optim/lr_schedule.h"

namespace cambium {

std::string checkpoint_directory(const std::string& run_directory) {
  return run_directory + "/checkpoints";
}

std::string layout_text(const Config& config) {
  const ParallelConfig& p = config.parallel;
  std::string text = fmt::format("pp {}, dp {}, cp {}, ep {}, sharding {}", p.pp, p.dp, p.cp, p.ep,
                                 choice_name(p.sharding));
  if (p.shard_ranks > 0) text += fmt::format(" over {}", p.shard_ranks);
  if (p.pp > 1) text += fmt::format(", schedule {}", choice_name(p.schedule));
  return text;
}

namespace {

constexpr int64_t kLoadChunk = int64_t{1} << 22;  // elements staged at a time while loading

// Host values to a device address, in stream order.
void upload_to(Rank& rank, Out<Real> to, const std::vector<float>& values) {
  const Buffer staged = rank.upload(values, "loaded values");
  cast_real({.from_N = {staged.f32(), DType::f32, Shape(std::ssize(values))}, .to_N = to},
            rank.ops);
}

Out<Real> part(const Out<Real>& view, int64_t first, int64_t elements) {
  return {static_cast<std::byte*>(view.data) + first * dtype_bytes(view.dtype), view.dtype,
          Shape(elements)};
}

// Device values on the host; waits.
std::vector<float> read_real(Rank& rank, In<Real> from) {
  if (from.dtype == DType::f32) return rank.read<float>(from.data, from[0]);
  const Buffer widened = rank.workspace(4 * from[0], "values to save");
  cast_real({.from_N = from, .to_N = {widened.f32(), DType::f32, Shape(from[0])}}, rank.ops);
  return rank.read<float>(widened.data(), from[0]);
}

void load_range(Rank& rank, TensorSource& source, const std::string& name, int64_t first,
                Out<Real> to) {
  const int64_t elements = to[0];
  for (int64_t done = 0; done < elements; done += kLoadChunk) {
    const int64_t count = std::min(kLoadChunk, elements - done);
    std::vector<float> values(static_cast<size_t>(count));
    source.read(name, first + done, values);
    upload_to(rank, part(to, done, count), values);
    rank.finish_step();
  }
}

std::vector<double> as_doubles(Rank& rank, const Buffer& buffer) {
  const std::vector<float> values = rank.read<float>(buffer.data(), buffer.size_bytes() / 4);
  return {values.begin(), values.end()};
}

void restore(Rank& rank, const CheckpointState& state, const char* name, const Buffer& buffer) {
  if (buffer.empty()) return;
  const auto found = state.float_arrays.find(name);
  const int64_t count = buffer.size_bytes() / 4;
  if (found == state.float_arrays.end() || std::ssize(found->second) != count) {
    fail(ExitCode::corrupt_file, "the checkpoint of step {} lacks '{}' of {} values", state.step,
         name, count);
  }
  upload_to(rank, Out<float>(buffer.f32(), Shape(count)),
            std::vector<float>(found->second.begin(), found->second.end()));
}

}  // namespace

void load_weights(TrainStep& step, TensorSource& source, LoadState what) {
  Rank& rank = step.rank();
  for (const auto& group : step.model().groups()) {
    for (const ParamPiece& piece : group->stored_pieces()) {
      load_range(rank, source, piece.tensor->canonical.name, piece.first_element,
                 Out<float>(group->weights(piece.flat_offset()), Shape(piece.elements)));
    }
    group->refresh_compute_copy();
    if (what == LoadState::weights) continue;
    for (const ParamPiece& piece : group->optimized_pieces()) {
      const std::string& name = piece.tensor->canonical.name;
      const int64_t at = piece.flat_offset();
      load_range(rank, source, "m/" + name, piece.first_element,
                 group->moment(ParamGroup::first_moment, at, piece.elements));
      load_range(rank, source, "v/" + name, piece.first_element,
                 group->moment(ParamGroup::second_moment, at, piece.elements));
    }
  }
  step.model().pass_tied_weights();
  rank.finish_step();
}

void load_checkpoint(TrainStep& step, CheckpointReader& reader) {
  load_weights(step, reader, LoadState::all);
  restore(step.rank(), reader.state(), "router.select_bias", step.model().router().select_bias_LE);
  restore(step.rank(), reader.state(), "router.fraction", step.model().router().fraction_LE);
  step.rank().finish_step();
}

void save_checkpoint(TrainStep& step, const TrainRun& run, int64_t at_step) {
  Rank& rank = step.rank();
  rank.host.yield("checkpoint");
  std::vector<ShardPiece> pieces;
  std::deque<std::vector<float>> copies;  // of device memory and of bf16
  const bool on_host = run.config->run.device == DeviceKind::cpu;
  for (const auto& group : step.model().groups()) {
    for (const ParamPiece& piece : group->owned_pieces()) {
      const int64_t at = piece.flat_offset(), total = piece.tensor->elements;
      const std::string& name = piece.tensor->canonical.name;
      // NOTE: files hold fp32: moments stored in bf16 are widened there and come back bit for bit.
      auto add = [&](const std::string& piece_name, In<Real> values) {
        const auto* data = static_cast<const float*>(values.data);
        if (!on_host || values.dtype == DType::bf16) {
          copies.push_back(read_real(rank, values));
          rank.finish_step();
          data = copies.back().data();
        }
        pieces.push_back({piece_name, piece.first_element, piece.elements, total, data});
      };
      add(name, In<float>(group->weights(at), Shape(piece.elements)));
      add("m/" + name, group->moment(ParamGroup::first_moment, at, piece.elements));
      add("v/" + name, group->moment(ParamGroup::second_moment, at, piece.elements));
    }
  }
  const std::string directory = checkpoint_directory(run.directory);
  const auto faults = save_faults(rank.config, rank.at.rank, at_step);
  FileSystem& files = faults != nullptr ? *faults : *run.files;
  const int64_t ranks = rank.mesh.ranks();
  if (rank.is_first()) {
    int64_t parameter_bytes = 0;
    for (const CanonicalTensor& tensor : step.model().tensors()) {
      parameter_bytes += 4 * tensor.elements();
    }
    check_free_space(files, directory, 3 * parameter_bytes);
  }
  write_checkpoint_shard(files, {directory, at_step, rank.at.rank, ranks}, pieces);
  rank.host.wait(barrier({.communicator = *rank.world, .stream = rank.comm}));
  if (rank.is_first()) {
    CheckpointState state;
    state.step = at_step;
    state.seed = run.config->run.seed;
    state.config = run.resolved_config;
    state.layout = layout_text(*run.config);
    state.integers["data.batches"] = at_step;  // global batches consumed
    const RouterState& router = step.model().router();
    if (!router.select_bias_LE.empty()) {
      state.float_arrays["router.select_bias"] = as_doubles(rank, router.select_bias_LE);
    }
    if (!router.fraction_LE.empty()) {
      state.float_arrays["router.fraction"] = as_doubles(rank, router.fraction_LE);
    }
    commit_checkpoint(files, directory, ranks, state);
    retain_checkpoints(files, directory, at_step, run.config->checkpoint.keep);
  }
  if (faults != nullptr) faults->check_struck();
  rank.host.wait(barrier({.communicator = *rank.world, .stream = rank.comm}));
}

namespace {

std::map<std::string, std::string> hex_digests(const std::map<std::string, Digest128>& digests) {
  std::map<std::string, std::string> hex;
  for (const auto& [name, digest] : digests) hex[name] = digest.hex();
  return hex;
}

std::string total_digest(const std::map<std::string, Digest128>& digests) {
  Digest128 total;
  for (const auto& [name, digest] : digests) total += digest;
  return digests.empty() ? "" : total.hex();
}

double validation_loss(TrainStep& step, const TrainRun& run) {
  double loss = 0;
  int64_t tokens = 0;
  for (int64_t batch = 0; batch < run.validation_batches; ++batch) {
    const TrainStep::Evaluation part = step.evaluate(*run.validation, batch, nullptr);
    loss += part.loss_sum;
    tokens += part.tokens;
  }
  return tokens == 0 ? std::numeric_limits<double>::quiet_NaN()
                     : loss / static_cast<double>(tokens);
}

// Whether rank 0 was asked to stop, the same answer on every rank.
bool stop_requested(Rank& rank, const TrainRun& run) {
  if (run.stop_signal == nullptr) return false;
  const int32_t asked = *run.stop_signal != 0 ? 1 : 0;
  if (rank.world->ranks() == 1) return asked != 0;
  const Buffer flag = rank.upload(std::vector<int32_t>{asked}, "stop flag");
  rank.comm_waits_for_compute();
  rank.compute_waits(broadcast({.communicator = *rank.world,
                                .stream = rank.comm,
                                .data = flag.data(),
                                .count = 1,
                                .dtype = DType::i32}));
  return rank.read<int32_t>(flag.data(), 1).front() != 0;
}

// Rank 0's record of one step.
void record_step(const TrainRun& run, int64_t step, const StepResult& result, int64_t elapsed_ns,
                 double validation, int64_t peak_bytes) {
  StepMetrics metrics;
  metrics.step = step;
  metrics.loss = result.loss;
  metrics.grad_norm = result.grad_norm;
  metrics.lr = result.learning_rate;
  metrics.step_ms = static_cast<double>(elapsed_ns) * 1e-6;
  metrics.tokens = result.tokens;
  metrics.tokens_per_s = static_cast<double>(run.derived->tokens_per_step) * 1e9 /
                         static_cast<double>(std::max<int64_t>(1, elapsed_ns));
  if (run.config->run.device == DeviceKind::cuda) {
    metrics.mfu =
        run.derived->training_flops_per_token * metrics.tokens_per_s / run.peak_flops_per_s;
    metrics.peak_memory_bytes = peak_bytes;
  }
  metrics.digest = total_digest(result.digests);
  if (run.config->balance.loss != BalanceLoss::none) metrics.balance_loss = result.balance_loss;
  if (run.config->balance.z_loss_weight > 0) metrics.z_loss = result.z_loss;
  if (!std::isnan(validation)) metrics.validation_loss = validation;
  metrics.expert_load = result.expert_load;
  run.metrics->write_step(metrics);
  if (!result.digests.empty()) run.metrics->write_digests({step, hex_digests(result.digests)});
  run.progress->update(metrics);
}

void start_profile(Rank& rank, std::unique_ptr<OpTimer>& profile) {
  if constexpr (kHasCuda) {
    if (rank.config.run.device == DeviceKind::cuda) {
      profile = std::make_unique<cuda::StepProfile>();
      rank.ops.timer = profile.get();
    }
  }
}

}  // namespace

TrainOutcome train_rank(RankEnvironment& environment, const TrainRun& run) {
  const Config& config = *run.config;
  Rank rank(config, environment);
  TrainStep step(rank, config.model);
  int64_t done = 0;
  if (run.resume != nullptr) {
    load_checkpoint(step, *run.resume);
    done = run.resume->state().step;
  } else {
    step.model().initialize(config.run.seed);
  }
  const auto first_digests = step.digests();
  if (rank.is_first()) run.metrics->write_digests({done, hex_digests(first_digests)});
  const int64_t digest_every = config.logging.digest_every_steps;
  const int64_t save_every = run.derived->checkpoint_every_steps;
  StopReason reason = StopReason::finished;
  std::unique_ptr<OpTimer> profile;
  double validation = std::numeric_limits<double>::quiet_NaN();
  while (done < run.last_step) {
    const int64_t now = done + 1;
    const int64_t start_ns = rank.host.now_ns();
    if (now == run.profile_step && rank.is_first()) start_profile(rank, profile);
    rank.step = now;
    environment.set_step(now);
    const bool traces = run.trace_from > 0 && now >= run.trace_from;
    if (traces) step.routing().start_trace();
    step.accumulate(*run.train, done);
    const bool digest = now % digest_every == 0 || now == run.last_step;
    const StepResult result = step.update(now, learning_rate(config, *run.derived, now),
                                          digest ? WithDigests::yes : WithDigests::no);
    const int64_t elapsed_ns = rank.host.now_ns() - start_ns;
    rank.ops.timer = nullptr;
    profile.reset();
    done = now;
    if (traces) {
      const TracedRouting routing = step.routing().collect();
      if (rank.is_first()) run.routing_trace->write_step(now, routing);
    }
    const bool stopping = stop_requested(rank, run);
    const bool last = done == run.last_step || stopping;
    validation = std::numeric_limits<double>::quiet_NaN();
    const int64_t eval_every = run.derived->eval_every_steps;
    if (run.validation != nullptr && !stopping &&
        (done == config.train.steps || done % eval_every == 0)) {
      validation = validation_loss(step, run);
    }
    if (rank.is_first()) {
      record_step(run, done, result, elapsed_ns, validation, rank.arena.peak_bytes());
    }
    if (last || done % save_every == 0) save_checkpoint(step, run, done);
    if (stopping && done < run.last_step) {
      reason = StopReason::signal;
      break;
    }
  }
  rank.finish_step();
  if (reason == StopReason::finished && done < config.train.steps) {
    reason = StopReason::stop_after_step;
  }
  return {done, reason, validation};
}

}  // namespace cambium
