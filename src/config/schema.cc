// The key table and what is said about one row: type, range, value as text.
#include "src/config/schema.h"

#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <type_traits>

#include "fmt/format.h"
#include "src/base/check.h"
#include "src/config/faults.h"
#include "src/config/nearest.h"
#include "src/config/presets.h"

namespace cambium {

namespace {

constexpr const char* kShardingNames[] = {"none", "zero1", "zero2", "full"};
constexpr const char* kScheduleNames[] = {"gpipe", "1f1b", "interleaved_1f1b",
                                          "zb_h1", "zb_v", "dualpipev"};
constexpr const char* kContextNames[] = {"all_gather", "ring"};
constexpr const char* kComputeNames[] = {"fp32", "bf16"};
constexpr const char* kReductionNames[] = {"exact", "fast"};
constexpr const char* kFastOrderNames[] = {"rank", "ring"};
constexpr const char* kAttentionNames[] = {"own", "cudnn"};
constexpr const char* kDeviceNames[] = {"cpu", "cuda"};
constexpr const char* kTransportNames[] = {"auto", "sim", "nccl"};
constexpr const char* kBalanceNames[] = {"none", "sequence", "global_batch", "global_batch_lagged",
                                         "micro_batch"};
constexpr const char* kRoutingNames[] = {"learned", "even", "replay"};
constexpr const char* kScheduleKindNames[] = {"constant", "cosine", "wsd"};
constexpr const char* kRecomputeNames[] = {"none", "swiglu", "full_layer"};
constexpr const char* kDecayNames[] = {"matrices", "all"};
constexpr const char* kFamilyNames[] = {"qwen3_moe", "qwen2_moe", "mixtral", "olmoe"};
constexpr const char* kRopeNames[] = {"default", "linear", "yarn"};
constexpr const char* kQkNormNames[] = {"none", "per_head", "full_width"};
constexpr const char* kTokenizerNames[] = {"bytes", "sentencepiece"};
constexpr const char* kOptimizerNames[] = {"adamw"};
template <class Value>
KeyField field_of(Value& value) {
  if constexpr (std::is_enum_v<Value>) {
    return ChoiceField{
        &value,
        [](const void* target) { return static_cast<int>(*static_cast<const Value*>(target)); },
        [](void* target, int index) { *static_cast<Value*>(target) = static_cast<Value>(index); }};
  } else {
    return &value;
  }
}

// The field of a section's struct, as the function that KeySpec holds.
template <auto kSection, auto kMember>
KeyField in_section(Config& config, size_t) {
  return field_of(config.*kSection.*kMember);
}

template <auto kMember>
KeyField in_fault(Config& config, size_t element) {
  CHECK_LT(element, config.faults.size());
  return field_of(config.faults[element].*kMember);
}

KeyField in_name(Config& config, size_t) { return &config.name; }

using Choices = std::span<const char* const>;
constexpr KeyRange kNoRange{};
constexpr KeyRange kRankRange{0, 65535};
constexpr KeyRange kCount{1, 1e9};          // of things that must exist
constexpr KeyRange kOptionalCount{0, 1e9};  // where 0 has a meaning of its own
constexpr KeyRange kRanks{1, 65536};
constexpr KeyRange kUpTo64k{1, 65536};
constexpr KeyRange kUpTo64kOrZero{0, 65536};
constexpr KeyRange kDimension{1, 16777216};
constexpr KeyRange kDimensionOrZero{0, 16777216};
constexpr KeyRange kLayerNumber{0, 65535};
constexpr KeyRange kStretch{1, 1e6};
constexpr KeyRange kTurns{1e-3, 1e6};
constexpr KeyRange kFewfold{0, 100};
constexpr KeyRange kTenfold{0, 10};
constexpr KeyRange kFraction{0, 1, RangeEnds::open_above};
constexpr KeyRange kRatio{0, 1};
constexpr KeyRange kWeight{0, 1000};
constexpr KeyRange kSeconds{1e-9, 1e6};
constexpr KeyRange kSeeds{0, 9223372036854775807.0};
constexpr Choices kNoChoices{};
constexpr const char* kFromModel = "of the preset or path";
constexpr const char* kFromFamily = "of the preset, path or family";
constexpr ResumeRule kSame = ResumeRule::same;
constexpr ResumeRule kMay = ResumeRule::may_differ;

constexpr auto kModel = &Config::model;
constexpr auto kData = &Config::data;
constexpr auto kTrain = &Config::train;
constexpr auto kOptimizer = &Config::optimizer;
constexpr auto kSchedule = &Config::schedule;
constexpr auto kParallel = &Config::parallel;
constexpr auto kBalance = &Config::balance;
constexpr auto kRecompute = &Config::recompute;
constexpr auto kNumerics = &Config::numerics;
constexpr auto kCheckpoint = &Config::checkpoint;
constexpr auto kLogging = &Config::logging;
constexpr auto kRun = &Config::run;
constexpr auto kPlan = &Config::plan;
using Model = ModelConfig;
using Data = DataConfig;
using Train = TrainConfig;
using Optimizer = OptimizerConfig;
using Schedule = ScheduleConfig;
using Parallel = ParallelConfig;
using Balance = BalanceConfig;
using Numerics = NumericsConfig;
using Checkpoint = CheckpointConfig;
using Logging = LoggingConfig;
using Run = RunConfig;

const SectionSpec kSections[] = {
    {"model", "the model: a preset, a preset with changes, dimensions, or a Hugging Face config"},
    {"data", "corpora and tokenizer"},
    {"train", "steps, batch and sequence sizes"},
    {"optimizer", "AdamW"},
    {"schedule", "learning rate over the steps"},
    {"parallel", "layout: ranks = pp * dp * cp; ep is folded over dp * cp"},
    {"balance", "expert load balance"},
    {"recompute", "activations computed again in the backward pass"},
    {"numerics", "number formats and the order of sums"},
    {"checkpoint", "when to save, and how many to keep"},
    {"logging", "metrics, digests, TensorBoard"},
    {"run", "seed, device, directory"},
    {"plan", "the machine to plan for"},
    {"faults", "mistakes injected on purpose, to see `cambium check` find them: [[faults]]"},
};

const KeySpec kKeys[] = {
    {"model", "preset", in_section<kModel, &Model::preset>, kNoRange, preset_names(), kMay, nullptr,
     "a built-in model; other keys of [model] change it"},
    {"model", "path", in_section<kModel, &Model::path>, kNoRange, kNoChoices, kMay, nullptr,
     "directory with a Hugging Face config.json; other keys of [model] change it"},
    {"model", "family", in_section<kModel, &Model::family>, kNoRange, kFamilyNames, kSame,
     kFromModel, "architecture"},
    {"model",
     "layers",
     in_section<kModel, &Model::layers>,
     {1, 10000},
     kNoChoices,
     kSame,
     kFromModel,
     "decoder layers"},
    {"model", "hidden", in_section<kModel, &Model::hidden>, kDimension, kNoChoices, kSame,
     kFromModel, "model width D"},
    {"model", "heads", in_section<kModel, &Model::heads>, kUpTo64k, kNoChoices, kSame, kFromModel,
     "query heads H"},
    {"model", "kv_heads", in_section<kModel, &Model::kv_heads>, kUpTo64k, kNoChoices, kSame,
     "of the preset or path, else model.heads", "key/value heads G; divides model.heads"},
    {"model",
     "head_dim",
     in_section<kModel, &Model::head_dim>,
     {2, 65536},
     kNoChoices,
     kSame,
     "of the preset or path, else model.hidden / model.heads",
     "width Q of a head; even"},
    {"model", "experts", in_section<kModel, &Model::experts>, kUpTo64k, kNoChoices, kSame,
     kFromModel, "experts E of a layer"},
    {"model",
     "top_k",
     in_section<kModel, &Model::top_k>,
     {1, 1024},
     kNoChoices,
     kSame,
     kFromModel,
     "experts K that a token goes to; at most model.experts"},
    {"model", "expert_hidden", in_section<kModel, &Model::expert_hidden>, kDimension, kNoChoices,
     kSame, kFromModel, "hidden width F of an expert"},
    {"model",
     "vocab",
     in_section<kModel, &Model::vocab>,
     {2, 16777216},
     kNoChoices,
     kSame,
     kFromModel,
     "vocabulary V; at least the tokenizer's"},
    {"model", "max_positions", in_section<kModel, &Model::max_positions>, kDimension, kNoChoices,
     kSame, "of the preset or path, else 4096", "longest sequence the model is meant for"},
    {"model",
     "rope_theta",
     in_section<kModel, &Model::rope_theta>,
     {1, 1e12},
     kNoChoices,
     kSame,
     "of the preset or path, else 10000.0",
     "base of the rotary position angles"},
    {"model", "rope_kind", in_section<kModel, &Model::rope_kind>, kNoRange, kRopeNames, kSame,
     "of the path, else default", "rotary angles as they are, or scaled for longer texts"},
    {"model", "rope_factor", in_section<kModel, &Model::rope_factor>, kStretch, kNoChoices, kSame,
     "of the path, else 1.0",
     "linear, yarn: how much longer than the original positions texts are"},
    {"model", "rope_original_positions", in_section<kModel, &Model::rope_original_positions>,
     kDimensionOrZero, kNoChoices, kSame, "of the path, else 0",
     "yarn: positions before the extension; 0 = model.max_positions / model.rope_factor"},
    {"model", "rope_beta_fast", in_section<kModel, &Model::rope_beta_fast>, kTurns, kNoChoices,
     kSame, "of the path, else 32.0", "yarn: turns above which an angle is kept"},
    {"model", "rope_beta_slow", in_section<kModel, &Model::rope_beta_slow>, kTurns, kNoChoices,
     kSame, "of the path, else 1.0",
     "yarn: turns below which an angle is divided by model.rope_factor"},
    {"model", "rope_attention_factor", in_section<kModel, &Model::rope_attention_factor>, kFewfold,
     kNoChoices, kSame, "of the path, else 0.0",
     "yarn: of cos and sin; 0 = 0.1 ln(model.rope_factor) + 1"},
    {"model", "sliding_window", in_section<kModel, &Model::sliding_window>, kDimensionOrZero,
     kNoChoices, kSame, "of the path, else 0",
     "tokens that attention reaches back, the token itself included; 0 = the whole text"},
    {"model",
     "norm_epsilon",
     in_section<kModel, &Model::norm_epsilon>,
     {0, 0.1},
     kNoChoices,
     kSame,
     kFromFamily,
     "added to the mean square in RMSNorm"},
    {"model", "init_std", in_section<kModel, &Model::init_std>, kTenfold, kNoChoices, kSame,
     "of the path, else 0.02", "standard deviation of the initial weights"},
    {"model", "normalize_top_k", in_section<kModel, &Model::normalize_top_k>, kNoRange, kNoChoices,
     kSame, kFromFamily, "divide the selected experts' weights by their sum"},
    {"model", "tie_embeddings", in_section<kModel, &Model::tie_embeddings>, kNoRange, kNoChoices,
     kSame, "of the path, else false", "the output head shares the embedding's weights"},
    {"model", "attention_bias", in_section<kModel, &Model::attention_bias>, kNoRange, kNoChoices,
     kSame, "of the path, else false", "biases of the q, k and v projections"},
    {"model", "attention_out_bias", in_section<kModel, &Model::attention_out_bias>, kNoRange,
     kNoChoices, kSame, "of the family, else true",
     "with model.attention_bias: a bias of the output projection too"},
    {"model", "shared_expert_hidden", in_section<kModel, &Model::shared_expert_hidden>,
     kDimensionOrZero, kNoChoices, kSame, "of the path, else 0",
     "hidden width of the shared expert, which every token passes; 0 = none"},
    {"model", "shared_expert_gate", in_section<kModel, &Model::shared_expert_gate>, kNoRange,
     kNoChoices, kSame, "of the path, else false",
     "the shared expert's output is scaled by the sigmoid of a logit per token"},
    {"model", "dense_layers", in_section<kModel, &Model::dense_layers>, kLayerNumber, kNoChoices,
     kSame, "of the path, else []", "layers, from 0, with a dense MLP in place of experts"},
    {"model", "dense_hidden", in_section<kModel, &Model::dense_hidden>, kDimensionOrZero,
     kNoChoices, kSame, "of the path, else 0",
     "hidden width of a dense layer's MLP; needed with model.dense_layers"},
    {"model", "qk_norm", in_section<kModel, &Model::qk_norm>, kNoRange, kQkNormNames, kSame,
     kFromFamily, "RMSNorm of queries and keys; fixed by the family"},

    {"data", "train", in_section<kData, &Data::train>, kNoRange, kNoChoices, kSame, nullptr,
     "training corpora: .txt, .jsonl, .jsonl.zst or .h5 token files"},
    {"data", "validation", in_section<kData, &Data::validation>, kNoRange, kNoChoices, kSame,
     nullptr, "validation corpora; none = a held-out tail of data.train"},
    {"data", "validation_fraction", in_section<kData, &Data::validation_fraction>, kFraction,
     kNoChoices, kSame, nullptr,
     "part of data.train that is held out when data.validation is empty"},
    {"data", "tokenizer", in_section<kData, &Data::tokenizer>, kNoRange, kTokenizerNames, kSame,
     nullptr, "kind of tokenizer"},
    {"data", "tokenizer_path", in_section<kData, &Data::tokenizer_path>, kNoRange, kNoChoices,
     kSame, nullptr, "SentencePiece model; empty = trained on data.train, into data/cache"},
    {"data",
     "tokenizer_vocab",
     in_section<kData, &Data::tokenizer_vocab>,
     {0, 16777216},
     kNoChoices,
     kSame,
     nullptr,
     "pieces of a tokenizer trained here; 0 = model.vocab"},
    {"data", "document_mask", in_section<kData, &Data::document_mask>, kNoRange, kNoChoices, kSame,
     nullptr, "attention stays within a document"},

    {"train", "steps", in_section<kTrain, &Train::steps>, kCount, kNoChoices, kMay, nullptr,
     "optimizer steps"},
    {"train",
     "global_batch_sequences",
     in_section<kTrain, &Train::global_batch_sequences>,
     {1, 16777216},
     kNoChoices,
     kSame,
     nullptr,
     "sequences of a step, over all ranks"},
    {"train",
     "micro_batch_sequences",
     in_section<kTrain, &Train::micro_batch_sequences>,
     {1, 65536},
     kNoChoices,
     kMay,
     nullptr,
     "sequences of one forward pass of one data rank"},
    {"train", "sequence_length", in_section<kTrain, &Train::sequence_length>, kDimension,
     kNoChoices, kSame, nullptr, "tokens of a sequence; a multiple of numerics.block_tokens"},
    {"train", "eval_every_steps", in_section<kTrain, &Train::eval_every_steps>, kOptionalCount,
     kNoChoices, kSame, nullptr, "steps between evaluations; 0 = only after the last step"},
    {"train", "eval_sequences", in_section<kTrain, &Train::eval_sequences>, kStretch, kNoChoices,
     kSame, nullptr, "sequences of an evaluation"},
    {"train",
     "sample_tokens",
     in_section<kTrain, &Train::sample_tokens>,
     {0, 1e6},
     kNoChoices,
     kSame,
     nullptr,
     "length of the text in samples.txt; 0 = none"},

    {"optimizer", "name", in_section<kOptimizer, &Optimizer::name>, kNoRange, kOptimizerNames,
     kSame, nullptr, "optimizer"},
    {"optimizer", "lr", in_section<kOptimizer, &Optimizer::lr>, kFewfold, kNoChoices, kSame,
     nullptr, "highest learning rate"},
    {"optimizer", "beta1", in_section<kOptimizer, &Optimizer::beta1>, kFraction, kNoChoices, kSame,
     nullptr, "decay of the first moment"},
    {"optimizer", "beta2", in_section<kOptimizer, &Optimizer::beta2>, kFraction, kNoChoices, kSame,
     nullptr, "decay of the second moment"},
    {"optimizer",
     "epsilon",
     in_section<kOptimizer, &Optimizer::epsilon>,
     {1e-30, 1},
     kNoChoices,
     kSame,
     nullptr,
     "added to the root of the second moment"},
    {"optimizer", "weight_decay", in_section<kOptimizer, &Optimizer::weight_decay>, kFewfold,
     kNoChoices, kSame, nullptr, "decoupled weight decay, times the learning rate"},
    {"optimizer", "decay", in_section<kOptimizer, &Optimizer::decay>, kNoRange, kDecayNames, kSame,
     nullptr, "what decays: weight matrices, or every parameter"},
    {"optimizer",
     "clip",
     in_section<kOptimizer, &Optimizer::clip>,
     {0, 1e9},
     kNoChoices,
     kSame,
     nullptr,
     "largest global gradient norm; 0 = no clipping"},
    {"optimizer", "state_dtype", in_section<kOptimizer, &Optimizer::state_dtype>, kNoRange,
     kComputeNames, kSame, nullptr,
     "storage of both moments; bf16 is rounded up or down by a hash of element and step"},

    {"schedule", "kind", in_section<kSchedule, &Schedule::kind>, kNoRange, kScheduleKindNames,
     kSame, nullptr, "shape after the warm-up"},
    {"schedule", "warmup_steps", in_section<kSchedule, &Schedule::warmup_steps>, kOptionalCount,
     kNoChoices, kSame, nullptr, "steps of linear warm-up; cut to train.steps"},
    {"schedule", "decay_steps", in_section<kSchedule, &Schedule::decay_steps>, kOptionalCount,
     kNoChoices, kSame, nullptr, "wsd: steps of the decay; 0 = a fifth of train.steps; cut to it"},
    {"schedule", "min_lr_ratio", in_section<kSchedule, &Schedule::min_lr_ratio>, kRatio, kNoChoices,
     kSame, nullptr, "last learning rate / optimizer.lr"},

    {"parallel", "pp", in_section<kParallel, &Parallel::pp>, kRanks, kNoChoices, kMay, nullptr,
     "pipeline stages"},
    {"parallel", "dp", in_section<kParallel, &Parallel::dp>, kRanks, kNoChoices, kMay, nullptr,
     "data-parallel ranks, every one counted"},
    {"parallel", "cp", in_section<kParallel, &Parallel::cp>, kRanks, kNoChoices, kMay, nullptr,
     "ranks that share a sequence; run.device = cuda: numerics.reduction = fast alone"},
    {"parallel", "ep", in_section<kParallel, &Parallel::ep>, kRanks, kNoChoices, kMay, nullptr,
     "ranks that share a layer's experts; divides dp * cp and model.experts"},
    {"parallel", "sharding", in_section<kParallel, &Parallel::sharding>, kNoRange, kShardingNames,
     kMay, nullptr, "what ranks of dp * cp share out: nothing, optimizer, gradients, parameters"},
    {"parallel", "shard_ranks", in_section<kParallel, &Parallel::shard_ranks>, kUpTo64kOrZero,
     kNoChoices, kMay, nullptr,
     "ranks that sharding runs over, a multiple of cp and ep that divides dp * cp; their groups "
     "hold copies of the state; 0 = all"},
    {"parallel", "schedule", in_section<kParallel, &Parallel::schedule>, kNoRange, kScheduleNames,
     kMay, nullptr, "pipeline schedule"},
    {"parallel", "virtual_stages", in_section<kParallel, &Parallel::virtual_stages>, kUpTo64k,
     kNoChoices, kMay, nullptr, "layer groups of a rank with interleaved_1f1b"},
    {"parallel", "context", in_section<kParallel, &Parallel::context>, kNoRange, kContextNames,
     kMay, nullptr,
     "how keys and values of a shared sequence travel: all at once, or from rank to rank under "
     "attention"},
    {"parallel", "overlap", in_section<kParallel, &Parallel::overlap>, kNoRange, kNoChoices, kMay,
     nullptr, "run the two passes of a dualpipev pair stage by stage in turn"},

    {"balance", "loss", in_section<kBalance, &Balance::loss>, kNoRange, kBalanceNames, kSame,
     nullptr, "over what the load-balance loss counts tokens"},
    {"balance", "loss_weight", in_section<kBalance, &Balance::loss_weight>, kWeight, kNoChoices,
     kSame, nullptr, "weight of the load-balance loss"},
    {"balance", "z_loss_weight", in_section<kBalance, &Balance::z_loss_weight>, kWeight, kNoChoices,
     kSame, nullptr, "weight of the squared log-sum-exp of the router's logits"},
    {"balance", "bias_update_rate", in_section<kBalance, &Balance::bias_update_rate>, kTenfold,
     kNoChoices, kSame, nullptr, "step of the selection bias, once per training step; 0 = no bias"},
    {"balance", "routing", in_section<kBalance, &Balance::routing>, kNoRange, kRoutingNames, kSame,
     nullptr,
     "who chooses a training step's experts: the router, a rotation that loads all alike, or a "
     "recorded trace; weights are the router's in any case"},
    {"balance", "routing_file", in_section<kBalance, &Balance::routing_file>, kNoRange, kNoChoices,
     kSame, nullptr,
     "the trace of balance.routing = replay, of `cambium train --trace-routing`; a trace of fewer "
     "steps than the run starts again"},

    {"recompute", "mode", in_section<kRecompute, &RecomputeConfig::mode>, kNoRange, kRecomputeNames,
     kMay, nullptr,
     "what backward computes again; swiglu: what it does in any case; full_layer: every stage, "
     "from the layer's input and the stored choice of experts"},
    {"recompute", "norms", in_section<kRecompute, &RecomputeConfig::norms>, kNoRange, kNoChoices,
     kMay, nullptr, "backward norms a layer's inputs again instead of keeping the results"},
    {"recompute", "attention", in_section<kRecompute, &RecomputeConfig::attention>, kNoRange,
     kNoChoices, kMay, nullptr,
     "backward computes q, k, v and attention again instead of keeping them"},

    {"numerics", "compute", in_section<kNumerics, &Numerics::compute>, kNoRange, kComputeNames,
     kSame, "fp32 on cpu, bf16 on cuda",
     "storage of activations and of the weights that products read"},
    {"numerics", "reduction", in_section<kNumerics, &Numerics::reduction>, kNoRange,
     kReductionNames, kSame, "exact on cpu, fast on cuda",
     "exact: the same bits for every layout; fast: the transport's order"},
    {"numerics", "fast_order", in_section<kNumerics, &Numerics::fast_order>, kNoRange,
     kFastOrderNames, kSame, nullptr,
     "the simulator's sums in fast mode: by rank, or as NCCL's ring adds and rounds"},
    {"numerics", "block_tokens", in_section<kNumerics, &Numerics::block_tokens>, kUpTo64k,
     kNoChoices, kSame, nullptr, "positions of a block, the unit of exact sums"},
    {"numerics", "attention", in_section<kNumerics, &Numerics::attention>, kNoRange,
     kAttentionNames, kSame, nullptr,
     "a GPU's kernel of whole sequences; cudnn: fast mode alone, no document mask"},

    {"checkpoint", "every_steps", in_section<kCheckpoint, &Checkpoint::every_steps>, kOptionalCount,
     kNoChoices, kMay, nullptr, "steps between checkpoints; 0 = only after the last step"},
    {"checkpoint", "keep", in_section<kCheckpoint, &Checkpoint::keep>, kOptionalCount, kNoChoices,
     kMay, nullptr, "newest checkpoints that stay; 0 = all"},

    {"logging", "digest_every_steps", in_section<kLogging, &Logging::digest_every_steps>, kCount,
     kNoChoices, kMay, nullptr, "steps between parameter digests"},
    {"logging", "tensorboard", in_section<kLogging, &Logging::tensorboard>, kNoRange, kNoChoices,
     kMay, nullptr, "write events.out.tfevents.*"},

    {"run", "name", in_name, kNoRange, kNoChoices, kMay, "the file's name without .toml",
     "name of the configuration"},
    {"run", "seed", in_section<kRun, &Run::seed>, kSeeds, kNoChoices, kMay, nullptr,
     "root of every random stream"},
    {"run", "device", in_section<kRun, &Run::device>, kNoRange, kDeviceNames, kMay, nullptr,
     "where ops run"},
    {"run",
     "workers",
     in_section<kRun, &Run::workers>,
     {0, 4096},
     kNoChoices,
     kMay,
     nullptr,
     "worker threads of the CPU; 0 = its cores; results do not depend on it"},
    {"run", "out", in_section<kRun, &Run::out>, kNoRange, kNoChoices, kMay, nullptr,
     "run directory; empty = runs/<name>-<UTC time>"},
    {"run", "transport", in_section<kRun, &Run::transport>, kNoRange, kTransportNames, kMay,
     nullptr,
     "sim: every rank in this process; nccl: one process per rank; auto: by the launcher's "
     "variables"},
    {"run",
     "watchdog_s",
     in_section<kRun, &Run::watchdog_s>,
     {1, 86400},
     kNoChoices,
     kMay,
     nullptr,
     "seconds that ranks wait for a missing process, and that a collective may run (exit 20, 21)"},
    {"run", "allow_faults", in_section<kRun, &Run::allow_faults>, kNoRange, kNoChoices, kMay,
     nullptr, "let `train` run with [[faults]]"},
    {"run", "cuda_graphs", in_section<kRun, &Run::cuda_graphs>, kNoRange, kNoChoices, kMay, nullptr,
     "a run of one rank: launches that repeat become CUDA graphs, of the same bits"},

    {"plan", "machine", in_section<kPlan, &PlanConfig::machine>, kNoRange, kNoChoices, kSame,
     nullptr, "machine name or file"},
    {"plan", "routing", in_section<kPlan, &PlanConfig::routing>, kNoRange, kNoChoices, kSame,
     nullptr,
     "how tokens choose experts: uniform, zipf, concentrated (all tokens the same top_k of a "
     "layer), "
     "or a run's metrics.jsonl, whose last loads count, or routing trace"},
    {"plan", "zipf", in_section<kPlan, &PlanConfig::zipf>, kTenfold, kNoChoices, kSame, nullptr,
     "exponent of plan.routing = zipf: expert i is chosen with a weight of (i + 1)^-zipf"},

    {"faults", "kind", in_fault<&FaultConfig::kind>, kNoRange, fault_names(), kMay, "required",
     "which mistake"},
    {"faults", "rank", in_fault<&FaultConfig::rank>, kRankRange, kNoChoices, kMay, nullptr,
     "on which rank"},
    {"faults", "step", in_fault<&FaultConfig::step>, kCount, kNoChoices, kMay, nullptr,
     "at which step"},
    {"faults", "site", in_fault<&FaultConfig::site>, kNoRange, kNoChoices, kMay, nullptr,
     "where: a communicator, part of a wait's name, or #k for the k-th fitting place"},
    {"faults", "probability", in_fault<&FaultConfig::probability>, kRatio, kNoChoices, kMay,
     nullptr, "0: as named; else of striking once in a run, rank and step drawn from run.seed"},
    {"faults", "seconds", in_fault<&FaultConfig::seconds>, kSeconds, kNoChoices, kMay, nullptr,
     "of virtual time that a pause, or each transfer of a slow or flapping link, takes"},
};

// A number as text, without the fraction of whole numbers.
std::string bound_text(double bound) {
  if (bound >= 9.2e18) return "9223372036854775807";
  return fmt::format("{}", bound);
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char letter : text) {
    const auto code = static_cast<unsigned char>(letter);
    if (letter == '"' || letter == '\\') {
      result += '\\';
      result += letter;
    } else if (code < 0x20 || code == 0x7f) {
      result += fmt::format("\\u{:04x}", code);
    } else {
      result += letter;
    }
  }
  return result + "\"";
}

// The value of an alternative of KeyField as TOML.
struct TomlText {
  const KeySpec& spec;
  std::string operator()(const int64_t* value) const { return fmt::format("{}", *value); }
  std::string operator()(const uint64_t* value) const { return fmt::format("{}", *value); }
  std::string operator()(const bool* value) const { return *value ? "true" : "false"; }
  std::string operator()(const std::string* value) const { return quoted(*value); }
  std::string operator()(const double* value) const {
    const std::string text = fmt::format("{}", *value);
    return text.find_first_of(".en") == std::string::npos ? text + ".0" : text;
  }
  std::string operator()(const std::vector<std::string>* value) const {
    std::string text = "[";
    for (const std::string& element : *value) text += (text == "[" ? "" : ", ") + quoted(element);
    return text + "]";
  }
  std::string operator()(const std::vector<int64_t>* value) const {
    std::string text = "[";
    for (const int64_t element : *value) {
      text += fmt::format("{}{}", text == "[" ? "" : ", ", element);
    }
    return text + "]";
  }
  std::string operator()(const ChoiceField& field) const {
    const auto index = static_cast<size_t>(field.get(field.target));
    CHECK_LT(index, spec.choices.size());
    return quoted(spec.choices[index]);
  }
};

bool is_number(const KeySpec& spec) { return spec.range.minimum < spec.range.maximum; }

template <size_t kCount, class Value>
const char* name_at(const char* const (&names)[kCount], Value value) {
  const auto index = static_cast<size_t>(value);
  CHECK_LT(index, kCount);
  return names[index];
}

}  // namespace

