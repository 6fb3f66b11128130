// TrainStep: one rank's part of an optimizer step, and of an evaluation. The whole step reads here.
//
//   1. every micro-batch: forward, loss, backward, in the order of the pipeline schedule; weight
//      gradients go to the groups' targets
//   2. gradients are summed over replicas, as forests (exact) or sums (fast)
//   3. norm over canonical blocks, clip, division by N: one scale
//   4. AdamW on the owned shards, weights gathered
//   5. router biases, digests; then the step's only unconditional host wait
#pragma once

#include <map>
#include <string>
#include <vector>

#include "src/base/digest.h"
#include "src/config/derive.h"
#include "src/data/batch.h"
#include "src/model/model.h"
#include "src/parallel/batch_layout.h"
#include "src/parallel/schedule.h"
#include "src/train/step_routing.h"

namespace cambium {

// Where sequences come from: a corpus, or fixed ones (golden directories, prompts).
class SequenceSource {
 public:
  virtual ~SequenceSource() = default;
  // Sequences [first, first + count) of global batch `batch_index`.
  virtual void fill(int64_t batch_index, SequenceRange range, Batch& batch) const = 0;
  // N: targets of the whole global batch that are not ignored.
  virtual int64_t target_count(int64_t batch_index) const = 0;
};

class CorpusSequences : public SequenceSource {
 public:
  explicit CorpusSequences(BatchSource source) : source_(std::move(source)) {}
  void fill(int64_t batch_index, SequenceRange range, Batch& batch) const override {
    source_.fill(batch_index, range, batch);
  }
  int64_t target_count(int64_t batch_index) const override {
    return source_.target_count(batch_index);
  }
  const BatchSource& source() const { return source_; }

 private:
  BatchSource source_;
};

// What a step yields on every rank: the same values everywhere.
struct StepResult {
  double loss = 0;          // mean over the N tokens
  double balance_loss = 0;  // mean over sequences, summed over layers
  double z_loss = 0;        // mean over tokens, summed over layers
  double grad_norm = 0;     // before clipping
  double learning_rate = 0;
  int64_t tokens = 0;                             // N
  std::vector<std::vector<int64_t>> expert_load;  // [layer][expert]
  std::map<std::string, Digest128> digests;       // empty when not asked for
};

enum class WithDigests { no, yes };

class TrainStep {
 public:
  TrainStep(Rank& rank, const ModelConfig& model);

  Model& model() { return model_; }
  Rank& rank() { return rank_; }
  const BatchLayout& layout() const { return layout_; }
  StepRouting& routing() { return routing_; }

  // The start of a step and of each of its micro-batches: parts of `accumulate`, for benchmarks.
  void begin(int64_t batch_index, const SequenceSource& source);
  MicroBatch upload_micro_batch(const SequenceSource& source, int64_t batch_index,
                                int64_t micro_batch);
  // Steps 1 to 3: leaves the summed gradients in the groups. `batch_index` is 0-based.
  void accumulate(const SequenceSource& source, int64_t batch_index);
  // Steps 4 and 5; waits, and throws exit code 50 when a gradient or the loss is not finite.
  StepResult update(int64_t step, double learning_rate, WithDigests digests);
  // Summed loss of one global batch, the same on every rank. `logits_TV` (optional, fp32): of all
  // this rank's sequences, micro-batch by micro-batch, where the head is.
  struct Evaluation {
    double loss_sum = 0;
    int64_t tokens = 0;
  };
  Evaluation evaluate(const SequenceSource& source, int64_t batch_index, float* logits_TV);
  // Digests of the parameters as they are. A collective call.
  std::map<std::string, Digest128> digests();
  // Final gradients divided by N, by canonical name, of the pieces this rank owns. After
  // `accumulate`; for parity.
  std::map<std::string, std::vector<float>> owned_gradients();

 private:
  friend class PipelinePass;
  void reduce_metrics();
  std::vector<float> canonical_metrics() const;
  void compute_norm();
  void apply_adamw(int64_t step, double learning_rate);
  void update_router_state();
  void enqueue_digests();
  void download_results();
  std::map<std::string, Digest128> read_digests();
  StepResult read_result() const;
  void check_finite(int64_t step) const;

  Rank& rank_;
  Model model_;
  BatchLayout layout_;
  StepRouting routing_;
  Schedule training_, evaluation_;
  SchedulePass pass_ = SchedulePass::training;
  int64_t targets_ = 0;  // N
  // [micro-batch][block of this rank][column], and those of all ranks.
  Buffer metric_table_, gathered_metrics_;
  Buffer global_count_LE_, norm_partial_, first_norm_block_, clip_result_;
  Buffer digest_table_, gathered_digests_;
  // On the host after `finish_step` (Rank::download).
  const float* host_metrics_ = nullptr;
  const int32_t* host_counts_ = nullptr;
  const float* host_clip_ = nullptr;
  const uint64_t* host_digests_ = nullptr;
};

}  // namespace cambium
