// ParamGroup: the parameters that one set of ranks replicates, flat, with gradients and AdamW
// state.
//
// A rank has two groups: `dense` (everything but experts, replicated over the dp x cp ranks) and
// `expert` (this rank's experts, replicated over the edp ranks). Tensors lie in one flat fp32
// buffer, each at an offset that is a multiple of 4,096 elements, so shards cut on blocks and one
// contiguous range of the buffer is a shard. Gradients: in exact mode a GradForest of slots, each
// as large as the buffer, with presence flags (one per tensor; the embedding has one per token id);
// in fast mode slot 0 accumulates.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "kernels/grad_target.h"
#include "src/model/tensors.h"
#include "src/parallel/grad_forest.h"
#include "src/parallel/rank.h"

namespace cambium {

struct ParamTensor {
  CanonicalTensor canonical;
  int64_t offset = 0;  // elements, multiple of 4,096
  int64_t elements = 0;
  int64_t first_flag = 0;  // presence flags of this tensor
  int64_t flags = 1;
  int64_t first_norm_block = 0;  // in the model-wide table of 4,096-element blocks
};

// A piece of one tensor that lies in a shard. Block-aligned within the tensor.
struct ParamPiece {
  const ParamTensor* tensor = nullptr;
  int64_t first_element = 0;  // within the tensor
  int64_t elements = 0;
  int64_t flat_offset() const { return tensor->offset + first_element; }
};

// What a group holds: weights, gradients and AdamW state, or gradients alone.
enum class GroupUse : uint8_t { trained, gradients_only };

class ParamGroup {
 public:
  // `replicas` are the ranks that hold this group. ranges[replica][micro_batch] are the canonical
  // blocks whose tokens reach these parameters on that replica (BatchLayout).
  using ReplicaRanges = std::vector<std::vector<std::vector<BlockRange>>>;
  ParamGroup(Rank& rank, std::string name, std::vector<ParamTensor> tensors, Communicator& replicas,
             ReplicaRanges ranges, GroupUse use = GroupUse::trained);

  // The vocabulary head uses the embedding's weights. In exact mode its gradients get a tree of
  // their own, `head`, and the finished sums of the two uses are added: which uses of a block met
  // first, which depends on the layout, then cannot matter. In fast mode they share slot 0.
  void tie_head(const CanonicalTensor& head);
  // Where the vocabulary head's gradients go, and the tensor that they belong to.
  struct HeadGradient {
    ParamGroup& group;
    const ParamTensor& tensor;
  };
  HeadGradient head_gradient();
  // The tensor whose weights the vocabulary head uses.
  const ParamTensor& head_weights() const;

  const ParamTensor& tensor(TensorRole role, int64_t layer = -1) const;
  // Compute weights of one tensor, or of `experts` equally strided ones from this tensor on.
  In<Real> weight(const ParamTensor& tensor, Shape shape, int64_t stride = -1) const;
  // Of this rank's experts, from `first` (its first one) on: [e, ...], expert_stride apart.
  In<Real> expert_weight(const ParamTensor& first, Shape shape) const {
    return weight(first, shape, expert_stride(first));
  }
  static int64_t expert_stride(const ParamTensor& tensor);
  // Gradient slots and presence of a tensor (or of the experts from it on).
  InOut<float> grad_slots(const ParamTensor& tensor, Shape per_slot) const;
  InOut<uint8_t> grad_present(const ParamTensor& tensor, int64_t flags) const;
  const GradTarget& target() const { return target_; }

  // A step begins, then each of its micro-batches: `target()` is where their gradients go.
  void begin_step();
  void begin_micro_batch(int64_t micro_batch);
  // Sums gradients over replicas; afterwards `gradient()` holds this rank's shard (or all).
  void reduce_gradients();

  const std::string& name() const { return name_; }
  const std::vector<ParamTensor>& tensors() const { return tensors_; }
  int64_t padded_elements() const { return padded_; }
  int64_t shard_elements() const { return padded_ / shards_; }
  int64_t shard_first() const { return shard_elements() * replicas_.rank(); }
  // Pieces this rank owns under zero1's partition (norms, digests, checkpoints), and pieces it
  // optimizes (the same, or all with sharding none).
  const std::vector<ParamPiece>& owned_pieces() const { return owned_; }
  const std::vector<ParamPiece>& optimized_pieces() const { return optimized_; }
  Communicator& replicas() const { return replicas_; }

  float* weights() const { return weights_.f32(); }
  // Final gradient (sum over tokens, undivided) at a flat offset.
  float* gradient(int64_t flat_offset) const;
  float* moment1(int64_t flat_offset) const { return moment1_.f32() + flat_offset - state_first_; }
  float* moment2(int64_t flat_offset) const { return moment2_.f32() + flat_offset - state_first_; }
  // bf16 copy's address of a flat offset; null when compute is fp32.
  uint16_t* compute_copy(int64_t flat_offset) const;
  // Multiplies the final gradient of the optimized pieces (the fault `expert_gradient_scale`).
  void scale_gradient(float factor);
  // After the optimizer, which wrote the owned part of the compute copy: every replica gets every
  // shard.
  void gather_weights();
  // Host values into the fp32 weights, from `first_element` of the tensor on.
  void set_weights(const ParamTensor& tensor, int64_t first_element,
                   const std::vector<float>& values);
  // After loading: the bf16 copy follows the fp32 weights.
  void refresh_compute_copy();

 private:
  bool has(TensorRole role) const;
  void allocate_state(int64_t state_elements);
  void add_tied_gradient();
  std::vector<ParamPiece> pieces_in(int64_t first, int64_t end) const;
  void reduce_exact();
  void reduce_fast();
  void merge_nodes(const std::vector<BlockRange>& nodes, float* data, uint8_t* flags,
                   int64_t stride);

  Rank& rank_;
  std::string name_;
  std::vector<ParamTensor> tensors_;
  Communicator& replicas_;
  GroupUse use_;
  std::unique_ptr<ParamGroup> tied_head_;  // exact mode with a tied head
  int64_t shards_ = 1;
  int64_t padded_ = 0;
  int64_t flags_ = 0;
  int64_t state_first_ = 0;
  std::vector<ParamPiece> owned_, optimized_;
  Buffer weights_, compute_, moment1_, moment2_, slots_, present_, reduced_, full_gradient_;
  Buffer node_table_;
  int64_t slot_count_ = 1;
  const float* gradient_data_ = nullptr;
  int64_t gradient_first_ = 0;
  GradForest forest_;
  ReplicaRanges ranges_;
  std::vector<std::vector<BlockRange>> replica_nodes_;  // held at the end of a step
  GradTarget target_;
};

}  // namespace cambium
