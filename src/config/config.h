// The configuration: plain structs, one per TOML section (design.md section 5).
//
// `src/config/schema.cc` holds the one table of keys (name, type, default, range, meaning) that the
// parser, `config schema`, the nearest-name errors and the resolved file are made from.
// `derive()` (derive.h) computes every dependent number and checks every rule between keys.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "kernels/attention_cudnn.h"

namespace cambium {

enum class Sharding { none, zero1, zero2, full };
enum class PipelineSchedule { gpipe, one_f_one_b, interleaved_1f1b, zb_h1, zb_v, dualpipev };
enum class ComputeType { fp32, bf16 };
enum class ReductionMode { exact, fast };
enum class FastOrder { rank, ring };
enum class DeviceKind { cpu, cuda };
enum class Transport { automatic, sim, nccl };
enum class BalanceLoss { none, sequence, global_batch, global_batch_lagged, micro_batch };
enum class RoutingChoice { learned, even, replay };
enum class ScheduleKind { constant, cosine, wsd };
enum class RecomputeMode { none, swiglu, full_layer };
enum class DecayRule { matrices, all };
enum class ModelFamily { qwen3_moe, qwen2_moe, mixtral, olmoe };
enum class QkNorm { none, per_head, full_width };
enum class RopeKind { plain, linear, yarn };
enum class TokenizerKind { bytes, sentencepiece };

// Dimensions and options of a decoder-only MoE transformer. Lengths in elements.
struct ModelConfig {
  std::string preset;  // name of a built-in model; empty when given inline or by path
  std::string path;    // directory with a Hugging Face config.json
  ModelFamily family = ModelFamily::qwen3_moe;
  int64_t layers = 0;
  int64_t hidden = 0;         // D
  int64_t heads = 0;          // H
  int64_t kv_heads = 0;       // G
  int64_t head_dim = 0;       // Q
  int64_t experts = 0;        // E
  int64_t top_k = 0;          // K
  int64_t expert_hidden = 0;  // F
  int64_t vocab = 0;          // V
  int64_t max_positions = 0;
  double rope_theta = 10000.0;
  RopeKind rope_kind = RopeKind::plain;
  double rope_factor = 1.0;             // of linear and yarn
  int64_t rope_original_positions = 0;  // yarn: before the extension; 0 = max_positions / factor
  double rope_beta_fast = 32.0;         // yarn: turns over the original positions above which a
  double rope_beta_slow = 1.0;          //   pair keeps its angle, and below which it is divided
  double rope_attention_factor = 0.0;   // yarn: of cos and sin; 0 = 0.1 ln(factor) + 1
  int64_t sliding_window = 0;  // tokens that attention reaches back, itself included; 0 = all
  double norm_epsilon = 1e-6;
  double init_std = 0.02;
  bool normalize_top_k = true;  // router weights renormalised over the selected experts
  bool tie_embeddings = false;
  std::vector<int64_t> dense_layers;  // with an MLP of dense_hidden in place of experts; ascending
  int64_t dense_hidden = 0;           // 0 = no dense layers
  int64_t shared_expert_hidden = 0;   // an MLP of this width beside the routed experts; 0 = none
  bool shared_expert_gate = false;    // sigmoid of one logit per token scales the shared expert
  bool attention_bias = false;        // of the q, k and v projections
  bool attention_out_bias = true;     // with attention_bias: of the output projection too
  QkNorm qk_norm = QkNorm::per_head;