std::span<const KeySpec> key_specs() { return kKeys; }
std::span<const SectionSpec> section_specs() { return kSections; }

const KeySpec* find_key(std::string_view section, std::string_view name) {
  for (const KeySpec& spec : kKeys) {
    if (section == spec.section && name == spec.name) return &spec;
  }
  return nullptr;
}

const char* type_name(const KeySpec& spec) {
  Config config;
  config.faults.emplace_back();
  const KeyField field = spec.field(config, 0);
  if (!spec.choices.empty()) return "choice";
  const char* const names[] = {"integer", "integer",       "number",           "boolean",
                               "text",    "list of texts", "list of integers", "choice"};
  CHECK_LT(field.index(), std::size(names));
  return names[field.index()];
}

std::string range_text(const KeySpec& spec) {
  if (!spec.choices.empty()) {
    return joined_names(std::vector<std::string>(spec.choices.begin(), spec.choices.end()), " | ");
  }
  if (!is_number(spec)) return "";
  return fmt::format("{} .. {}{}", bound_text(spec.range.minimum),
                     spec.range.ends == RangeEnds::open_above ? "below " : "",
                     bound_text(spec.range.maximum));
}

std::string value_toml(const KeySpec& spec, const KeyField& field) {
  return std::visit(TomlText{spec}, field);
}

