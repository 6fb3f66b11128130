#include "src/parallel/batch_layout.h"

#include "src/base/check.h"

namespace cambium {

BatchLayout::BatchLayout(const Config& config) : mesh(make_mesh(config.parallel)) {
  sequences_per_rank = config.train.global_batch_sequences / mesh.dp;
  micro_batch_sequences = config.train.micro_batch_sequences;
  micro_batches = sequences_per_rank / micro_batch_sequences;
  // Forward-only uses need no blocks, so a sequence shorter than a block counts as one.
  blocks_per_sequence = (config.train.sequence_length + config.numerics.block_tokens - 1) /
                        config.numerics.block_tokens;
  total_blocks = config.train.global_batch_sequences * blocks_per_sequence;
  CHECK_EQ(micro_batches * micro_batch_sequences * mesh.dp, config.train.global_batch_sequences);
}

int64_t BatchLayout::first_sequence(int64_t dp_index, int64_t micro_batch) const {
  return dp_index * sequences_per_rank + micro_batch * micro_batch_sequences;
}

BlockRange BatchLayout::blocks(int64_t dp_index, int64_t micro_batch) const {
  const int64_t first = first_sequence(dp_index, micro_batch) * blocks_per_sequence;
  return {first, first + micro_batch_sequences * blocks_per_sequence};
}

std::vector<std::vector<BlockRange>> BatchLayout::dense_ranges(int64_t rank) const {
  std::vector<std::vector<BlockRange>> ranges;
  const int64_t dp_index = mesh_coordinates(mesh, rank).dp_index;
  for (int64_t micro = 0; micro < micro_batches; ++micro) {
    ranges.push_back({blocks(dp_index, micro)});
  }
  return ranges;
}

std::vector<std::vector<BlockRange>> BatchLayout::expert_ranges(int64_t rank) const {
  std::vector<std::vector<BlockRange>> ranges;
  const std::vector<int> sources = expert_group(mesh, mesh_coordinates(mesh, rank));
  for (int64_t micro = 0; micro < micro_batches; ++micro) {
    std::vector<BlockRange>& group = ranges.emplace_back();
    for (const int source : sources) {
      group.push_back(blocks(mesh_coordinates(mesh, source).dp_index, micro));
    }
  }
  return ranges;
}

}  // namespace cambium