  bool is_dense(int64_t layer) const {
    return std::binary_search(dense_layers.begin(), dense_layers.end(), layer);
  }
  int64_t expert_layers() const { return layers - std::ssize(dense_layers); }
};

struct DataConfig {
  std::vector<std::string> train;       // .h5 token files, .txt, .jsonl, .jsonl.zst
  std::vector<std::string> validation;  // same; empty = a held-out tail of `train`
  double validation_fraction = 0.05;    // of the training documents' tokens, when none is named
  TokenizerKind tokenizer = TokenizerKind::bytes;
  std::string tokenizer_path;   // SentencePiece .model; empty = trained into data/cache
  int64_t tokenizer_vocab = 0;  // of a tokenizer trained here; 0 = model.vocab
  bool document_mask = true;    // attention does not cross a document's end
};

struct TrainConfig {
  int64_t steps = 100;
  int64_t global_batch_sequences = 8;
  int64_t micro_batch_sequences = 1;  // per data rank
  int64_t sequence_length = 128;
  int64_t eval_every_steps = 0;  // 0 = only at the end
  int64_t eval_sequences = 64;
  int64_t sample_tokens = 200;  // length of samples.txt's text; 0 = no sample
};

struct OptimizerConfig {
  std::string name = "adamw";
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double epsilon = 1e-8;
  double weight_decay = 0.1;
  DecayRule decay = DecayRule::matrices;
  double clip = 1.0;                            // global gradient norm; 0 = off
  ComputeType state_dtype = ComputeType::fp32;  // of both moments
};

struct ScheduleConfig {
  ScheduleKind kind = ScheduleKind::cosine;
  int64_t warmup_steps = 0;
  int64_t decay_steps = 0;    // wsd: length of the decay; 0 = 20 % of train.steps
  double min_lr_ratio = 0.1;  // final lr / optimizer.lr
};

// How keys and values reach the queries of the other ranks of a sequence.
enum class ContextExchange { all_gather, ring };

struct ParallelConfig {
  int64_t pp = 1;
  int64_t dp = 1;  // every data-parallel rank
  int64_t cp = 1;
  int64_t ep = 1;  // folded over dp*cp
  Sharding sharding = Sharding::zero1;
  int64_t shard_ranks = 0;  // consecutive dp x cp ranks that share out one copy; 0 = all
  PipelineSchedule schedule = PipelineSchedule::one_f_one_b;
  int64_t virtual_stages = 2;
  ContextExchange context = ContextExchange::all_gather;
  bool overlap = true;  // a pair of dualpipev runs stage by stage in turn, not pass after pass
};

struct BalanceConfig {
  BalanceLoss loss = BalanceLoss::none;
  double loss_weight = 0.01;
  double z_loss_weight = 0.0;
  double bias_update_rate = 0.0;                   // 0 = no selection bias
  RoutingChoice routing = RoutingChoice::learned;  // of training steps
  std::string routing_file;                        // of routing = replay
};

struct RecomputeConfig {
  RecomputeMode mode = RecomputeMode::none;
  bool norms = false;      // both norms of a layer, from their inputs
  bool attention = false;  // qkv, q/k norm, RoPE and attention, from the first norm's output
};

struct NumericsConfig {
  ComputeType compute = ComputeType::fp32;
  ReductionMode reduction = ReductionMode::exact;  // default: exact on cpu, fast on cuda
  FastOrder fast_order = FastOrder::rank;          // of the simulator's sums in fast mode
  int64_t block_tokens = 32;
  AttentionKernel attention = AttentionKernel::own;
};

struct CheckpointConfig {
  int64_t every_steps = 0;  // 0 = only the last step
  int64_t keep = 2;         // newest kept; 0 = all
};

struct LoggingConfig {
  int64_t digest_every_steps = 1;
  bool tensorboard = true;
};

struct RunConfig {
  uint64_t seed = 1;
  DeviceKind device = DeviceKind::cpu;
  int64_t workers = 0;  // worker threads; 0 = the machine's cores
  std::string out;      // run directory; empty = runs/<config name>-<UTC time>
  Transport transport = Transport::automatic;
  double watchdog_s = 300;    // how long a collective between processes may run
  bool allow_faults = false;  // `train` refuses [[faults]] without it
  bool cuda_graphs = true;    // of a run of one rank
};

struct PlanConfig {
  std::string machine;
  std::string routing = "uniform";  // or "zipf", or metrics.jsonl or a routing trace of a run
  double zipf = 0.7;                // exponent of routing = "zipf"
};

// One injected fault (design.md section 4, `check`): the kind, and where it strikes.
struct FaultConfig {
  std::string kind;  // one of fault_names() (src/config/faults.h)
  int64_t rank = 0;
  int64_t step = 1;
  std::string site;        // a communicator, a place that waits, or "#k": the k-th fitting place
  double probability = 0;  // > 0: of striking once in a run; rank and step are drawn
  double seconds = 1;      // of virtual time: pause, slow_link, flapping_link
};

// A site "name#k": either part may be absent; k counts from 0. Exit code 2 when k is no number.
struct FaultPlace {
  std::string name;
  int64_t number = 0;
};
FaultPlace fault_place(const FaultConfig& fault);

struct Config {
  std::string name;  // run.name; the stem of the file when not given
  ModelConfig model;
  DataConfig data;
  TrainConfig train;
  OptimizerConfig optimizer;
  ScheduleConfig schedule;
  ParallelConfig parallel;
  BalanceConfig balance;
  RecomputeConfig recompute;
  NumericsConfig numerics;
  CheckpointConfig checkpoint;
  LoggingConfig logging;
  RunConfig run;
  PlanConfig plan;
  std::vector<FaultConfig> faults;
};

// The text of a value as the configuration file spells it, such as "1f1b" or "zero1".
const char* choice_name(Sharding value);
const char* choice_name(PipelineSchedule value);
const char* choice_name(ContextExchange value);
const char* choice_name(ComputeType value);
const char* choice_name(ReductionMode value);
const char* choice_name(DeviceKind value);
const char* choice_name(Transport value);
const char* choice_name(BalanceLoss value);
const char* choice_name(RoutingChoice value);
const char* choice_name(ScheduleKind value);
const char* choice_name(RecomputeMode value);
const char* choice_name(DecayRule value);
const char* choice_name(ModelFamily value);
const char* choice_name(QkNorm value);
const char* choice_name(RopeKind value);
const char* choice_name(TokenizerKind value);

// Reads a TOML file, then `--set` texts ("train.steps=20"; a later one wins), and checks every
// value alone: type, range, choice. Errors have exit code 2 and name key and file:line:column.
// It touches nothing but the file and, for `model.path`, the config.json there. Call derive() next.
Config load_config(const std::string& path, std::span<const std::string> sets);

// The same from text that is not in a file; `origin` stands for the path in messages.
Config parse_config(const std::string& text, const std::string& origin,
                    std::span<const std::string> sets);

// The whole configuration as TOML: parsing it gives the same Config, doubles bit for bit.
std::string resolved_toml(const Config& config);

// Every key with type, default, range and meaning, for people and as one JSON object.
std::string schema_text();
std::string schema_json();

// Keys whose change between a saved and a given configuration a resume does not allow, as
// "key = saved, now given" texts. [parallel] [run] [checkpoint] [logging] [recompute],
// [[faults]], train.micro_batch_sequences and train.steps may differ; model.preset and model.path
// are names of dimensions that are compared one by one.
std::vector<std::string> resume_differences(const Config& saved, const Config& given);

}  // namespace cambium