std::string range_problem(const KeySpec& spec, double value) {
  CHECK(is_number(spec));
  if (!std::isfinite(value)) return "is not a finite number";
  const bool above = spec.range.ends == RangeEnds::open_above ? value >= spec.range.maximum
                                                              : value > spec.range.maximum;
  if (value >= spec.range.minimum && !above) return "";
  return "is out of range: " + range_text(spec);
}

const char* choice_name(Sharding value) { return name_at(kShardingNames, value); }
const char* choice_name(PipelineSchedule value) { return name_at(kScheduleNames, value); }
const char* choice_name(ContextExchange value) { return name_at(kContextNames, value); }
const char* choice_name(ComputeType value) { return name_at(kComputeNames, value); }
const char* choice_name(ReductionMode value) { return name_at(kReductionNames, value); }
const char* choice_name(DeviceKind value) { return name_at(kDeviceNames, value); }
const char* choice_name(Transport value) { return name_at(kTransportNames, value); }
const char* choice_name(BalanceLoss value) { return name_at(kBalanceNames, value); }
const char* choice_name(RoutingChoice value) { return name_at(kRoutingNames, value); }
const char* choice_name(ScheduleKind value) { return name_at(kScheduleKindNames, value); }
const char* choice_name(RecomputeMode value) { return name_at(kRecomputeNames, value); }
const char* choice_name(DecayRule value) { return name_at(kDecayNames, value); }
const char* choice_name(ModelFamily value) { return name_at(kFamilyNames, value); }
const char* choice_name(QkNorm value) { return name_at(kQkNormNames, value); }
const char* choice_name(RopeKind value) { return name_at(kRopeNames, value); }
const char* choice_name(TokenizerKind value) { return name_at(kTokenizerNames, value); }

}  // namespace cambium
