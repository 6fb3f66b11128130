// Weight gradients of the grouped GEMM on the tensor cores (kernels/grouped_turns.cuh).
//
// A tile belongs to an expert's matrix or to its transpose; what is summed over are the expert's
// rows of R. Both operands lie as memory has them, the summed rows below each other, and the matrix
// units transpose them. The 96 KB of a tile's fp32 results leave through three buffers of 8 KB and
// the copy engine; what they are added to comes in the same way.
//
// D1: an element belongs to one tile and is stored or added to once. Its sum runs over the expert's
// rows in ascending order, 16 at a time.
// Napkin, up projection at 131072 x 2048 x 1536: 825 GFLOP and, when added, 3.2 GB of fp32 results:
// 1.1 ms of multiplying beside 1.0 ms of memory. Stored results are 1.6 GB.
#pragma once

#include "kernels/grad_target.h"
#include "kernels/grouped_turns.cuh"

namespace cambium::cuda {

// Results leave 32 columns of a tile's half at a time: as boxes of 32 floats, 64 or, transposed,
// 32 of them below each other.
constexpr int kWgradChunkColumns = 32;
constexpr int kWgradChunkBytes = 64 * kWgradChunkColumns * 4;
constexpr int kWgradBuffers = kTurnScratchBytes / kWgradChunkBytes;

// Fewer to fetch with, and a stage's eight addresses would wait for each other.
using WgradRegisters = TurnRegisters<56, 224>;

enum class WgradTile { as_stored, transposed };  // the tile's rows are the matrix's rows, columns

template <WgradTile kTile>
inline constexpr int kWgradBoxRows = kTile == WgradTile::transposed ? kWgradChunkColumns : 64;

struct WgradTileParams {
  CUtensorMap b_map;    // boxes of 64 columns and kTurnBoxDepthOfB rows
  CUtensorMap d_w_map;  // boxes of 32 floats and kWgradBoxRows rows
  GroupedExtent extent;
  const __nv_bfloat16* a;
  int64_t a_stride;
  const int32_t* a_token;  // optional
  const __nv_bfloat16* b;  // for the last rows of an expert
  int64_t b_stride;
  GradMode mode;  // store or accumulate
};

// --- Fetching ---

// A warp's share of a stage of A: rows 8 s + 2 w + (0 or 1) of the 64 summed ones in steps s = 0
// ... 7, half a warp a row, a lane 16 bytes. Lane j < 16 knows which row of the tensor the j-th is.
// NOTE: a stage is multiplied in 768 cycles: what the four warps do for it must be short, and
// nothing in it may wait for memory.
struct WgradRows {
  static constexpr int kSteps = 8, kStepBytes = 8 * kSwizzleBytes;
  int lane, warp;
  uint32_t place;  // in a stage's A, of step 0

  __device__ __forceinline__ WgradRows() {
    lane = threadIdx.x % kWarpLanes;
    warp = static_cast<int>(threadIdx.x) / kWarpLanes;
    const int row = 2 * warp + lane / 16, chunk = lane % 16;
    place = chunk / 8 * kTurnPanelBytes + row * kSwizzleBytes + ((chunk % 8 ^ row) << 4);
  }
  // Of the stage that begins at `k`; -1 beyond the expert's end.
  __device__ __forceinline__ int32_t find(const GroupedTile& tile, const int32_t* token,
                                          int k) const {
    const int at = k + lane / 2 * 8 + 2 * warp + lane % 2;
    if (lane >= 2 * kSteps || at >= tile.depth) return -1;
    return token != nullptr ? token[tile.depth0 + at] : tile.depth0 + at;
  }
  // A whole stage; `columns` of the tile's exist.
  __device__ __forceinline__ void fetch(const __nv_bfloat16* from, uint32_t stride_16, int columns,
                                        int32_t row_of_lane, uint32_t to) const {
    const uint32_t offset_of_lane = static_cast<uint32_t>(row_of_lane) * stride_16;
    uint32_t offset[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      offset[step] = __shfl_sync(kAllLanes, offset_of_lane, 2 * step + lane / 16);
    }
    if (lane % 16 * 8 >= columns) return;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      copy_16(to + place + step * kStepBytes, reinterpret_cast<const uint4*>(from) + offset[step]);
    }
  }
  // An expert's last rows; zeros beyond them.
  __device__ __forceinline__ void fetch_last(const __nv_bfloat16* from, uint32_t stride_16,
                                             int columns, int32_t row_of_lane, uint32_t to) const {
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      const int32_t row = __shfl_sync(kAllLanes, row_of_lane, 2 * step + lane / 16);
      const uint32_t offset = row < 0 ? 0 : static_cast<uint32_t>(row) * stride_16;
      if (lane % 16 * 8 >= columns) continue;
      copy_16(to + place + step * kStepBytes, reinterpret_cast<const uint4*>(from) + offset,
              row < 0 ? 0 : 16);
    }
  }
};

