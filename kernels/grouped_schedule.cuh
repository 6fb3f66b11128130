// Which tiles of a grouped GEMM a cluster of CTAs owns, from device offsets.
//
// RowSchedule: rows are ragged. An expert's rows are cut into slices of 64 and its slices evenly
// into items of at most 2 per CTA, so that no item is nearly empty; where the last round would keep
// only a few CTAs busy, its items are cut further. A row's bits do not depend on the cut: its
// contraction runs in the same order in any tile (D2).
// DepthSchedule: the contracted extent is ragged (weight gradients). Experts go by falling row
// count, rounds alternate in direction, so that the loads of CTAs differ by less than one tile.
#pragma once

#include "kernels/cuda_launch.cuh"

namespace cambium::cuda {

constexpr int kSliceRows = 64;
constexpr int kTileSlices = 2;
constexpr int kTileRows = kTileSlices * kSliceRows;
constexpr int kMaxExperts = 512;

// What the schedule keeps in shared memory: the experts' offsets, and the first item of each expert
// or the experts by falling row count.
struct GroupedTable {
  int offset[kMaxExperts + 1];
  int entry[kMaxExperts + 1];
};

struct GroupedExtent {
  const int32_t* expert_offset;
  int experts;
  int rows;             // DepthSchedule: extent of the output's rows
  int depth;            // RowSchedule: contracted extent
  int columns;          // extent of the output's columns
  int columns_of_tile;  // columns that one tile advances by
};

struct GroupedTile {
  int expert;
  int row0;  // first row of the output: of all R rows, or of the expert's matrix
  int rows;  // of this CTA, 0 ... kTileRows
  int column0;
  int depth0;  // first contracted row, 0 in RowSchedule
  int depth;
};

__device__ __forceinline__ int ceil_divide(int a, int b) { return (a + b - 1) / b; }

// All threads of the block call it; offsets are there after the next barrier.
__device__ __forceinline__ void load_offsets(const GroupedExtent& extent, GroupedTable& table) {
  for (int x = threadIdx.x; x <= extent.experts; x += blockDim.x) {
    table.offset[x] = extent.expert_offset[x];
  }
}

template <int kCluster>
class RowSchedule {
 public:
  // Fills the entries with the first item of each expert, and the number of items at the end.
  __device__ static void build(const GroupedExtent& extent, GroupedTable& table) {
    const int lane = threadIdx.x;
    if (lane >= kWarpLanes) return;
    int carry = 0;
    for (int first = 0; first < extent.experts; first += kWarpLanes) {
      const int x = first + lane;
      int items = 0;
      if (x < extent.experts) {
        const int slices = ceil_divide(table.offset[x + 1] - table.offset[x], kSliceRows);
        items = ceil_divide(slices, kTileSlices * kCluster);
      }
      int sum = items;
      for (int step = 1; step < kWarpLanes; step *= 2) {
        const int before = __shfl_up_sync(kAllLanes, sum, step);
        if (lane >= step) sum += before;
      }
      if (x < extent.experts) table.entry[x] = carry + sum - items;
      carry += __shfl_sync(kAllLanes, sum, kWarpLanes - 1);
    }
    if (lane == 0) table.entry[extent.experts] = carry;
  }

  __device__ RowSchedule(const GroupedExtent& extent, const GroupedTable& table, int rank)
      : extent_(extent), table_(table), rank_(rank) {
    clusters_ = static_cast<int>(gridDim.x) / kCluster;
    column_tiles_ = ceil_divide(extent.columns, extent.columns_of_tile);
    const int items = table.entry[extent.experts] * column_tiles_;
    whole_ = items / clusters_ * clusters_;
    const int rest = items - whole_;
    parts_ = 2 * rest <= clusters_ ? 2 : 1;
    units_ = whole_ + rest * parts_;
    unit_ = static_cast<int>(blockIdx.x) / kCluster;
  }

