// Weight gradients: the plan of a walk, its batches and chunks (reference/wgrad.h says what is
// promised and what it costs).
#include "reference/wgrad.h"

#include <algorithm>

#include "reference/gemm.h"
#include "reference/product_kernels.h"
#include "src/base/check.h"

namespace cambium::reference {

namespace {

constexpr int64_t kPackedFloats = 96 * 1024;  // both operands of a batch of rows: 384 KB
constexpr int64_t kMinBatchRows = 64;
constexpr int64_t kMinChunkSide = 64;

// Steps cut into batches that fit the packing buffers; rows of a batch are contiguous.
std::vector<StepBatch> cut_batches(const WgradPlan& plan, int64_t packed_columns,
                                   int64_t& stack_tiles) {
  const int64_t most = std::clamp(kPackedFloats / packed_columns, kMinBatchRows, kMaxBatchRows);
  std::vector<StepBatch> batches;
  int64_t depth = 0;
  stack_tiles = 1;
  for (int64_t s = 0; s < static_cast<int64_t>(plan.steps.size()); ++s) {
    const WgradStep& step = plan.steps[s];
    const bool continues = !batches.empty() && step.row_begin == batches.back().row_end &&
                           step.row_end - batches.back().row_begin <= most;
    if (!continues) batches.push_back({s, s, step.row_begin, step.row_begin, depth});
    batches.back().step_end = s + 1;
    batches.back().row_end = step.row_end;
    depth -= step.merges;
    CHECK_GE(depth, 0);
    stack_tiles = std::max(stack_tiles, depth + 1);  // every step's value passes through the top
    if (step.node < 0) ++depth;
  }
  CHECK_EQ(depth, 0);
  return batches;
}

void walk_group(const WgradGroup& group, const WgradChunk& chunk, Scratch& scratch) {
  StepWalk walk;
  const std::vector<StepBatch> batches =
      cut_batches(group.plan, chunk.n_count + chunk.k_count, walk.stack_tiles);
  walk.steps = group.plan.steps.data();
  walk.nodes = group.plan.nodes.data();
  walk.batches = batches.data();
  walk.batch_count = static_cast<int64_t>(batches.size());
  walk.is_carried = std::any_of(batches.begin(), batches.end(),
                                [](const StepBatch& b) { return b.stack_depth > 0; });
  product_kernels().walk_chunk(group, chunk, walk, scratch);
}

// Halves the longer side of a group's matrix until there are `wanted` chunks.
void cut_group(const WgradGroup& group, int64_t index, int64_t wanted,
               std::vector<WgradChunk>& chunks) {
  int64_t n = group.N, k = group.K;
  auto pieces = [](int64_t whole, int64_t part) { return (whole + part - 1) / part; };
  while (pieces(group.N, n) * pieces(group.K, k) < wanted && std::max(n, k) >= 2 * kMinChunkSide) {
    int64_t& longer = n >= k ? n : k;
    longer = (longer / 2 + kTileColumns - 1) / kTileColumns * kTileColumns;
  }
  for (int64_t n_begin = 0; n_begin < group.N; n_begin += n) {
    for (int64_t k_begin = 0; k_begin < group.K; k_begin += k) {
      chunks.push_back({index, n_begin, std::min(n, group.N - n_begin), k_begin,
                        std::min(k, group.K - k_begin)});
    }
  }
}

}  // namespace

WgradPlan plan_wgrad(const GradTarget& target, const WgradLeaves& leaves, int64_t slot_count,
                     uint8_t* present, int64_t slot_step) {
  WgradPlan plan;
  for (int64_t node = 0; node < target.node_table_NC[0]; ++node) {
    const NodeRow row = node_row(target, node, slot_count);
    const bool is_present = walk_node(
        row.first_block, row.end_block, leaves.leaf_block, 0, 0,
        [&](int64_t leaf, int) {
          plan.steps.push_back({leaves.leaf_row[leaf], leaves.leaf_row[leaf + 1], 0, -1});
        },
        [&](int) { ++plan.steps.back().merges; });
    const NodeStore store =
        resolve_store(row, is_present ? Presence::present : Presence::absent, present, slot_step);
    if (!store.is_stored) continue;
    if (!is_present) {
      const int64_t here = plan.steps.empty() ? 0 : plan.steps.back().row_end;
      plan.steps.push_back({here, here, 0, -1});  // nothing to multiply, only folds
    }
    plan.steps.back().node = static_cast<int32_t>(plan.nodes.size());
    plan.nodes.push_back(store);
  }
  return plan;
}

int64_t WgradGroup::row_count() const {
  if (mode != GradMode::nodes) return row_end - row_begin;
  int64_t rows = 0;
  for (const WgradStep& step : plan.steps) rows += step.row_end - step.row_begin;
  return rows;
}

void wgrad_groups(std::span<const WgradGroup> groups, Workers& workers) {
  int64_t rows = 0;
  for (const WgradGroup& group : groups) rows += group.row_count();
  std::vector<WgradChunk> chunks;
  for (size_t g = 0; g < groups.size(); ++g) {
    const bool is_idle = groups[g].row_count() == 0 && groups[g].plan.steps.empty() &&
                         groups[g].mode != GradMode::store;
    if (is_idle) continue;
    const int64_t wanted =
        (kChunksPerOp * groups[g].row_count() + rows - 1) / std::max<int64_t>(rows, 1);
    cut_group(groups[g], static_cast<int64_t>(g), wanted, chunks);
  }
  workers.parallel_for(static_cast<int64_t>(chunks.size()), [&](int64_t chunk, Scratch& scratch) {
    const WgradGroup& group = groups[chunks[chunk].group];
    if (group.mode != GradMode::nodes) {
      product_kernels().accumulate_chunk(group, chunks[chunk], scratch);
    } else {
      walk_group(group, chunks[chunk], scratch);
    }
  });
}

}  // namespace cambium::reference
