// Which tiles of a grouped GEMM a cluster of CTAs owns, from device offsets.
//
// RowSchedule: rows are ragged. An expert's rows are cut into slices of 64, its slices into items
// of a whole tile per CTA and a last one with what is left, evenly over the cluster's CTAs. Experts
// go in order, so that an expert's weights are used while they are in the L2 (what is left of all
// experts at the end instead balances better and reads weights twice: 4 % slower). A row's bits do
// not depend on the cut: its contraction runs in the same order in any tile (D2). DepthSchedule:
// the contracted extent is ragged (weight gradients). Experts go by falling row count, rounds
// alternate in direction, so that the loads of CTAs differ by less than one tile.
#pragma once

#include "kernels/cuda_launch.cuh"

namespace cambium::cuda {

constexpr int kSliceRows = 64;
constexpr int kTileSlices = 2;
constexpr int kTileRows = kTileSlices * kSliceRows;
constexpr int kMaxExperts = 512;

// What the schedule keeps in shared memory.
struct GroupedTable {
  int offset[kMaxExperts + 1];
  int first_item[kMaxExperts + 1];  // RowSchedule: items before each expert's
  int order[kMaxExperts];           // DepthSchedule: experts by falling row count
  int ordered;                      // how many of them have rows
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
  static constexpr int kItemSlices = kTileSlices * kCluster;

  __device__ static int slices_of(const GroupedTable& table, int x) {
    return ceil_divide(table.offset[x + 1] - table.offset[x], kSliceRows);
  }
  __device__ static void build(const GroupedExtent& extent, GroupedTable& table) {
    for (int x = threadIdx.x; x <= extent.experts; x += blockDim.x) {
      int items = 0;
      for (int y = 0; y < x; ++y) items += ceil_divide(slices_of(table, y), kItemSlices);
      table.first_item[x] = items;
    }
  }

  __device__ RowSchedule(const GroupedExtent& extent, const GroupedTable& table, int rank)
      : extent_(extent), table_(table), rank_(rank) {
    column_tiles_ = ceil_divide(extent.columns, extent.columns_of_tile);
    item_ = static_cast<int>(blockIdx.x) / kCluster;
  }

  __device__ bool next(GroupedTile& tile) {
    const int row_item = item_ / column_tiles_;
    if (row_item >= table_.first_item[extent_.experts]) return false;
    tile.column0 = (item_ - row_item * column_tiles_) * extent_.columns_of_tile;
    item_ += static_cast<int>(gridDim.x) / kCluster;
    while (row_item >= table_.first_item[expert_ + 1]) ++expert_;
    const int first = (row_item - table_.first_item[expert_]) * kItemSlices;
    const int count = min(kItemSlices, slices_of(table_, expert_) - first);
    const int begin = table_.offset[expert_], end = table_.offset[expert_ + 1];
    const int mine = first + count * rank_ / kCluster;
    const int mine_end = first + count * (rank_ + 1) / kCluster;
    tile.expert = expert_;
    tile.row0 = begin + mine * kSliceRows;
    tile.rows = min(end, begin + mine_end * kSliceRows) - tile.row0;
    tile.depth0 = 0;
    tile.depth = extent_.depth;
    return true;
  }

 private:
  const GroupedExtent& extent_;
  const GroupedTable& table_;
  int rank_;
  int column_tiles_;
  int item_;
  int expert_ = 0;
};

template <int kCluster>
class DepthSchedule {
 public:
  __device__ static void build(const GroupedExtent& extent, GroupedTable& table) {
    const auto rows_of = [&](int x) { return table.offset[x + 1] - table.offset[x]; };
    for (int x = threadIdx.x; x < extent.experts; x += blockDim.x) {
      const int rows = rows_of(x);
      int before = 0, any = 0;
      for (int y = 0; y < extent.experts; ++y) {
        const int other = rows_of(y);
        before += other > rows || (other == rows && y < x) ? 1 : 0;
        any += other > 0 ? 1 : 0;
      }
      if (rows > 0) table.order[before] = x;
      if (x == 0) table.ordered = any;
    }
  }

  __device__ DepthSchedule(const GroupedExtent& extent, const GroupedTable& table, int rank)
      : extent_(extent), table_(table), rank_(rank) {
    clusters_ = static_cast<int>(gridDim.x) / kCluster;
    row_tiles_ = ceil_divide(extent.rows, kTileRows * kCluster);
    expert_tiles_ = row_tiles_ * ceil_divide(extent.columns, extent.columns_of_tile);
    items_ = table.ordered * expert_tiles_;
  }

  __device__ bool next(GroupedTile& tile) {
    const int cluster = static_cast<int>(blockIdx.x) / kCluster;
    const int item = round_ * clusters_ + (round_ % 2 == 0 ? cluster : clusters_ - 1 - cluster);
    ++round_;
    if (item >= items_) return false;  // only the last round has fewer items than clusters
    const int order = item / expert_tiles_, local = item - order * expert_tiles_;
    const int column_tile = local / row_tiles_, row_tile = local - column_tile * row_tiles_;
    tile.expert = table_.order[order];
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
