// BatchLayout: which sequences, and so which canonical blocks, each rank processes when.
//
// A block is block_tokens consecutive positions of one sequence, numbered sequence-major. With
// sharding none and zero1 a data rank takes a contiguous run of the global batch's sequences,
// micro-batch by micro-batch; where gradients travel after every micro-batch
// (reduces_each_micro_batch) a micro-batch of all data ranks that share out one copy is a
// contiguous run, so that the owners' forests stay small. With cp > 1 the ranks of a context group
// share their sequences: 2 cp chunks, of which rank i holds chunks i and 2 cp - 1 - i (zigzag:
// causal attention costs each rank the same).
#pragma once

#include <cstdint>
#include <vector>

#include "src/config/config.h"
#include "src/parallel/grad_forest.h"
#include "src/parallel/mesh.h"

namespace cambium {

struct BatchLayout {
  explicit BatchLayout(const Config& config);

  Mesh mesh;
  int64_t sequences_per_rank = 0;
  int64_t micro_batch_sequences = 0;
  int64_t micro_batches = 0;  // per rank and step
  int64_t blocks_per_sequence = 0;
  int64_t total_blocks = 0;  // of the global batch
  bool is_micro_batch_major = false;

  int64_t local_blocks() const {  // of one rank's micro-batch
    return micro_batch_sequences * blocks_per_sequence / mesh.cp;
  }
  // First sequence (within the global batch) of a data rank's micro-batch.
  int64_t first_sequence(int64_t dp_index, int64_t micro_batch) const;
  // The blocks of a stage rank's micro-batch, in the order of its tokens.
  std::vector<BlockRange> blocks(int64_t rank, int64_t micro_batch) const;
  // By micro-batch, the blocks whose tokens reach a rank's dense parameters: its own.
  std::vector<std::vector<BlockRange>> dense_ranges(int64_t rank) const;
  // The same for its experts: those of its expert group, as they arrive.
  std::vector<std::vector<BlockRange>> expert_ranges(int64_t rank) const;
};

}  // namespace cambium