// B of an expert's last rows, a warp a row, a lane 16 bytes; zeros beyond them.
__device__ __forceinline__ void fetch_last_b(const WgradTileParams& p, const GroupedTile& tile,
                                             int k, uint32_t to) {
  const int lane = threadIdx.x % kWarpLanes;
  if (lane >= min(kTurnColumns, p.extent.columns - tile.column0) / 8) return;
  const __nv_bfloat16* from = p.b + tile.column0 + lane * 8;
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x) / kWarpLanes; row < kTurnDepth; row += 4) {
    const bool exists = k + row < tile.depth;
    const int64_t at = exists ? tile.depth0 + k + row : 0;
    copy_16(to + lane / 8 * kTurnPanelBytes + row * kSwizzleBytes + ((lane % 8 ^ row % 8) << 4),
            from + at * p.b_stride, exists ? 16 : 0);
  }
}

// One stage, by a warpgroup.
__device__ __forceinline__ void fetch_wgrad_stage(const WgradTileParams& p,
                                                  const TurnShared& shared, int rank,
                                                  const GroupedTile& tile, const WgradRows& rows,
                                                  int k, uint32_t turn, int32_t row_of_lane) {
  const auto stride_16 = static_cast<uint32_t>(p.a_stride / 8);
  const bool is_whole = k + kTurnDepth <= tile.depth;
  const __nv_bfloat16* from = p.a + tile.row0 + rows.lane % 16 * 8;
  wait_barrier(shared.empty(turn), TurnShared::parity(turn) ^ 1);
  if (threadIdx.x == 0) {
    if (is_whole) {
      fetch_turn_b(p.b_map, shared.b(turn), shared.full(turn), rank,
                   {tile.column0, tile.depth0 + k, 0});
    } else {
      arrive(shared.full(turn));
    }
  }
  __syncwarp();
  if (is_whole) {
    rows.fetch(from, stride_16, tile.rows, row_of_lane, shared.a(turn));
  } else {
    rows.fetch_last(from, stride_16, tile.rows, row_of_lane, shared.a(turn));
    fetch_last_b(p, tile, k, shared.b(turn));
  }
  arrive_after_copies(shared.full(turn));
}

// The rows of a stage are looked up two stages before it.
__device__ __forceinline__ void fetch_wgrad_tiles(const WgradTileParams& p,
                                                  const TurnShared& shared, int rank) {
  DepthSchedule<kTurnCluster> schedule(p.extent, shared.table, rank);
  const WgradRows rows;
  GroupedTile tile;
  uint32_t turn = 0;
  while (schedule.next(tile)) {
    int32_t even = rows.find(tile, p.a_token, 0), odd = rows.find(tile, p.a_token, kTurnDepth);
    for (int k = 0; k < tile.depth; k += 2 * kTurnDepth) {
      fetch_wgrad_stage(p, shared, rank, tile, rows, k, turn++, even);
      if (k + kTurnDepth >= tile.depth) break;
      even = rows.find(tile, p.a_token, k + 2 * kTurnDepth);
      fetch_wgrad_stage(p, shared, rank, tile, rows, k + kTurnDepth, turn++, odd);
      odd = rows.find(tile, p.a_token, k + 3 * kTurnDepth);
    }
  }
}

