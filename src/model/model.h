// Model: a decoder-only MoE transformer on one rank: parameters, forward and backward of one
// micro-batch. The decoder layer and its five stages are in qwen3_moe.h.
#pragma once

#include <memory>
#include <vector>

#include "src/model/qwen3_moe.h"

namespace cambium {

// Host data of one micro-batch of this rank (src/data/batch.h fills it).
struct HostTokens {
  const std::vector<int32_t>* token_T = nullptr;
  const std::vector<int32_t>* target_T = nullptr;
  const std::vector<int32_t>* position_T = nullptr;
  const std::vector<int32_t>* document_start_T = nullptr;  // null = sequences are one document
  int64_t sequence_length = 0;
  int64_t first_block = 0;
  double balance_gradient_scale = 0;
  double z_gradient_scale = 0;
};

class Model {
 public:
  Model(Rank& rank, const ModelConfig& config);

  ParamGroup& dense() { return *dense_; }
  ParamGroup& expert() { return *expert_; }
  RouterState& router() { return router_; }
  const ModelConfig& config() const { return config_; }
  // All canonical tensors of the model, this rank's or not, and where each one's 4,096-element
  // blocks begin in the model-wide table of norms (the last entry is the table's length).
  const std::vector<CanonicalTensor>& tensors() const { return tensors_; }
  const std::vector<int32_t>& first_norm_block() const { return first_norm_block_; }

  // Draws the initial weights: normal(0, init_std) for matrices, ones for norm gains. A value
  // depends on (seed, tensor, element) alone, so every layout starts with the same bits.
  void initialize(uint64_t seed);

  // `metric_leaf_BM`: the rows of the metrics table that this micro-batch fills.
  MicroBatch upload(const HostTokens& tokens, InOut<float> metric_leaf_BM);
  // Forward and backward; gradients go to the groups' targets.
  void train_micro_batch(const MicroBatch& batch);
  // Forward alone: losses into the metrics table and, when given, logits [T, V] (fp32).
  void evaluate_micro_batch(const MicroBatch& batch, float* logits_TV);

  // The parts of a micro-batch, for benchmarks: the embedding, and one layer's five stages.
  Buffer embed(const MicroBatch& batch);
  Buffer layer_forward(const MicroBatch& batch, int64_t layer, Buffer x_TD, LayerState& state,
                       Keep keep);
  Buffer layer_backward(const MicroBatch& batch, int64_t layer, Buffer d_out_TD, LayerState& state);

  // Experts e on this rank: global numbers [first_expert, first_expert + local_experts).
  int64_t local_experts() const;
  int64_t first_expert() const;

 private:
  LayerContext layer_context(int64_t layer, Keep keep = Keep::for_backward);
  // Final norm, vocabulary head and loss; returns the gradient of the last layer's output, its
  // weight gradients done (they are computed in the forward pass, chunk by chunk).
  Buffer head_forward_backward(const MicroBatch& batch, const Buffer& x_TD);
  void head_evaluate(const MicroBatch& batch, const Buffer& x_TD, float* logits_TV);

  struct TensorSeed {
    uint64_t seed, tensor;
  };
  void draw_normal(std::vector<float>& values, int64_t first, const TensorSeed& seed) const;

  Rank& rank_;
  ModelConfig config_;
  std::vector<CanonicalTensor> tensors_;
  std::vector<int32_t> first_norm_block_;
  std::unique_ptr<ParamGroup> dense_, expert_;
  std::vector<LayerTensors> layers_;
  RouterState router_;
  Buffer cos_SC_, sin_SC_;
  int64_t positions_ = 0;
};

}  // namespace cambium
