// ParamGroup: parameters that one set of ranks replicates, flat, with gradients and AdamW state.
//
// Dense parameters are replicated over the dp x cp ranks, a rank's experts over the edp ranks. With
// sharding none and zero1 a rank has one group of each kind; with zero2 and full (and with cp > 1
// in exact mode) one of each kind a layer, the embedding's and the head's. Tensors lie in one flat
// fp32 buffer, each at an offset that is a multiple of 4,096 elements, so shards cut on blocks and
// one contiguous range of the buffer is a shard.
//
// With parallel.shard_ranks the replicas are several copies: runs of ranks, each of which shares
// out all of the state. Gradients are summed within a copy first, so that between copies (nodes)
// each rank moves its shard alone, once a step; every copy then updates its shards, to the same
// bits. The holders of one shard split it further into what each owns: what it sums, counts and
// saves.
//
// Gradients: in exact mode a GradForest of slots, each as large as the buffer, with presence flags
// (one per tensor; the embedding has one per token id); in fast mode slot 0 accumulates. They
// travel to the shards' owners once a step (none, zero1), or after every micro-batch, whose slots
// are then freed (zero2, full): nodes of the forest in exact mode, sums in fast mode, which travel
// while the next layer computes.
// Weights: with `full` only the shard stays, and whole weights exist while they are held.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "kernels/block_table.h"
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

enum class GroupKind { dense, expert };

// The ranks that share out this rank's copy of a group, and the holders of its shard; null: it
// alone.
struct ParamReplicas {
  Communicator& shard;
  Communicator* copies = nullptr;
};

// What a group holds: weights, gradients and AdamW state; gradients alone; or these and a copy of
// weights that another pipeline rank trains.
enum class GroupUse { trained, gradients_only, copied };

// Whether gradients travel after every micro-batch, and parameters are grouped by layer.
bool reduces_each_micro_batch(const Config& config);

class ParamGroup {
 public:
  // ranges[replica][micro_batch] are the canonical blocks whose tokens reach these parameters on
  // that replica, as they arrive (BatchLayout); replicas come copy by copy.
  using ReplicaRanges = std::vector<std::vector<std::vector<BlockRange>>>;
  ParamGroup(Rank& rank, GroupKind kind, std::vector<ParamTensor> tensors, ParamReplicas replicas,
             const ReplicaRanges& ranges, GroupUse use = GroupUse::trained);

  // The vocabulary head uses this group's embedding. `head` sums its gradients apart, in a tree of
  // their own; then the finished sums of the two uses are added: which uses of a block met first,
  // which depends on the layout, cannot matter.
  void tie_head(ParamGroup& head) { tied_head_ = &head; }
  // The same with the head on another pipeline rank. The embedding's side gets the head's finished
  // sums and sends the weights back; the head's side (a group that is reduced and updated in the
  // head's step) keeps both in `head`. Rank by rank: `peer` has this one's place in its stage.
  void tie_to_head_of(int peer) { tied_peer_ = peer; }
  void tie_to_embedding_of(int peer, ParamGroup& head) {
    tied_peer_ = peer;
    tied_head_ = &head;
  }
  // After loading, and after the optimizer: the head's copy of the weights.
  void pass_tied_weights();

  GroupKind kind() const { return kind_; }
  const ParamTensor* find(TensorRole role, int64_t layer) const;  // null when it is elsewhere

  // Whole weights are there between hold and drop, which nest. `prefetch` starts gathering them.
  void prefetch_weights();
  void hold_weights();
  void drop_weights();
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
  // Where the next weight gradient of a tensor (or of `tensors` from it on) goes; each call is for
  // one op call, between begin and end of a micro-batch. In fast mode the first one of a step
  // stores, so that slots need no zeros before, and what no call came for is zeroed at the end.
  GradTarget grad_target(const ParamTensor& tensor, int64_t tensors = 1);

  // A step begins.
  void begin_step();
  void begin_micro_batch(int64_t micro_batch);
  void end_micro_batch();
  // Sums of a micro-batch that end_micro_batch sent on their way (fast mode) have come; until then
  // its slots stay. The next begin_micro_batch and reduce_gradients do it too.
  void land_gradients();
  // Sums gradients over replicas; when `comm` has done what is queued, `gradient()` holds this
  // rank's shard (or all).
  void reduce_gradients();

  const std::vector<ParamTensor>& tensors() const { return tensors_; }
  // The flat range of what this rank owns.
  int64_t owned_elements() const { return shard_elements() / copies_; }
  int64_t owned_first() const { return shard_first() + owned_elements() * copy_; }
  // Pieces this rank owns (norms, digests, checkpoints), pieces it optimizes (those of its shard,
  // or all with sharding none), and pieces whose fp32 weights it stores (all, or its shard's with
  // full).
  const std::vector<ParamPiece>& owned_pieces() const { return owned_; }
  const std::vector<ParamPiece>& optimized_pieces() const { return optimized_; }
  const std::vector<ParamPiece>& stored_pieces() const { return stored_; }

