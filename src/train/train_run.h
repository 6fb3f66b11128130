// The training run as every rank sees it: load or initialise, steps, checkpoints, evaluation.
//
// `train_rank` is the body of each rank; which transport carries it is the launcher's business.
#pragma once

#include <csignal>
#include <memory>
#include <string>

#include "src/base/io.h"
#include "src/checkpoint/checkpoint.h"
#include "src/train/metrics_writer.h"
#include "src/train/progress.h"
#include "src/train/routing_trace.h"
#include "src/train/train_step.h"

namespace cambium {

// What all ranks of a process share, fixed while they run. Only rank 0 writes metrics and progress.
struct TrainRun {
  const Config* config = nullptr;
  const Derived* derived = nullptr;
  std::string resolved_config;
  std::string directory;  // run directory
  FileSystem* files = nullptr;
  const SequenceSource* train = nullptr;
  const SequenceSource* validation = nullptr;  // null = none
  int64_t validation_batches = 0;
  CheckpointReader* resume = nullptr;  // null = start at step 0
  int64_t last_step = 0;               // stop_after_step or train.steps
  const volatile std::sig_atomic_t* stop_signal = nullptr;
  double peak_flops_per_s = 0;                  // of all GPUs of the run; 0 = no MFU
  int64_t profile_step = 0;                     // rank 0's step that a profiler records; 0 = none
  int64_t trace_from = 0;                       // the first step whose routing is traced; 0 = none
  RoutingTraceWriter* routing_trace = nullptr;  // rank 0's
  MetricsWriter* metrics = nullptr;
  Progress* progress = nullptr;
};

enum class StopReason { finished, stop_after_step, signal };

// The same on every rank.
struct TrainOutcome {
  int64_t step = 0;  // optimizer steps done
  StopReason reason = StopReason::finished;
  double validation_loss = 0;  // of the last step; NaN when not evaluated
};

std::string checkpoint_directory(const std::string& run_directory);
std::string layout_text(const Config& config);

TrainOutcome train_rank(RankEnvironment& environment, const TrainRun& run);

// Parameters (and optimizer and router state when the checkpoint has them) into a rank's model.
// `source` holds canonical names; `with_optimizer` also reads "m/<name>" and "v/<name>".
enum class LoadState { weights, all };
void load_weights(TrainStep& step, TensorSource& source, LoadState what);
void load_checkpoint(TrainStep& step, CheckpointReader& reader);
// Every rank writes its shard; rank 0 commits and retains. A collective call.
void save_checkpoint(TrainStep& step, const TrainRun& run, int64_t at_step);

}  // namespace cambium
