#include "src/parallel/batch_layout.h"

#include "src/base/check.h"
#include "src/parallel/param_group.h"

namespace cambium {

BatchLayout::BatchLayout(const Config& config) : mesh(make_mesh(config.parallel)) {
  sequences_per_rank = config.train.global_batch_sequences / mesh.dp;
  micro_batch_sequences = config.train.micro_batch_sequences;
  micro_batches = sequences_per_rank / micro_batch_sequences;
  is_micro_batch_major = reduces_each_micro_batch(config);
  // Forward-only uses need no blocks, so a sequence shorter than a block counts as one.
  blocks_per_sequence = (config.train.sequence_length + config.numerics.block_tokens - 1) /
                        config.numerics.block_tokens;
  total_blocks = config.train.global_batch_sequences * blocks_per_sequence;
  CHECK_EQ(micro_batches * micro_batch_sequences * mesh.dp, config.train.global_batch_sequences);
}

int64_t BatchLayout::first_sequence(int64_t dp_index, int64_t micro_batch) const {
  if (is_micro_batch_major) {
    const int64_t ranks = mesh.dp / mesh.copies, first = dp_index / ranks * ranks;
    return first * sequences_per_rank +
           (micro_batch * ranks + dp_index - first) * micro_batch_sequences;
  }
  return dp_index * sequences_per_rank + micro_batch * micro_batch_sequences;
}

std::vector<BlockRange> BatchLayout::blocks(int64_t rank, int64_t micro_batch) const {
  const MeshCoordinates at = mesh_coordinates(mesh, rank);
  std::vector<BlockRange> ranges;
  for (int64_t s = 0; s < micro_batch_sequences; ++s) {
    const int64_t first = (first_sequence(at.dp_index, micro_batch) + s) * blocks_per_sequence;
    if (mesh.cp == 1) {
      ranges.push_back({first, first + blocks_per_sequence});
      continue;
    }
    const int64_t chunk = blocks_per_sequence / (2 * mesh.cp);
    for (const int64_t index : {at.cp_index, 2 * mesh.cp - 1 - at.cp_index}) {
      ranges.push_back({first + index * chunk, first + (index + 1) * chunk});
    }
  }
  return ranges;
}

std::vector<std::vector<BlockRange>> BatchLayout::dense_ranges(int64_t rank) const {
  std::vector<std::vector<BlockRange>> ranges;
  for (int64_t micro = 0; micro < micro_batches; ++micro) ranges.push_back(blocks(rank, micro));
  return ranges;
}

std::vector<std::vector<BlockRange>> BatchLayout::expert_ranges(int64_t rank) const {
  std::vector<std::vector<BlockRange>> ranges;
  const std::vector<int> sources = expert_group(mesh, mesh_coordinates(mesh, rank));
  for (int64_t micro = 0; micro < micro_batches; ++micro) {
    std::vector<BlockRange>& group = ranges.emplace_back();
    for (const int source : sources) {
      const std::vector<BlockRange> part = blocks(source, micro);
      group.insert(group.end(), part.begin(), part.end());
    }
  }
  return ranges;
}

}  // namespace cambium