  // The flat range whose state is here: what AdamW runs over, and the blocks of a flat range.
  int64_t state_first() const { return state_first_; }
  int64_t state_elements() const;
  BlockTable block_table(int64_t flat_offset, int64_t elements) const;

  // fp32 weights from a flat offset in a stored piece on.
  float* weights(int64_t flat_offset) const { return weights_.f32() + flat_offset - stored_first_; }
  // Final gradient (sum over tokens, undivided) at a flat offset.
  float* gradient(int64_t flat_offset) const;
  enum Moment { first_moment, second_moment };
  InOut<Real> moment(Moment which, int64_t flat_offset, int64_t elements) const;
  // bf16 compute weights from a flat offset in a stored piece on; null when compute is fp32.
  uint16_t* compute_copy(int64_t flat_offset) const {
    return compute_.empty() ? nullptr : compute_.as<uint16_t>() + flat_offset - stored_first_;
  }
  // Multiplies the final gradient of the optimized pieces (the fault `expert_gradient_scale`).
  void flip_weight();  // changes the sign of this rank's first owned weight, for faults
  void scale_gradient(float factor);
  // After the optimizer, which wrote the owned part of the compute copy: every replica gets every
  // shard (none: it has them; full: it never does).
  void gather_weights();
  // Host values into the fp32 weights of a stored piece.
  void set_weights(const ParamPiece& piece, const std::vector<float>& values);
  // After loading: the bf16 copy follows the fp32 weights.
  void refresh_compute_copy();

 private:
  // One journey of nodes to the owners of their parts: rows are those held there, then arrivals.
  struct Flush {
    std::vector<std::vector<ForestNode>> nodes;  // by sender; slots are the sender's
    MergePlan merges;                            // of rows
    int64_t rows = 0, held_before = 0;
  };
  // Rows of nodes: the address of flat offset 0 in row 0, and the rows' distance.
  struct NodeRows {
    float* data = nullptr;
    uint8_t* flags = nullptr;
    int64_t stride = 0;
  };
  int64_t shard_elements() const { return padded_ / shards_; }
  int64_t shard_first() const { return shard_elements() * replicas_.shard.rank(); }
  void plan_forests(const ReplicaRanges& ranges);
  std::vector<Flush> plan_copy(std::span<const std::vector<std::vector<BlockRange>>> ranges) const;
  Flush plan_flush(std::vector<std::vector<ForestNode>> nodes, const Flush* before) const;
  void plan_node_tables(const std::vector<std::vector<BlockRange>>& ranges);
  std::vector<ParamPiece> pieces_in(int64_t first, int64_t end) const;
  void upload_block_table();
  void allocate_weights();
  void allocate_moments();
  void sum_over_replicas();
  void add_tied_gradient();
  void send_tied_gradient();
  Buffer receive_tied_gradient();
  void open_slots();
  void zero_unwritten();
  void flush_exact(const Flush& flush);
  void flush_fast();
  void cross_copies();
  void receive_nodes(Communicator& senders, const Flush& flush, const NodeRows& from, int64_t first,
                     const NodeRows& rows);
  void reduce_fast_at_end();
  Buffer gather_gradient(Communicator& holders, int64_t first, int64_t elements);
  void merge(const Flush& flush, const NodeRows& rows, const std::vector<ParamPiece>& pieces);
  bool is_exact() const { return rank_.config.numerics.reduction == ReductionMode::exact; }
  bool is_full() const { return rank_.config.parallel.sharding == Sharding::full && shards_ > 1; }

  Rank& rank_;
  GroupKind kind_;
  std::vector<ParamTensor> tensors_;
  ParamReplicas replicas_;
  GroupUse use_;
  ParamGroup* tied_head_ = nullptr;
  int tied_peer_ = -1;  // in `pipeline`
  bool flushes_each_ = false;
  int64_t shards_ = 1, copies_ = 1, copy_ = 0;
  int64_t padded_ = 0;
  int64_t flags_ = 0;
  int64_t state_first_ = 0, stored_first_ = 0;
  std::vector<ParamPiece> owned_, shard_, optimized_, stored_;
  Buffer weights_, compute_, gathered_, moments_[2], block_table_;
  Ticket gathering_, leaving_;
  bool is_leaving_ = false;  // in fast mode, from end_micro_batch to land_gradients
  int64_t holders_ = 0;
  // Gradients: this rank's slots, nodes on their way and those between copies, the shard's held
  // rows, the shard's and the whole gradient.
  Buffer slots_, present_, reduced_, reduced_flags_, crossed_, held_, held_flags_;
  Buffer shard_gradient_, full_gradient_, node_tables_;
  int64_t slot_count_ = 1, held_rows_ = 0, total_blocks_ = 0;
  size_t flushed_ = 0;          // this step
  std::vector<Flush> flushes_;  // within this copy; then the one between copies, where there are
  std::vector<int64_t> first_node_;  // by micro-batch, and the end
  float* gradient_ = nullptr;        // the address of flat offset 0
  GradTarget target_;                // exact mode
  std::vector<uint8_t> written_;     // fast mode: tensors with a contribution in the slots
};

}  // namespace cambium
