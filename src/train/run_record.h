// The files of a run directory as plain structs: what the trainer writes and the tools read back.
//
// `metrics.jsonl`: one object per step, then one exit event. `digests.jsonl`: parameter digests.
// `run.json`: what ran. metrics_writer.h writes them, run_history.h reads them.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace cambium {

// One optimizer step, summed over the whole run's ranks. Losses are means over the N non-ignored
// tokens, in nats. NOTE: a non-finite number is written as JSON null and spelled out under
// "non_finite"; it reads back as itself.
struct StepMetrics {
  int64_t step = 0;  // 1 = after the first optimizer step
  double loss = 0;
  double grad_norm = 0;  // before clipping
  double lr = 0;
  double step_ms = 0;
  double tokens_per_s = 0;
  std::optional<double> mfu;                 // training FLOPs over the GPU's peak
  std::optional<int64_t> peak_memory_bytes;  // of the rank's device memory, since the run began
  int64_t tokens = 0;                        // non-ignored tokens of this step
  std::string digest;  // hex digest of all parameters after the step; empty = not digested
  std::optional<double> balance_loss;
  std::optional<double> z_loss;
  std::optional<double> validation_loss;  // of the parameters after this step
  // Tokens routed to each expert, [layer][expert]; a dense layer has an empty row.
  std::vector<std::vector<int64_t>> expert_load;
};

// One line of digests.jsonl: canonical tensor name -> hex digest, after `step` (0 = initial).
struct StepDigests {
  int64_t step = 0;
  std::map<std::string, std::string> digests;
};

// The last line of metrics.jsonl.
struct ExitEvent {
  int code = 0;
  std::string reason;
  std::string resume;  // the command that goes on; empty = nothing to resume
};

// run.json: what ran, where, from what. Empty strings and absent values are left out.
struct RunRecord {
  std::string name;
  std::string build;        // build id of the binary
  std::string machine;      // processor, cores
  std::string config_hash;  // of config.resolved.toml
  std::string layout;       // "pp 1, dp 8, cp 1, ep 4, sharding zero1"
  std::string transport;    // sim | nccl
  std::string device;       // cpu | cuda
  std::string reduction;    // exact | fast
  std::string start_time;   // UTC, ISO 8601
  uint64_t seed = 0;
  int64_t ranks = 0;
  int64_t workers = 0;
  int64_t steps = 0;
  int64_t parameters = 0;
  int64_t active_parameters = 0;  // used by one token
  // Held-out loss in nats per token of n-gram models tuned on the training text.
  std::optional<double> unigram_loss;
  std::optional<double> bigram_loss;
};

}  // namespace cambium
