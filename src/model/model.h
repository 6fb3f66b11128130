// Model: what one rank holds of a decoder-only MoE transformer: parameters, and the passes of one
// micro-batch through its chunks. The decoder layer and its five stages are in qwen3_moe.h.
//
// A chunk is one pipeline stage (src/parallel/schedule.h): a run of layers, the first one with the
// embedding before it, the last one with the final norm, the head and the loss after it.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "src/model/qwen3_moe.h"
#include "src/parallel/schedule.h"

namespace cambium {

// Host data of one micro-batch of this rank (src/data/batch.h fills it).
struct HostTokens {
  const std::vector<int32_t>* token_T = nullptr;
  const std::vector<int32_t>* target_T = nullptr;
  const std::vector<int32_t>* position_T = nullptr;
  const std::vector<int32_t>* document_start_T = nullptr;  // null = sequences are one document
  const std::vector<int32_t>* document_start_S = nullptr;  // of whole sequences, with cp > 1
  int64_t sequence_length = 0;
  int64_t index = 0;  // of the micro-batch
  double balance_gradient_scale = 0;
  double z_gradient_scale = 0;
};

// What a chunk's forward saves for its backward, and its input gradients for its weight gradients.
struct ChunkState {
  std::vector<LayerState> layers;
  std::vector<LayerGradients> gradients;
  Buffer d_output_TD;     // last stage: made by the head's forward
  Buffer d_embedding_TD;  // first stage, while weight gradients wait
};

// One chunk's forward of one micro-batch. `x_TD` is what the stage before sent, empty at the first.
// Without `state` nothing is saved for backward, and the last stage yields losses and, when given,
// logits [T, V] (fp32).
struct ForwardCall {
  const MicroBatch& batch;
  int64_t chunk = 0;
  Buffer x_TD;
  ChunkState* state = nullptr;
  float* logits_TV = nullptr;
};
// One chunk's backward. `d_out_TD` is what the stage after sent, empty at the last.
struct BackwardCall {
  const MicroBatch& batch;
  int64_t chunk = 0;
  Buffer d_out_TD;
  ChunkState& state;
  WeightGradients weights = WeightGradients::now;
};

class Model {
 public:
  Model(Rank& rank, const ModelConfig& config);

  // This rank's parameters, in an order that is the same on every rank of a pipeline stage.
  std::span<const std::unique_ptr<ParamGroup>> groups() const { return groups_; }
  RouterState& router() { return router_; }
  const ModelConfig& config() const { return config_; }
  // All canonical tensors of the model, this rank's or not, and where each one's 4,096-element
  // blocks begin in the model-wide table of norms (the last entry is the table's length).
  const std::vector<CanonicalTensor>& tensors() const { return tensors_; }
  const std::vector<int32_t>& first_norm_block() const { return first_norm_block_; }

  // Draws the initial weights: normal(0, init_std) for matrices, ones for norm gains, zeros
  // for biases. A value
  // depends on (seed, tensor, element) alone, so every layout starts with the same bits.
  void initialize(uint64_t seed);
  // After loading: a tied head on another pipeline rank than the embedding gets its copy.
  void pass_tied_weights();

  // `metric_leaf_BM`: the rows of the metrics table that this micro-batch fills.
  MicroBatch upload(const HostTokens& tokens, InOut<float> metric_leaf_BM);
  // A chunk's passes (src/model/chunk_pass.cc). Forward: the result goes to the stage after, empty
  // at the last. Backward: the gradient of the chunk's input, for the stage before; empty at the
  // first.
  Buffer forward(ForwardCall call);
  Buffer backward(BackwardCall call);
  // Both, their layers in pairs: while rows of one pass travel, the other computes. The passes are
  // of different micro-batches, and give the bits that they give one after the other.
  struct PairResult {
    Buffer x_TD, d_x_TD;
  };
  PairResult forward_backward(ForwardCall forward, BackwardCall backward);
  void backward_weight(const MicroBatch& batch, int64_t chunk, ChunkState& state);
  // An activation that no layer makes.
  Buffer real(Shape shape, const char* what) const;
  int64_t chunks() const { return std::ssize(chunks_); }
  bool has_head() const { return head_ != nullptr; }

  // The parts of a micro-batch, for benchmarks: the embedding, and one layer's five stages.
  Buffer embed(const MicroBatch& batch);
  Buffer layer_forward(const MicroBatch& batch, int64_t layer, Buffer x_TD, LayerState& state,
                       Keep keep);
  Buffer layer_backward(const MicroBatch& batch, int64_t layer, LayerState& state,
                        LayerGradients& gradients);
  // What the stages of a layer share (src/model/qwen3_moe.h).
  LayerContext layer_context(int64_t layer, Keep keep = Keep::for_backward);
  // Around a layer's weight gradients of one micro-batch.
  void begin_layer(int64_t layer, const MicroBatch& batch);
  void end_layer(int64_t layer);

  // Experts e on this rank: global numbers [first_expert, first_expert + local_experts).
  int64_t local_experts() const;
  int64_t first_expert() const;

 private:
  // One layer's tensors and where they lie; null groups when another rank has the layer.
  struct LayerPlace {
    ParamGroup* dense = nullptr;
    ParamGroup* expert = nullptr;  // null in a dense layer as well
    LayerTensors tensors;
    std::vector<ParamGroup*> groups;  // those of the two that are here
  };
  struct Chunk {
    LayerRange layers;
    bool embeds = false;  // the first stage
    bool ends = false;    // the last stage
  };
  // The tensor whose weights the vocabulary head uses, and where its gradients go.
  struct HeadWeights {
    ParamGroup* group = nullptr;
    const ParamTensor* tensor = nullptr;
  };
  void place_head();
  void place_chunks();
  bool is_here(const CanonicalTensor& tensor) const;
  void make_groups(std::vector<ParamTensor> tensors);
  ParamGroup* group_with(TensorRole role, int64_t layer) const;
  void hold_layer(int64_t layer);
  void prefetch_layer(int64_t layer);
  // Gradients of these groups go on their way, and those before them have come.
  void end_groups(std::vector<ParamGroup*> groups);
  void drop_layer(int64_t layer);
  void upload_context(const HostTokens& tokens, MicroBatch& batch);
  DType dtype() const;
  void enter(WorkStage stage, WorkPass pass, const MicroBatch& batch);
  class ForwardPass;
  class BackwardPass;
  void layer_alone(ForwardPass& f);
  void layer_alone(BackwardPass& b);
  void layer_pair(ForwardPass& f, BackwardPass& b);
  bool recomputes() const;  // layers, in backward, from their inputs
  void run_head(const ForwardCall& call, const Buffer& x_TD);
  void embed_backward(const MicroBatch& batch, const Buffer& d_x_TD);
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
  std::vector<std::unique_ptr<ParamGroup>> groups_;
  std::vector<LayerPlace> layers_;  // of the whole model
  std::vector<Chunk> chunks_;
  std::vector<ParamGroup*> leaving_;  // whose gradients may be on their way
  ParamGroup* embed_ = nullptr;
  ParamGroup* head_ = nullptr;  // of the final norm
  HeadWeights head_weights_, head_gradient_;
  std::unique_ptr<ParamGroup> tied_head_;  // gradients of a tied embedding as head
  RouterState router_;
  Buffer cos_SC_, sin_SC_;
  int64_t positions_ = 0;
};

}  // namespace cambium
