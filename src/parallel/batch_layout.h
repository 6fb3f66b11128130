// BatchLayout: which sequences, and so which canonical blocks, each rank processes when.
//
// With sharding none and zero1 a data rank takes a contiguous run of the global batch's sequences,
// micro-batch by micro-batch. A block is block_tokens consecutive positions of one sequence,
// numbered sequence-major.
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

  // First sequence (within the global batch) of a data rank's micro-batch.
  int64_t first_sequence(int64_t dp_index, int64_t micro_batch) const;
  BlockRange blocks(int64_t dp_index, int64_t micro_batch) const;
  // By micro-batch, the blocks whose tokens reach a rank's dense parameters: its own.
  std::vector<std::vector<BlockRange>> dense_ranges(int64_t rank) const;
  // The same for its experts: those of its expert group.
  std::vector<std::vector<BlockRange>> expert_ranges(int64_t rank) const;
};

}  // namespace cambium
