// The rules, section by section, then the numbers. Rules come first: no division meets a zero.
#include "src/config/derive.h"

#include <algorithm>
#include <numeric>

#include "fmt/format.h"
#include "kernels/attention.h"
#include "src/base/check.h"
#include "src/config/faults.h"
#include "src/config/schema.h"
#include "src/parallel/schedule.h"

namespace cambium {

namespace {

constexpr int64_t kMaxRanks = 65536;
constexpr double kMaxParameters = 1e15;
constexpr int64_t kMaxTokensPerStep = int64_t{1} << 40;
constexpr int64_t kByteTokens = 256;  // a bytes tokenizer has one id per byte and an end of text

// "2 or 4": the numbers nearest to `value`, one below and one above, that divide `whole` and are
// multiples of `unit`.
std::string nearest_divisors(int64_t value, int64_t whole, int64_t unit = 1) {
  int64_t below = 0, above = 0;
  for (int64_t candidate = 1; candidate <= whole / candidate; ++candidate) {
    if (whole % candidate != 0) continue;
    for (const int64_t divisor : {candidate, whole / candidate}) {
      if (divisor % unit != 0) continue;
      if (divisor < value) below = std::max(below, divisor);
      if (divisor > value && (above == 0 || divisor < above)) above = divisor;
    }
  }
  if (below == 0) return fmt::format("{}", above);
  return above == 0 ? fmt::format("{}", below) : fmt::format("{} or {}", below, above);
}

// "96 or 128": the multiples of `unit` nearest to `value`.
std::string nearest_multiples(int64_t value, int64_t unit) {
  const int64_t below = value / unit * unit;
  if (below == 0) return fmt::format("{}", unit);
  return fmt::format("{} or {}", below, below + unit);
}

struct DivisibilityRule {
  const char* divisor_key;
  int64_t divisor;
  const char* whole_key;
  int64_t whole;
};

// The divisor is what the user should change.
void check_divides(const DivisibilityRule& rule) {
  if (rule.whole % rule.divisor == 0) return;
  fail(ExitCode::usage, "{} = {} does not divide {} = {}; nearest: {}", rule.divisor_key,
       rule.divisor, rule.whole_key, rule.whole, nearest_divisors(rule.divisor, rule.whole));
}

// The whole is what the user should change.
void check_multiple(const DivisibilityRule& rule) {
  if (rule.whole % rule.divisor == 0) return;
  fail(ExitCode::usage, "{} = {} is not a multiple of {} = {}; nearest: {}", rule.whole_key,
       rule.whole, rule.divisor_key, rule.divisor, nearest_multiples(rule.whole, rule.divisor));
}

double parameter_estimate(const ModelConfig& model) {
  const double width = static_cast<double>(model.hidden);
  const double attention = width * static_cast<double>(model.head_dim) * 2.0 *
                           static_cast<double>(model.heads + model.kv_heads);
  const double experts = static_cast<double>(model.experts) * width *
                             (3.0 * static_cast<double>(model.expert_hidden) + 1.0) +
                         3.0 * width * static_cast<double>(model.shared_expert_hidden);
  const double dense = 3.0 * width * static_cast<double>(model.dense_hidden);
  return static_cast<double>(model.layers) * attention +
         static_cast<double>(model.expert_layers()) * experts +
         static_cast<double>(std::ssize(model.dense_layers)) * dense +
         2.0 * static_cast<double>(model.vocab) * width;
}

void check_model(const Config& config) {
  const ModelConfig& model = config.model;
  check_divides({"model.kv_heads", model.kv_heads, "model.heads", model.heads});
  if (model.head_dim % 2 != 0) {
    fail(ExitCode::usage,
         "model.head_dim = {} is odd, but rotary positions turn pairs; nearest: {}", model.head_dim,
         nearest_multiples(model.head_dim, 2));
  }
  if (model.top_k > model.experts) {
    fail(ExitCode::usage, "model.top_k = {} is above model.experts = {}; nearest: {}", model.top_k,
         model.experts, model.experts);
  }
  if (!model.dense_layers.empty() && model.dense_layers.back() >= model.layers) {
    fail(ExitCode::usage, "model.dense_layers names layer {}, but model.layers = {}: 0 .. {}",
         model.dense_layers.back(), model.layers, model.layers - 1);
  }
  if (!model.dense_layers.empty() && model.dense_hidden == 0) {
    fail(ExitCode::usage,
         "model.dense_layers needs a width: model.dense_hidden, such as {} (model.top_k experts)",
         model.top_k * model.expert_hidden);
  }
  if (model.shared_expert_gate && model.shared_expert_hidden == 0) {
    fail(ExitCode::usage,
         "model.shared_expert_gate needs a shared expert: model.shared_expert_hidden, such as {} "
         "(model.top_k experts)",
         model.top_k * model.expert_hidden);
  }
  if (model.rope_kind == RopeKind::yarn && model.rope_beta_fast < model.rope_beta_slow) {
    fail(ExitCode::usage, "model.rope_beta_fast = {} is below model.rope_beta_slow = {}",
         model.rope_beta_fast, model.rope_beta_slow);
  }
  const QkNorm of_family = model.family == ModelFamily::qwen3_moe ? QkNorm::per_head
                           : model.family == ModelFamily::olmoe   ? QkNorm::full_width
                                                                  : QkNorm::none;
  if (model.qk_norm != of_family) {
    fail(ExitCode::usage, "model.qk_norm = {} does not go with model.family = {}, which has {}",
         choice_name(model.qk_norm), choice_name(model.family), choice_name(of_family));
  }
  if (parameter_estimate(model) > kMaxParameters) {
    fail(ExitCode::usage,
         "model.layers = {}, model.hidden = {}, model.experts = {}, model.expert_hidden = {}: "
         "{:.1e} parameters, more than {:.0e}",
         model.layers, model.hidden, model.experts, model.expert_hidden, parameter_estimate(model),
         kMaxParameters);
  }
  if (config.train.sequence_length > model.max_positions) {
    fail(ExitCode::usage, "train.sequence_length = {} is above model.max_positions = {}",
         config.train.sequence_length, model.max_positions);
  }
}

void check_data(const Config& config) {
  const DataConfig& data = config.data;
  if (data.train.empty()) return;  // no text is read: parity
  if (data.tokenizer == TokenizerKind::bytes && config.model.vocab < kByteTokens + 1) {
    fail(ExitCode::usage, "model.vocab = {} is too small for data.tokenizer = bytes: at least {}",
         config.model.vocab, kByteTokens + 1);
  }
  if (data.tokenizer_vocab > config.model.vocab) {
    fail(ExitCode::usage, "data.tokenizer_vocab = {} is above model.vocab = {}",
         data.tokenizer_vocab, config.model.vocab);
  }
}

// Sequences and experts lie within the ranks that share out one copy of the state.
void check_shards(const ParallelConfig& parallel) {
  if (parallel.shard_ranks == 0) return;
  if (parallel.sharding == Sharding::none) {
    fail(ExitCode::usage,
         "parallel.shard_ranks = {} with parallel.sharding = none, which shares out nothing; "
         "nearest supported: parallel.sharding = zero1, or no parallel.shard_ranks",
         parallel.shard_ranks);
  }
  const int64_t data_ranks = parallel.dp * parallel.cp;
  const int64_t unit = std::lcm(parallel.cp, parallel.ep);
  if (data_ranks % parallel.shard_ranks == 0 && parallel.shard_ranks % unit == 0) return;
  fail(ExitCode::usage,
       "parallel.shard_ranks = {} is no divisor of parallel.dp * parallel.cp = {} that is a "
       "multiple of parallel.cp = {} and parallel.ep = {}; nearest: {}",
       parallel.shard_ranks, data_ranks, parallel.cp, parallel.ep,
       nearest_divisors(parallel.shard_ranks, data_ranks, unit));
}

// What the layout asks of sizes. pp, dp, cp, ep are at least 1 by the key table.
void check_layout(const Config& config) {
  const ParallelConfig& parallel = config.parallel;
  const TrainConfig& train = config.train;
  const int64_t data_ranks = parallel.dp * parallel.cp;
  if (data_ranks > kMaxRanks || parallel.pp * data_ranks > kMaxRanks) {
    fail(ExitCode::usage,
         "parallel.pp = {}, parallel.dp = {}, parallel.cp = {}: more than {} ranks", parallel.pp,
         parallel.dp, parallel.cp, kMaxRanks);
  }
  check_divides({"parallel.ep", parallel.ep, "model.experts", config.model.experts});
  check_divides({"parallel.ep", parallel.ep, "parallel.dp * parallel.cp", data_ranks});
  check_shards(parallel);
  check_divides(
      {"parallel.dp", parallel.dp, "train.global_batch_sequences", train.global_batch_sequences});
  const int64_t sequences = train.global_batch_sequences / parallel.dp;
  if (sequences % train.micro_batch_sequences != 0) {
    fail(ExitCode::usage,
         "train.micro_batch_sequences = {} does not divide the {} sequences of a data rank "
         "(train.global_batch_sequences = {} / parallel.dp = {}); nearest: {}",
         train.micro_batch_sequences, sequences, train.global_batch_sequences, parallel.dp,
         nearest_divisors(train.micro_batch_sequences, sequences));
  }
  check_multiple({"numerics.block_tokens", config.numerics.block_tokens, "train.sequence_length",
                  train.sequence_length});
  if (parallel.cp > 1) {
    check_multiple({"2 * parallel.cp * numerics.block_tokens",
                    2 * parallel.cp * config.numerics.block_tokens, "train.sequence_length",
                    train.sequence_length});
  }
  if (train.global_batch_sequences > kMaxTokensPerStep / train.sequence_length) {
    fail(ExitCode::usage,
         "train.global_batch_sequences = {} of train.sequence_length = {}: more than 2^40 tokens",
         train.global_batch_sequences, train.sequence_length);
  }
}

// Pipeline ranks whose stages, `chunks` on each, the model's layers fill.
int64_t most_pipeline_ranks(const Config& config, int64_t chunks) {
  return std::max<int64_t>(1, (config.model.layers + 2) / chunks);
}

void check_pipeline(const Config& config) {
  const ParallelConfig& parallel = config.parallel;
  if (parallel.pp == 1) return;
  const char* schedule = choice_name(parallel.schedule);
  if (parallel.schedule == PipelineSchedule::interleaved_1f1b && parallel.virtual_stages < 2) {
    fail(ExitCode::usage,
         "parallel.schedule = {} needs parallel.virtual_stages of at least 2, not {}; with 1 it is "
         "parallel.schedule = 1f1b",
         schedule, parallel.virtual_stages);
  }
  const int64_t chunks = schedule_chunks(parallel.schedule, parallel.pp, parallel.virtual_stages);
  const int64_t stages = parallel.pp * chunks;
  if (config.model.layers < stages - 2) {
    fail(
        ExitCode::usage,
        "model.layers = {} is too few for the {} stages of parallel.pp = {} with parallel.schedule "
        "= {} ({} on each rank): at least {}, as all but the first and the last stage hold a "
        "layer; nearest supported: parallel.pp = {}",
        config.model.layers, stages, parallel.pp, schedule, chunks, stages - 2,
        most_pipeline_ranks(config, chunks));
  }
  const MicroBatchNeed need = schedule_need(parallel.schedule, parallel.pp);
  const int64_t micro_batches =
      config.train.global_batch_sequences / parallel.dp / config.train.micro_batch_sequences;
  if (micro_batches < need.least || micro_batches % need.multiple != 0) {
    const std::string count = need.multiple > 1
                                  ? fmt::format("a multiple of {} micro-batches", need.multiple)
                                  : fmt::format("{} micro-batches", need.least);
    const int64_t nearest =
        std::max(need.least, (micro_batches + need.multiple - 1) / need.multiple * need.multiple);
    fail(ExitCode::usage,
         "parallel.schedule = {} with parallel.pp = {} needs {} of each data rank{}; there are {} "
         "(train.global_batch_sequences = {} / parallel.dp = {} / train.micro_batch_sequences = "
         "{}); nearest supported: train.global_batch_sequences = {}, or parallel.schedule = 1f1b",
         schedule, parallel.pp, count, need.multiple > 1 ? "" : ", at least", micro_batches,
         config.train.global_batch_sequences, parallel.dp, config.train.micro_batch_sequences,
         nearest * parallel.dp * config.train.micro_batch_sequences);
  }
}

void check_numerics(const Config& config) {
  const NumericsConfig& numerics = config.numerics;
  if (numerics.fast_order == FastOrder::rank || numerics.reduction == ReductionMode::fast) return;
  fail(ExitCode::usage,
       "numerics.fast_order = ring orders the sums of numerics.reduction = fast, and exact has one "
       "order for all: use numerics.reduction = fast, or leave out numerics.fast_order");
}

void check_balance(const Config& config) {
  const BalanceLoss loss = config.balance.loss;
  const bool layout_dependent =
      loss == BalanceLoss::micro_batch || loss == BalanceLoss::global_batch;
  if (layout_dependent && config.numerics.reduction == ReductionMode::exact) {
    fail(ExitCode::usage,
         "balance.loss = {} depends on the layout, but numerics.reduction = exact promises the "
         "same bits for every layout: use balance.loss = {}, or numerics.reduction = fast",
         choice_name(loss), loss == BalanceLoss::global_batch ? "global_batch_lagged" : "sequence");
  }
}

void check_routing(const Config& config) {
  const BalanceConfig& balance = config.balance;
  if (balance.routing == RoutingChoice::replay && balance.routing_file.empty()) {
    fail(ExitCode::usage,
         "balance.routing = replay needs balance.routing_file: a trace that `cambium train "
         "--trace-routing FILE` wrote");
  }
  if (balance.routing != RoutingChoice::replay && !balance.routing_file.empty()) {
    fail(ExitCode::usage,
         "balance.routing_file = '{}' is read by balance.routing = replay alone, not by {}",
         balance.routing_file, choice_name(balance.routing));
  }
  if (balance.routing == RoutingChoice::even) {
    check_multiple({"model.experts", config.model.experts, "train.sequence_length",
                    config.train.sequence_length});
  }
}

// cuDNN's attention is of whole sequences that are one document, in fast mode, on a GPU.
void check_attention(const Config& config, ConfigUse use) {
  if (config.numerics.attention == AttentionKernel::own) return;
  const int64_t head_dim = config.model.head_dim, window = config.model.sliding_window;
  struct Need {
    bool is_met;
    std::string found;
    const char* nearest;
  };
  for (const Need& need :
       {Need{config.run.device == DeviceKind::cuda, "run.device = cpu", "run.device = cuda"},
        Need{config.numerics.reduction == ReductionMode::fast, "numerics.reduction = exact",
             "numerics.reduction = fast"},
        Need{config.parallel.cp == 1, fmt::format("parallel.cp = {}", config.parallel.cp),
             "parallel.cp = 1"},
        Need{!config.data.document_mask, "data.document_mask = true", "data.document_mask = false"},
        Need{window == 0, fmt::format("model.sliding_window = {}", window),
             "model.sliding_window = 0"},
        Need{head_dim % kCudnnHeadStep == 0 && head_dim <= kCudnnMostHeadColumns,
             fmt::format("model.head_dim = {}", head_dim), "a multiple of 8 up to 128"}}) {
    if (need.is_met) continue;
    fail(ExitCode::usage,
         "numerics.attention = cudnn with {} is not supported; nearest supported: {}, or "
         "numerics.attention = own",
         need.found, need.nearest);
  }
  if (!kHasCuda || use == ConfigUse::planned) return;
  const std::string missing = cuda::cudnn_missing();
  if (!missing.empty()) fail(ExitCode::usage, "numerics.attention = cudnn: {}", missing);
}

// What other parts of this build cannot do yet: refused, never downgraded.
void check_supported(const Config& config, ConfigUse use) {
  const ParallelConfig& parallel = config.parallel;
  const auto refuse = [](const std::string& what, const std::string& nearest) {
    fail(ExitCode::usage, "{} is not supported yet; nearest supported: {}", what, nearest);
  };
  if (config.run.device == DeviceKind::cuda && parallel.cp > 1) {
    check_multiple({"2 * parallel.cp * (attention's tile on a GPU, 128)",
                    2 * parallel.cp * kAttentionTile, "train.sequence_length",
                    config.train.sequence_length});
  }
  check_attention(config, use);
  check_device(config, use);
  if (config.run.transport == Transport::nccl && config.run.device == DeviceKind::cpu) {
    refuse("run.transport = nccl with run.device = cpu", "run.device = cuda, or transport = sim");
  }
}

void count_model(const Config& config, Derived* derived) {
  const ModelConfig& model = config.model;
  const int64_t query_width = model.heads * model.head_dim;
  const int64_t kv_width = model.kv_heads * model.head_dim;
  int64_t norms = 2 * model.hidden;
  if (model.qk_norm == QkNorm::per_head) norms += 2 * model.head_dim;
  if (model.qk_norm == QkNorm::full_width) norms += query_width + kv_width;
  const int64_t attention = model.hidden * (2 * query_width + 2 * kv_width);
  const int64_t router = model.hidden * model.experts;
  const int64_t expert = 3 * model.hidden * model.expert_hidden;
  const int64_t embedding = model.vocab * model.hidden;
  int64_t biases = model.attention_bias ? query_width + 2 * kv_width : 0;
  if (model.attention_bias && model.attention_out_bias) biases += model.hidden;
  const int64_t shared =
      3 * model.hidden * model.shared_expert_hidden + (model.shared_expert_gate ? model.hidden : 0);
  const int64_t dense = std::ssize(model.dense_layers) * 3 * model.hidden * model.dense_hidden;

  const int64_t unrouted =
      model.layers * attention + model.expert_layers() * (router + shared) + dense;
  const int64_t vectors = model.layers * (norms + biases) + model.hidden;
  const int64_t active_matrices =
      unrouted + model.expert_layers() * model.top_k * expert + embedding;
  derived->expert_parameters = expert;
  derived->parameters = unrouted + model.expert_layers() * model.experts * expert + vectors +
                        (model.tie_embeddings ? 1 : 2) * embedding;
  derived->active_parameters = active_matrices + vectors;

  const double keys = (static_cast<double>(config.train.sequence_length) + 1.0) / 2.0;
  const double scores = 4.0 * static_cast<double>(query_width) * keys;
  derived->forward_flops_per_token =
      2.0 * static_cast<double>(active_matrices) + static_cast<double>(model.layers) * scores;
  derived->training_flops_per_token = 3.0 * derived->forward_flops_per_token;
}

// fp32 weights, their compute copy, fp32 gradients and AdamW's moments: on every rank that computes
// with a parameter, or in each copy once where sharding shares them out.
void count_state(const Config& config, Derived* derived) {
  const int64_t experts =
      config.model.expert_layers() * config.model.experts * derived->expert_parameters;
  const int64_t dense = derived->parameters - experts;
  const int64_t held = derived->data_ranks * dense + derived->edp * experts;
  const int64_t shared = derived->copies * derived->parameters;
  const Sharding sharding = config.parallel.sharding;
  const int64_t weights = sharding == Sharding::full ? shared : held;
  const int64_t gradients =
      sharding == Sharding::full || sharding == Sharding::zero2 ? shared : held;
  const int64_t optimized = sharding == Sharding::none ? held : shared;
  const int64_t copy = config.numerics.compute == ComputeType::bf16 ? 2 : 0;
  const int64_t moments = config.optimizer.state_dtype == ComputeType::bf16 ? 4 : 8;
  derived->state_bytes = (4 + copy) * weights + 4 * gradients + moments * optimized;
}

void cut_intervals(const Config& config, Derived* derived) {
  const int64_t steps = config.train.steps;
  const auto interval = [steps](int64_t given) {
    return given == 0 ? steps : std::min(given, steps);
  };
  derived->warmup_steps = std::min(config.schedule.warmup_steps, steps);
  const int64_t decay = config.schedule.decay_steps == 0 ? std::max<int64_t>(steps / 5, 1)
                                                         : config.schedule.decay_steps;
  derived->decay_steps = std::min(decay, steps - derived->warmup_steps);
  derived->checkpoint_every_steps = interval(config.checkpoint.every_steps);
  derived->eval_every_steps = interval(config.train.eval_every_steps);
}

}  // namespace

void check_device(const Config& config, ConfigUse use) {
  if (config.run.device == DeviceKind::cpu) return;
  if (config.numerics.compute == ComputeType::fp32) {
    fail(ExitCode::usage,
         "run.device = cuda computes in bf16 with fp32 sums: numerics.compute = fp32 is not "
         "supported there; nearest supported: numerics.compute = bf16, or run.device = cpu");
  }
  if (!kHasCuda && use == ConfigUse::trained) {
    fail(ExitCode::usage,
         "run.device = cuda, but this build has no CUDA kernels; next: run.device = cpu, or a "
         "build by `cmake --preset cuda`");
  }
}

int64_t rope_original_positions(const ModelConfig& model) {
  if (model.rope_original_positions > 0) return model.rope_original_positions;
  return std::max<int64_t>(
      1, static_cast<int64_t>(static_cast<double>(model.max_positions) / model.rope_factor));
}

Derived derive(const Config& config, ConfigUse use) {
  check_model(config);
  check_layout(config);
  check_pipeline(config);
  check_numerics(config);
  check_balance(config);
  check_routing(config);
  check_data(config);
  check_supported(config, use);

  Derived derived;
  derived.data_ranks = config.parallel.dp * config.parallel.cp;
  derived.ranks = config.parallel.pp * derived.data_ranks;
  if (config.parallel.shard_ranks > 0) {
    derived.copies = derived.data_ranks / config.parallel.shard_ranks;
  }
  derived.edp = derived.data_ranks / config.parallel.ep;
  derived.experts_per_rank = config.model.experts / config.parallel.ep;

  const TrainConfig& train = config.train;
  derived.sequences_per_data_rank = train.global_batch_sequences / config.parallel.dp;
  derived.micro_batches = derived.sequences_per_data_rank / train.micro_batch_sequences;
  derived.tokens_per_micro_batch =
      train.micro_batch_sequences * train.sequence_length / config.parallel.cp;
  derived.tokens_per_step = train.global_batch_sequences * train.sequence_length;
  derived.blocks_per_sequence = train.sequence_length / config.numerics.block_tokens;
  derived.blocks_per_micro_batch = train.micro_batch_sequences * derived.blocks_per_sequence;
  derived.total_blocks = train.global_batch_sequences * derived.blocks_per_sequence;
  CHECK_EQ(derived.edp * config.parallel.ep, derived.data_ranks);
  CHECK_EQ(derived.total_blocks,
           derived.blocks_per_micro_batch * derived.micro_batches * config.parallel.dp);

  cut_intervals(config, &derived);
  check_faults(config, derived);
  count_model(config, &derived);
  count_state(config, &derived);
  return derived;
}

}  // namespace cambium
