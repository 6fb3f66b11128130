// Which tiles of a grouped GEMM a cluster of CTAs owns, from device offsets.
//
// RowSchedule: rows are ragged. An expert's rows are cut into slices of 64 and its slices evenly
// into items of at most 4 per CTA, so that no item is nearly empty; where the last round would keep
// only a few CTAs busy, its items are cut further. A row's bits do not depend on the cut: its
// contraction runs in the same order in any tile (D2).
// DepthSchedule: the contracted extent is ragged (weight gradients). Experts go by falling row
// count, rounds alternate in direction, so that the loads of CTAs differ by less than one tile.
#pragma once

#include "kernels/cuda_launch.cuh"

namespace cambium::cuda {

constexpr int kSliceRows = 64;
constexpr int kTileSlices = 4;
constexpr int kTileRows = kTileSlices * kSliceRows;
constexpr int kMaxExperts = 512;  // entries of the table in shared memory

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

template <int kCluster>
class RowSchedule {
 public:
  // Fills table[0 .. experts] with the first item of each expert; all threads of warp 0 call it.
  __device__ static void build(const GroupedExtent& extent, int* table) {
    const int lane = threadIdx.x;
    int carry = 0;
    for (int first = 0; first < extent.experts; first += kWarpLanes) {
      const int x = first + lane;
      int items = 0;
      if (x < extent.experts) {
        const int rows = extent.expert_offset[x + 1] - extent.expert_offset[x];
        items = ceil_divide(ceil_divide(rows, kSliceRows), kTileSlices * kCluster);
      }
      int sum = items;
      for (int step = 1; step < kWarpLanes; step *= 2) {
        const int before = __shfl_up_sync(kAllLanes, sum, step);
        if (lane >= step) sum += before;
      }
      if (x < extent.experts) table[x] = carry + sum - items;
      carry += __shfl_sync(kAllLanes, sum, kWarpLanes - 1);
    }
    if (lane == 0) table[extent.experts] = carry;
  }

  __device__ RowSchedule(const GroupedExtent& extent, const int* table, int rank)
      : extent_(extent), table_(table), rank_(rank) {
    clusters_ = static_cast<int>(gridDim.x) / kCluster;
    unit_ = static_cast<int>(blockIdx.x) / kCluster;
    column_tiles_ = ceil_divide(extent.columns, extent.columns_of_tile);
    items_ = table[extent.experts] * column_tiles_;
    whole_ = items_ / clusters_ * clusters_;
    const int rest = items_ - whole_;
    parts_ = rest == 0 ? 1 : clusters_ / rest >= 4 ? 4 : clusters_ / rest >= 2 ? 2 : 1;
  }

  __device__ bool next(GroupedTile& tile) {
    const int unit = unit_;
    unit_ += clusters_;
    const bool is_cut = unit >= whole_;
    const int parts = is_cut ? parts_ : 1;
    const int item = is_cut ? whole_ + (unit - whole_) / parts : unit;
    const int part = is_cut ? (unit - whole_) % parts : 0;
    if (item >= items_) return false;
    const int row_item = item / column_tiles_;
    while (row_item >= table_[expert_ + 1]) ++expert_;
    const int begin = extent_.expert_offset[expert_], end = extent_.expert_offset[expert_ + 1];
    const int slices = ceil_divide(end - begin, kSliceRows);
    const int items = table_[expert_ + 1] - table_[expert_], m = row_item - table_[expert_];
    const int first = slices * m / items, count = slices * (m + 1) / items - first;
    const int shares = parts * kCluster, share = part * kCluster + rank_;
    const int mine = first + count * share / shares;
    const int mine_end = first + count * (share + 1) / shares;
    tile.expert = expert_;
    tile.row0 = begin + mine * kSliceRows;
    tile.rows = min(end, begin + mine_end * kSliceRows) - tile.row0;
    tile.column0 = item % column_tiles_ * extent_.columns_of_tile;
    tile.depth0 = 0;
    tile.depth = extent_.depth;
    return true;
  }

 private:
  const GroupedExtent& extent_;
  const int* table_;
  int rank_;
  int clusters_, unit_, column_tiles_, items_;
  int whole_;  // items before the last round
  int parts_;  // of each item of the last round
  int expert_ = 0;
};

template <int kCluster>
class DepthSchedule {
 public:
  // Fills table with the experts by falling row count, then the number of those that have rows; all
  // threads of the block call it.
  __device__ static void build(const GroupedExtent& extent, int* table) {
    const int32_t* offset = extent.expert_offset;
    if (threadIdx.x == 0) table[extent.experts] = 0;
    __syncthreads();
    for (int x = threadIdx.x; x < extent.experts; x += blockDim.x) {
      const int rows = offset[x + 1] - offset[x];
      int before = 0;
      for (int y = 0; y < extent.experts; ++y) {
        const int other = offset[y + 1] - offset[y];
        before += other > rows || (other == rows && y < x) ? 1 : 0;
      }
      table[before] = x;
      if (rows > 0) atomicAdd(&table[extent.experts], 1);
    }
  }

  __device__ DepthSchedule(const GroupedExtent& extent, const int* table, int rank)
      : extent_(extent), table_(table), rank_(rank) {
    clusters_ = static_cast<int>(gridDim.x) / kCluster;
    row_tiles_ = ceil_divide(extent.rows, kTileRows * kCluster);
    expert_tiles_ = row_tiles_ * ceil_divide(extent.columns, extent.columns_of_tile);
    items_ = table[extent.experts] * expert_tiles_;
  }

  __device__ bool next(GroupedTile& tile) {
    const int cluster = static_cast<int>(blockIdx.x) / kCluster;
    const int item = round_ * clusters_ + (round_ % 2 == 0 ? cluster : clusters_ - 1 - cluster);
    ++round_;
    if (item >= items_) return false;  // only the last round has fewer items than clusters
    const int local = item % expert_tiles_;
    tile.expert = table_[item / expert_tiles_];
    tile.row0 = (local % row_tiles_ * kCluster + rank_) * kTileRows;
    tile.rows = max(0, min(kTileRows, extent_.rows - tile.row0));
    tile.column0 = local / row_tiles_ * extent_.columns_of_tile;
    tile.depth0 = extent_.expert_offset[tile.expert];
    tile.depth = extent_.expert_offset[tile.expert + 1] - tile.depth0;
    return true;
  }

 private:
  const GroupedExtent& extent_;
  const int* table_;
  int rank_;
  int clusters_, row_tiles_, expert_tiles_, items_;
  int round_ = 0;
};

}  // namespace cambium::cuda