  __device__ bool next(GroupedTile& tile) {
    if (unit_ >= units_) return false;
    const int cut = max(0, unit_ - whole_);  // units of the last round count parts
    const int item = min(unit_, whole_) + cut / parts_, part = cut % parts_;
    const int parts = unit_ >= whole_ ? parts_ : 1;
    unit_ += clusters_;
    const int row_item = item / column_tiles_;
    while (row_item >= table_.entry[expert_ + 1]) ++expert_;
    const int begin = table_.offset[expert_], end = table_.offset[expert_ + 1];
    const int slices = ceil_divide(end - begin, kSliceRows);
    const int items = table_.entry[expert_ + 1] - table_.entry[expert_];
    const int m = row_item - table_.entry[expert_];
    const int first = slices * m / items, count = slices * (m + 1) / items - first;
    const int shares = parts * kCluster, share = part * kCluster + rank_;
    const int mine = first + count * share / shares;
    const int mine_end = first + count * (share + 1) / shares;
    tile.expert = expert_;
    tile.row0 = begin + mine * kSliceRows;
    tile.rows = min(end, begin + mine_end * kSliceRows) - tile.row0;
    tile.column0 = (item - row_item * column_tiles_) * extent_.columns_of_tile;
    tile.depth0 = 0;
    tile.depth = extent_.depth;
    return true;
  }

 private:
  const GroupedExtent& extent_;
  const GroupedTable& table_;
  int rank_;
  int clusters_, unit_, column_tiles_;
  int whole_;  // items before the last round
  int parts_;  // of each item of the last round
  int units_;
  int expert_ = 0;
};

template <int kCluster>
class DepthSchedule {
 public:
  // Fills the entries with the experts by falling row count, then the number of those that have
  // rows.
  __device__ static void build(const GroupedExtent& extent, GroupedTable& table) {
    if (threadIdx.x == 0) {
      int count = 0;
      for (int x = 0; x < extent.experts; ++x) count += table.offset[x + 1] > table.offset[x];
      table.entry[extent.experts] = count;
    }
    for (int x = threadIdx.x; x < extent.experts; x += blockDim.x) {
      const int rows = table.offset[x + 1] - table.offset[x];
      int before = 0;
      for (int y = 0; y < extent.experts; ++y) {
        const int other = table.offset[y + 1] - table.offset[y];
        before += other > rows || (other == rows && y < x) ? 1 : 0;
      }
      table.entry[before] = x;
    }
  }

  __device__ DepthSchedule(const GroupedExtent& extent, const GroupedTable& table, int rank)
      : extent_(extent), table_(table), rank_(rank) {
    clusters_ = static_cast<int>(gridDim.x) / kCluster;
    row_tiles_ = ceil_divide(extent.rows, kTileRows * kCluster);
    expert_tiles_ = row_tiles_ * ceil_divide(extent.columns, extent.columns_of_tile);
    items_ = table.entry[extent.experts] * expert_tiles_;
  }

  __device__ bool next(GroupedTile& tile) {
    const int cluster = static_cast<int>(blockIdx.x) / kCluster;
    const int item = round_ * clusters_ + (round_ % 2 == 0 ? cluster : clusters_ - 1 - cluster);
    ++round_;
    if (item >= items_) return false;  // only the last round has fewer items than clusters
    const int order = item / expert_tiles_, local = item - order * expert_tiles_;
    const int column_tile = local / row_tiles_, row_tile = local - column_tile * row_tiles_;
    tile.expert = table_.entry[order];
    tile.row0 = (row_tile * kCluster + rank_) * kTileRows;
    tile.rows = max(0, min(kTileRows, extent_.rows - tile.row0));
    tile.column0 = column_tile * extent_.columns_of_tile;
    tile.depth0 = table_.offset[tile.expert];
    tile.depth = table_.offset[tile.expert + 1] - tile.depth0;
    return true;
  }

 private:
  const GroupedExtent& extent_;
  const GroupedTable& table_;
  int rank_;
  int clusters_, row_tiles_, expert_tiles_, items_;
  int round_ = 0;
};

}  // namespace cambium::cuda