// --- Results ---

// A group's chunks: 12 of each tile, one after the other through its buffers. To add, what is there
// comes in two chunks ahead, the first two while the tile is multiplied. NOTE: the copy engine
// could add by itself, at half the speed of loading, adding here and storing.
struct WgradChunks {
  static constexpr int kOfHalf = kTurnColumns / kWgradChunkColumns, kOfTile = 2 * kOfHalf;
  static constexpr int kAhead = kWgradBuffers - 1;
  static_assert(kTurnGroups * kWgradBuffers <= TurnShared::kOwnBarriers);
  static_assert(kOfTile % (2 * kWgradBuffers) == 0, "each tile finds the same parities");
  uint32_t buffers, loaded_0;
  int t;  // thread of the group

  __device__ uint32_t buffer(int chunk) const {
    return buffers + chunk % kWgradBuffers * kWgradChunkBytes;
  }
  __device__ uint32_t loaded(int chunk) const { return loaded_0 + 8 * (chunk % kWgradBuffers); }
  __device__ static uint32_t parity(int chunk) {
    return static_cast<uint32_t>(chunk / kWgradBuffers % 2);
  }
  // Calls move(place in shared memory, coordinate) for each box of a chunk.
  template <WgradTile kTile, class Move>
  __device__ __forceinline__ void each_box(const GroupedTile& tile, int chunk, Move&& move) const {
    const int row = tile.row0 + chunk / kOfHalf * 64;
    const int column = tile.column0 + chunk % kOfHalf * kWgradChunkColumns;
    if constexpr (kTile == WgradTile::as_stored) {
      move(buffer(chunk), TensorCoordinate{column, row, tile.expert});
    } else {
      move(buffer(chunk), TensorCoordinate{row, column, tile.expert});
      move(buffer(chunk) + kWgradChunkBytes / 2, TensorCoordinate{row + 32, column, tile.expert});
    }
  }
  // By one thread, when the buffer's last store has been read.
  template <WgradTile kTile>
  __device__ __forceinline__ void load(const WgradTileParams& p, const GroupedTile& tile,
                                       int chunk) const {
    if (chunk >= kOfTile) return;
    arrive_expecting(loaded(chunk), kWgradChunkBytes);
    each_box<kTile>(tile, chunk, [&](uint32_t to, TensorCoordinate at) {
      copy_tensor(to, p.d_w_map, loaded(chunk), at);
    });
  }
  template <WgradTile kTile>
  __device__ __forceinline__ void prepare(const WgradTileParams& p, const GroupedTile& tile) const {
    if (t != 0 || p.mode == GradMode::store) return;
    wait_stores_read<0>();
    for (int chunk = 0; chunk < kAhead; ++chunk) load<kTile>(p, tile, chunk);
  }
  template <WgradTile kTile>
  __device__ __forceinline__ void store(const WgradTileParams& p, const GroupedTile& tile,
                                        int chunk) const {
    if (t != 0) return;
    each_box<kTile>(tile, chunk,
                    [&](uint32_t from, TensorCoordinate at) { store_tensor(p.d_w_map, from, at); });
    commit_stores();
    if (p.mode == GradMode::accumulate) {
      wait_stores_read<1>();  // all but this one: what comes two chunks later has a free buffer
      load<kTile>(p, tile, chunk + kAhead);
    } else {
      wait_stores_read<kWgradBuffers - 1>();
    }
  }
};

