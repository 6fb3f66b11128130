// Weight gradients: batches of rows are packed, then groups of register tiles walk the steps of the
// plan (reference/wgrad.h says what is promised and what it costs).
#include "reference/wgrad.h"

#include <algorithm>
#include <cstring>

#include "reference/gemm.h"
#include "reference/gemm_tile.h"
#include "src/base/check.h"

namespace cambium::reference {

namespace {

constexpr int64_t kPackedFloats = 96 * 1024;  // both operands of a batch of rows: 384 KB
constexpr int64_t kMinBatchRows = 64;
constexpr int64_t kMaxBatchRows = 256;  // a panel of x is 16 KB
constexpr int64_t kMinChunkSide = 64;
constexpr int kTileFloats = kTileRows * kTileColumns;
constexpr int64_t kGroupTiles = 16;  // one level of their stacks is 6 KB

// A part of one group's matrix.
struct WgradChunk {
  int64_t group = 0;
  int64_t n_begin = 0;
  int64_t n_count = 0;
  int64_t k_begin = 0;
  int64_t k_count = 0;
};

// Consecutive steps whose rows are packed together.
struct StepBatch {
  int64_t step_begin = 0;
  int64_t step_end = 0;
  int64_t row_begin = 0;
  int64_t row_end = 0;
  int64_t stack_depth = 0;  // tiles on the stack when the batch starts
  int64_t rows() const { return row_end - row_begin; }
};

// d_y columns of a batch as panels [rows][panel's columns], x columns as panels [rows][16].
struct PackedBatch {
  float* a = nullptr;
  float* b = nullptr;
  int64_t rows = 0;
  int64_t a_panel_stride() const { return rows * kTileRows + kPanelPadding; }
  int64_t b_panel_stride() const { return rows * kTileColumns + kPanelPadding; }
};

template <int kRows>
float* pack_row_panels(const float* from, int64_t panels, int64_t row, int64_t panel_stride,
                       float* to) {
  for (int64_t p = 0; p < panels; ++p, from += kRows, to += panel_stride) {
    std::memcpy(to + row * kRows, from, kRows * sizeof(float));
  }
  return to;
}

PackedBatch pack_batch(const WgradGroup& group, const WgradChunk& chunk, int64_t row_begin,
                       int64_t rows, Scratch& scratch) {
  const PanelCut cut(chunk.n_count);
  const int64_t b_panels = (chunk.k_count + kTileColumns - 1) / kTileColumns;
  PackedBatch packed;
  packed.rows = rows;
  packed.a = scratch.floats(kPackedASlot, cut.panels * packed.a_panel_stride());
  packed.b = scratch.floats(kPackedBSlot, b_panels * packed.b_panel_stride());
  const float* x = group.x + row_begin * group.x_stride + chunk.k_begin;
  pack_panels(x, group.x_stride, OperandOrder::depth_major, chunk.k_count, rows, packed.b,
              packed.b_panel_stride());
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = group.d_y + (row_begin + row) * group.d_y_stride + chunk.n_begin;
    float* to = packed.a;
    if (cut.longer > 0) {
      with_tile_rows(cut.base + 1, [&]<int kRows>() {
        to = pack_row_panels<kRows>(from, cut.longer, row, packed.a_panel_stride(), to);
      });
      from += cut.longer * (cut.base + 1);
    }
    with_tile_rows(cut.base, [&]<int kRows>() {
      pack_row_panels<kRows>(from, cut.panels - cut.longer, row, packed.a_panel_stride(), to);
    });
  }
  return packed;
}

// Tiles of the same height in one panel of x, below each other. They are walked together, step by
// step: the branches of a step depend on the step alone, so only the first tile can mispredict.
struct TileGroup {
  const float* a = nullptr;  // panel of the first tile; the next one is a_stride further
  int64_t a_stride = 0;
  const float* b = nullptr;
  int64_t count = 0;
  int64_t n = 0;  // place in the whole matrix
  int64_t k = 0;
  int64_t columns = 0;
  int64_t tile_index = 0;  // of the first tile in the chunk
};

// Calls run.template operator()<rows>(group) for every group of register tiles of the chunk.
template <class Run>
void for_each_tile_group(const WgradChunk& chunk, const PackedBatch& packed, Run&& run) {
  const PanelCut cut(chunk.n_count);
  TileGroup group;
  group.a_stride = packed.a_panel_stride();
  group.b = packed.b;
  for (int64_t k = 0; k < chunk.k_count; k += kTileColumns, group.b += packed.b_panel_stride()) {
    group.k = chunk.k_begin + k;
    group.columns = std::min(kTileColumns, chunk.k_count - k);
    for (int64_t p = 0; p < cut.panels; p += group.count) {
      const int64_t same_height = p < cut.longer ? cut.longer : cut.panels;
      group.count = std::min(kGroupTiles, same_height - p);
      group.a = packed.a + p * packed.a_panel_stride();
      group.n = chunk.n_begin + cut.begin(p);
      with_tile_rows(cut.count(p), [&]<int kRows>() { run.template operator()<kRows>(group); });
      group.tile_index += group.count;
    }
  }
}

void accumulate_chunk(const WgradGroup& group, const WgradChunk& chunk, Scratch& scratch) {
  bool stores = group.mode == GradMode::store;  // at least once, whatever the row count
  for (int64_t row = group.row_begin; row < group.row_end || stores; row += kMaxBatchRows) {
    const int64_t rows = std::min(kMaxBatchRows, group.row_end - row);
    const PackedBatch packed = pack_batch(group, chunk, row, rows, scratch);
    for_each_tile_group(chunk, packed, [&]<int kRows>(const TileGroup& tiles) {
      for (int64_t i = 0; i < tiles.count; ++i) {
        float* c = group.slots + (tiles.n + i * kRows) * group.K + tiles.k;
        Tile<kRows> tile;
        if (stores) {
          tile.clear();
        } else {
          load_tile(tile, c, group.K, tiles.columns);
        }
        tile.multiply(tiles.a + i * tiles.a_stride, 1, kRows, tiles.b, rows);
        store_tile(tile, c, group.K, tiles.columns);
      }
    });
    stores = false;
  }
}

// Folds the left slots into a finished node's value and stores it. The value comes through memory,
// so that the tiles of the walk itself stay in registers.
template <int kRows>
void finish_node(const WgradGroup& group, const NodeStore& store, const float* value,
                 int64_t offset, int64_t columns) {
  Tile<kRows> tile;
  tile.load(value, kTileColumns);
  bool has_value = store.value_present;
  for (int32_t f = 0; f < store.fold_count; ++f) {
    Tile<kRows> left;
    load_tile(left, group.slots + store.folds[f] * group.slot_stride + offset, group.K, columns);
    if (has_value) left.add(tile);
    tile = left;
    has_value = true;
  }
  store_tile(tile, group.slots + store.destination * group.slot_stride + offset, group.K, columns);
}

// Runs a batch of steps on a group of tiles. `stack` holds their unfinished operands, the tiles of
// one level next to each other.
template <int kRows>
void walk_tiles(const WgradGroup& group, const StepBatch& batch, const TileGroup& tiles,
                float* stack) {
  const int64_t level_floats = tiles.count * kTileFloats;
  float* top = stack + batch.stack_depth * level_floats;
  for (int64_t s = batch.step_begin; s < batch.step_end; ++s) {
    const WgradStep& step = group.plan.steps[s];
    const int64_t row = step.row_begin - batch.row_begin, rows = step.row_end - step.row_begin;
    float* value = top - step.merges * level_floats;
    for (int64_t i = 0; i < tiles.count; ++i) {
      Tile<kRows> tile;
      tile.clear();
      tile.multiply(tiles.a + i * tiles.a_stride + row * kRows, 1, kRows,
                    tiles.b + row * kTileColumns, rows);
      for (int32_t m = 1; m <= step.merges; ++m) {
        tile.add_left(top - m * level_floats + i * kTileFloats, kTileColumns);
      }
      tile.store(value + i * kTileFloats, kTileColumns);
    }
    top = value;
    if (step.node < 0) {
      top += level_floats;
      continue;
    }
    for (int64_t i = 0; i < tiles.count; ++i) {
      finish_node<kRows>(group, group.plan.nodes[step.node], top + i * kTileFloats,
                         (tiles.n + i * kRows) * group.K + tiles.k, tiles.columns);
    }
  }
}

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

void walk_chunk(const WgradGroup& group, const WgradChunk& chunk, Scratch& scratch) {
  int64_t stack_tiles = 0;
  const std::vector<StepBatch> batches =
      cut_batches(group.plan, chunk.n_count + chunk.k_count, stack_tiles);
  const bool is_carried = std::any_of(batches.begin(), batches.end(),
                                      [](const StepBatch& b) { return b.stack_depth > 0; });
  const int64_t tiles =
      PanelCut(chunk.n_count).panels * ((chunk.k_count + kTileColumns - 1) / kTileColumns);
  // One stack serves all tile groups in turn, unless operands wait across batches.
  const int64_t stack_floats = stack_tiles * kTileFloats;
  float* stack = scratch.floats(kPartialSlot, (is_carried ? tiles : kGroupTiles) * stack_floats);
  for (const StepBatch& batch : batches) {
    const PackedBatch packed = pack_batch(group, chunk, batch.row_begin, batch.rows(), scratch);
    for_each_tile_group(chunk, packed, [&]<int kRows>(const TileGroup& tiles) {
      walk_tiles<kRows>(group, batch, tiles,
                        stack + (is_carried ? tiles.tile_index * stack_floats : 0));
    });
  }
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
      accumulate_chunk(group, chunks[chunk], scratch);
    } else {
      walk_chunk(group, chunks[chunk], scratch);
    }
  });
}

}  // namespace cambium::reference