// One chunk of a half into a buffer, the 16-byte pieces of 128-byte lines swizzled as the copy
// engine expects them. A line is a row of the tile or, transposed, 32 rows of one of its columns.
// Stored results are what adding to zeros would leave: never -0.
template <WgradTile kTile>
__device__ __forceinline__ void put_wgrad_chunk(uint32_t buffer, GradMode mode, int warp,
                                                const TurnAccumulators& acc, int first) {
  const int lane = threadIdx.x % kWarpLanes, q = lane % 4;
  const auto put = [&](uint32_t place, float value) {
    store_shared_float(place, value + (mode == GradMode::store ? 0.0f : load_shared_float(place)));
  };
#pragma unroll
  for (int g = 0; g < kWgradChunkColumns / 8; ++g) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp * 16 + lane / 4 + 8 * h, column = 8 * g + 2 * q;
      const float low = acc[first + 4 * g + 2 * h], high = acc[first + 4 * g + 2 * h + 1];
      if constexpr (kTile == WgradTile::as_stored) {
        const uint32_t place = buffer + row * kSwizzleBytes +
                               ((column / 4 ^ row % kSwizzleRows) << 4) + column % 4 * 4;
        float old[2] = {0.0f, 0.0f};
        if (mode == GradMode::accumulate) load_shared_floats(place, old);
        store_shared_floats(place, low + old[0], high + old[1]);
      } else {
        const uint32_t line = buffer + row / 32 * (kWgradChunkBytes / 2) + column * kSwizzleBytes;
        const int piece = row % 32 / 4;
        put(line + ((piece ^ column % kSwizzleRows) << 4) + row % 4 * 4, low);
        put(line + kSwizzleBytes + ((piece ^ (column + 1) % kSwizzleRows) << 4) + row % 4 * 4,
            high);
      }
    }
  }
}

template <WgradTile kTile, int kHalf>
__device__ __forceinline__ void finish_wgrad_half(const WgradTileParams& p, const GroupedTile& tile,
                                                  int group, const WgradChunks& chunks,
                                                  const TurnAccumulators& acc) {
  const int barrier = 1 + group;
#pragma unroll
  for (int c = 0; c < WgradChunks::kOfHalf; ++c) {
    const int chunk = kHalf * WgradChunks::kOfHalf + c;
    if (p.mode == GradMode::accumulate) {
      wait_barrier(chunks.loaded(chunk), WgradChunks::parity(chunk));
    } else {
      named_barrier_sync(barrier, kWarpgroupThreads);
    }
    put_wgrad_chunk<kTile>(chunks.buffer(chunk), p.mode, chunks.t / kWarpLanes, acc,
                           c * kWgradChunkColumns / 2);
    fence_async_proxy();
    named_barrier_sync(barrier, kWarpgroupThreads);
    chunks.store<kTile>(p, tile, chunk);
  }
}

template <WgradTile kTile>
__global__ void __launch_bounds__(kTurnThreads, 1)
    grouped_wgrad_kernel(const __grid_constant__ WgradTileParams p) {
  using Schedule = DepthSchedule<kTurnCluster>;
  extern __shared__ __align__(1024) unsigned char memory[];
  const TurnShared shared(memory);
  const int rank = static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    for (int i = 0; i < kTurnGroups * kWgradBuffers; ++i) init_barrier(shared.own(i), 1);
  }
  begin_turns<Schedule>(p.extent, shared, p.b_map);
  if (threadIdx.x < kWarpgroupThreads) {
    WgradRegisters::give();
    fetch_wgrad_tiles(p, shared, rank);
  } else {
    WgradRegisters::take();
    const int group = static_cast<int>(threadIdx.x) / kWarpgroupThreads - 1;
    const WgradChunks chunks{shared.scratch(group), shared.own(group * kWgradBuffers),
                             static_cast<int>(threadIdx.x) % kWarpgroupThreads};
    take_turns<Schedule, 1>(
        p.extent, shared, rank, [&](const GroupedTile& tile) { chunks.prepare<kTile>(p, tile); },
        [&](const GroupedTile& tile, int of_group, const TurnAccumulators& top,
            const TurnAccumulators& bottom) {
          finish_wgrad_half<kTile, 0>(p, tile, of_group, chunks, top);
          finish_wgrad_half<kTile, 1>(p, tile, of_group, chunks, bottom);
        });
    wait_stores();
  }
  end_turns();
}

}  // namespace cambium::cuda
