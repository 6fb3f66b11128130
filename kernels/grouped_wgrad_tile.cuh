// The tensor cores' kernel of grouped weight gradients: persistent, warp-specialised, one CTA per
// SM.
//
// A tile is 128 rows and 192 columns of an expert's matrix or of its transpose; what is summed over
// are the expert's rows of R, 64 at a time, through four stages of 40 KB. Both operands lie as
// memory has them, 64 of the summed rows below each other, and the matrix units transpose them. A,
// whose rows may be gathered, comes in 16-byte copies by a warpgroup; B by the copy engine, half by
// each CTA of a pair for both. Two warpgroups multiply whole tiles in turn: while one brings its 96
// KB of fp32 results out, through three buffers of 8 KB and the copy engine, the other multiplies.
//
// D1: an element belongs to one tile and is stored or added to once. Its sum runs over the expert's
// rows in ascending order, 16 at a time.
// Napkin, up projection at 131072 x 2048 x 1536: 825 GFLOP and, when added, 3.2 GB of fp32 results:
// 1.1 ms of multiplying beside 1.0 ms of memory. Stored results are 1.6 GB.
#pragma once

#include "kernels/cuda_hopper.cuh"
#include "kernels/grouped_schedule.cuh"

namespace cambium::cuda {

constexpr int kWgradColumns = 192;
constexpr int kWgradDepth = 64;
constexpr int kWgradStages = 4;
constexpr int kWgradCluster = 2;
constexpr int kWgradGroups = 2;                                // warpgroups that multiply
constexpr int kWgradPanelBytes = kWgradDepth * kSwizzleBytes;  // 64 summed rows of 64 columns
constexpr int kWgradHalves = kTileRows / 64;
constexpr int kWgradPanelsOfB = kWgradColumns / 64;
constexpr int kWgradABytes = kWgradHalves * kWgradPanelBytes;
constexpr int kWgradBBytes = kWgradPanelsOfB * kWgradPanelBytes;
constexpr int kWgradStageBytes = kWgradABytes + kWgradBBytes;
constexpr int kWgradBoxDepthOfB = kWgradDepth / kWgradCluster;
constexpr int kWgradThreads = (1 + kWgradGroups) * kWarpgroupThreads;
constexpr int kWgradProducerRegisters = 40, kWgradConsumerRegisters = 232;
static_assert(kWgradProducerRegisters + kWgradGroups * kWgradConsumerRegisters <= 3 * 168,
              "a warpgroup would wait for registers that do not exist");

// Results leave 32 columns of a tile's half at a time: as boxes of 32 floats, 64 or, transposed,
// 32 of them below each other.
constexpr int kWgradChunkColumns = 32;
constexpr int kWgradChunkBytes = 64 * kWgradChunkColumns * 4;
constexpr int kWgradBuffers = 3;  // of each group

enum class WgradTile { as_stored, transposed };  // the tile's rows are the matrix's rows, columns

template <WgradTile kTile>
inline constexpr int kWgradBoxRows = kTile == WgradTile::transposed ? kWgradChunkColumns : 64;

struct WgradTileParams {
  CUtensorMap b_map;    // boxes of 64 columns and kWgradBoxDepthOfB rows
  CUtensorMap d_w_map;  // boxes of 32 floats and kWgradBoxRows rows
  GroupedExtent extent;
  const __nv_bfloat16* a;
  int64_t a_stride;
  const int32_t* a_token;  // optional
  const __nv_bfloat16* b;  // for the last rows of an expert
  int64_t b_stride;
  bool adds;  // to what is there
};

// Shared memory: the stages, the groups' buffers, the barriers, the schedule's table.
struct WgradShared {
  static constexpr int kBuffers = kWgradStages * kWgradStageBytes;
  static constexpr int kBarriers = kBuffers + kWgradGroups * kWgradBuffers * kWgradChunkBytes;
  static constexpr int kTable = kBarriers + 16 * kWgradStages;
  static constexpr int kBytes = kTable + static_cast<int>(sizeof(GroupedTable));
  static_assert(kBytes <= 232448, "what a CTA may have");

  uint32_t stages, full_0, empty_0;
  GroupedTable& table;
  __device__ explicit WgradShared(unsigned char* memory)
      : stages(shared_address(memory)),
        full_0(stages + kBarriers),
        empty_0(full_0 + 8 * kWgradStages),
        table(*reinterpret_cast<GroupedTable*>(memory + kTable)) {}
  // `turn` counts stages since the kernel began.
  __device__ static uint32_t index(uint32_t turn) { return turn % kWgradStages; }
  __device__ static uint32_t parity(uint32_t turn) { return turn / kWgradStages % 2; }
  __device__ uint32_t a(uint32_t turn) const { return stages + index(turn) * kWgradStageBytes; }
  __device__ uint32_t b(uint32_t turn) const { return a(turn) + kWgradABytes; }
  __device__ uint32_t full(uint32_t turn) const { return full_0 + 8 * index(turn); }
  __device__ uint32_t empty(uint32_t turn) const { return empty_0 + 8 * index(turn); }
  __device__ uint32_t buffer(int group, int chunk) const {
    return stages + kBuffers + (group * kWgradBuffers + chunk % kWgradBuffers) * kWgradChunkBytes;
  }
};

// --- Fetching ---

// Rows of a stage: 64 summed rows of kChunks times 16 bytes, a lane a chunk. Each warp serves 16
// rows; its lane j < 16 finds the j-th, as an offset in 16 bytes. Rows beyond the expert's end read
// as zeros.
template <int kChunks>
struct DepthRows {
  static constexpr int kWarps = kWarpgroupThreads / kWarpLanes;
  static constexpr int kRowsPerStep = kWarpLanes / kChunks;  // of a warp
  static constexpr int kSteps = kWgradDepth / (kWarps * kRowsPerStep);
  static constexpr uint32_t kNoRow = ~0u;

  __device__ static __forceinline__ int row_at(int step, int place, int warp) {
    return (step * kWarps + warp) * kRowsPerStep + place;
  }
  __device__ static __forceinline__ uint32_t find(const GroupedTile& tile, const int32_t* token,
                                                  int64_t stride, int k) {
    const int lane = threadIdx.x % kWarpLanes, warp = static_cast<int>(threadIdx.x) / kWarpLanes;
    const int at = k + row_at(lane / kRowsPerStep, lane % kRowsPerStep, warp);
    if (lane >= kSteps * kRowsPerStep || at >= tile.depth) return kNoRow;
    const int64_t row = token != nullptr ? token[tile.depth0 + at] : tile.depth0 + at;
    return static_cast<uint32_t>(row * stride / 8);
  }
  // `chunks` of a row exist.
  __device__ static __forceinline__ void fetch(const __nv_bfloat16* from, int chunks,
                                               uint32_t row_of_lane, uint32_t to) {
    const int lane = threadIdx.x % kWarpLanes, warp = static_cast<int>(threadIdx.x) / kWarpLanes;
    const int chunk = lane % kChunks, place = lane / kChunks;
    const auto* source = reinterpret_cast<const uint4*>(from) + chunk;
    to += chunk / kSwizzleRows * kWgradPanelBytes;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t offset = __shfl_sync(kAllLanes, row_of_lane, step * kRowsPerStep + place);
      const int at = row_at(step, place, warp);
      const uint32_t target = to + at * kSwizzleBytes + ((chunk % 8 ^ at % 8) << 4);
      if (chunk >= chunks) continue;
      copy_16(target, source + (offset == kNoRow ? 0 : offset), offset == kNoRow ? 0 : 16);
    }
  }
};

// B of one whole stage, by one thread: this CTA's half of the summed rows, for both CTAs.
__device__ __forceinline__ void fetch_wgrad_b(const WgradTileParams& p, const GroupedTile& tile,
                                              int k, uint32_t to, uint32_t barrier, int rank) {
  arrive_expecting(barrier, kWgradBBytes);
  const int first = rank * kWgradBoxDepthOfB;
  for (int panel = 0; panel < kWgradPanelsOfB; ++panel) {
    copy_tensor_multicast(to + panel * kWgradPanelBytes + first * kSwizzleBytes, p.b_map, barrier,
                          {tile.column0 + panel * 64, tile.depth0 + k + first, 0},
                          (1 << kWgradCluster) - 1);
  }
}

// By a warpgroup. The tokens of a stage are looked up while the stage before it is on its way.
__device__ __forceinline__ void fetch_wgrad_tiles(const WgradTileParams& p,
                                                  const WgradShared& shared, int rank) {
  using RowsOfA = DepthRows<kTileRows / 8>;
  using RowsOfB = DepthRows<kWarpLanes>;
  static_assert(kWgradColumns / 8 <= kWarpLanes);
  DepthSchedule<kWgradCluster> schedule(p.extent, shared.table, rank);
  GroupedTile tile;
  if (!schedule.next(tile)) return;
  uint32_t row_of_lane = RowsOfA::find(tile, p.a_token, p.a_stride, 0);
  int k = 0;
  for (uint32_t turn = 0;; ++turn) {
    const bool is_whole = k + kWgradDepth <= tile.depth;
    wait_barrier(shared.empty(turn), WgradShared::parity(turn) ^ 1);
    if (threadIdx.x == 0) {
      if (is_whole) {
        fetch_wgrad_b(p, tile, k, shared.b(turn), shared.full(turn), rank);
      } else {
        arrive(shared.full(turn));
      }
    }
    __syncwarp();
    RowsOfA::fetch(p.a + tile.row0, tile.rows / 8, row_of_lane, shared.a(turn));
    if (!is_whole) {
      const int columns = min(kWgradColumns, p.extent.columns - tile.column0);
      RowsOfB::fetch(p.b + tile.column0, columns / 8, RowsOfB::find(tile, nullptr, p.b_stride, k),
                     shared.b(turn));
    }
    arrive_after_copies(shared.full(turn));
    k += kWgradDepth;
    if (k >= tile.depth) {
      if (!schedule.next(tile)) return;
      k = 0;
    }
    row_of_lane = RowsOfA::find(tile, p.a_token, p.a_stride, k);
  }
}

// --- Multiplying ---

using WgradAccumulators = float[kWgradColumns / 2];

__device__ __forceinline__ void release_wgrad_stage(uint32_t empty) {
  const uint32_t lane = threadIdx.x % kWarpLanes;
  if (lane < kWgradCluster) arrive_at(empty, lane);
}

// acc = A^T B over a tile's stages, which begin at `turn`.
__device__ __forceinline__ void multiply_wgrad_tile(const WgradShared& shared, uint32_t turn,
                                                    int stages, WgradAccumulators& top,
                                                    WgradAccumulators& bottom) {
  constexpr int kStep = 16, kStepBytes = kStep * kSwizzleBytes;
  constexpr int kRowGroup = kSwizzleRows * kSwizzleBytes;
  const uint64_t a_base = matrix_descriptor(shared.stages, kWgradPanelBytes, kRowGroup);
  for (int i = 0; i < stages; ++i, ++turn) {
    await_barrier(shared.full(turn), WgradShared::parity(turn));
    fence_async_proxy();
    const uint64_t a = a_base + (WgradShared::index(turn) * kWgradStageBytes >> 4);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kWgradDepth / kStep; ++step) {
      const uint64_t a_step = a + (step * kStepBytes >> 4);
      const uint64_t b_step = a_step + (kWgradABytes >> 4);
      wgmma_64x192x16<1, 1>(top, a_step, b_step, i + step);
      wgmma_64x192x16<1, 1>(bottom, a_step + (kWgradPanelBytes >> 4), b_step, i + step);
    }
    wgmma_commit();
    if (i == 0) continue;
    wgmma_wait<1>();
    release_wgrad_stage(shared.empty(turn - 1));
  }
  wgmma_wait<0>();
  release_wgrad_stage(shared.empty(turn - 1));
  pin_registers(top);
  pin_registers(bottom);
}

// One chunk of a half into a buffer, the 16-byte pieces of 128-byte lines swizzled as the copy
// engine expects them. A line is a row of the tile or, transposed, 32 rows of one of its columns.
template <WgradTile kTile>
__device__ __forceinline__ void put_wgrad_chunk(uint32_t buffer, int warp,
                                                const WgradAccumulators& acc, int first) {
  const int lane = threadIdx.x % kWarpLanes, q = lane % 4;
#pragma unroll
  for (int g = 0; g < kWgradChunkColumns / 8; ++g) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp * 16 + lane / 4 + 8 * h, column = 8 * g + 2 * q;
      const float low = acc[first + 4 * g + 2 * h] + 0.0f;
      const float high = acc[first + 4 * g + 2 * h + 1] + 0.0f;
      if constexpr (kTile == WgradTile::as_stored) {
        store_shared_floats(buffer + row * kSwizzleBytes +
                                ((column / 4 ^ row % kSwizzleRows) << 4) + column % 4 * 4,
                            low, high);
      } else {
        const uint32_t line = buffer + row / 32 * (kWgradChunkBytes / 2) + column * kSwizzleBytes;
        const int piece = row % 32 / 4;
        store_shared_float(line + ((piece ^ column % kSwizzleRows) << 4) + row % 4 * 4, low);
        store_shared_float(
            line + kSwizzleBytes + ((piece ^ (column + 1) % kSwizzleRows) << 4) + row % 4 * 4,
            high);
      }
    }
  }
}

// One half of a tile. Stored results are what adding to zeros would leave: never -0.
template <WgradTile kTile>
__device__ __forceinline__ void finish_wgrad_half(const WgradTileParams& p,
                                                  const WgradShared& shared,
                                                  const GroupedTile& tile, int group, int& chunk,
                                                  int row, const WgradAccumulators& acc) {
  constexpr int kFirstBarrier = 1;
  const int t = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
  const auto bring_out = [&](uint32_t from, int inner, int middle) {
    const TensorCoordinate at{inner, middle, tile.expert};
    p.adds ? add_tensor(p.d_w_map, from, at) : store_tensor(p.d_w_map, from, at);
  };
#pragma unroll
  for (int c = 0; c < kWgradColumns / kWgradChunkColumns; ++c, ++chunk) {
    const uint32_t buffer = shared.buffer(group, chunk);
    if (t == 0) wait_stores_read<kWgradBuffers - 1>();
    named_barrier_sync(kFirstBarrier + group, kWarpgroupThreads);
    put_wgrad_chunk<kTile>(buffer, t / kWarpLanes, acc, c * kWgradChunkColumns / 2);
    fence_async_proxy();
    named_barrier_sync(kFirstBarrier + group, kWarpgroupThreads);
    if (t != 0) continue;
    const int column = tile.column0 + c * kWgradChunkColumns;
    if constexpr (kTile == WgradTile::as_stored) {
      bring_out(buffer, column, row);
    } else {
      bring_out(buffer, row, column);
      bring_out(buffer + kWgradChunkBytes / 2, row + 32, column);
    }
    commit_stores();
  }
}

// Group g multiplies every other tile, beginning with its g-th.
template <WgradTile kTile>
__device__ __forceinline__ void multiply_wgrad_tiles(const WgradTileParams& p,
                                                     const WgradShared& shared, int rank) {
  DepthSchedule<kWgradCluster> schedule(p.extent, shared.table, rank);
  const int group =
      __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroupThreads - 1, 0);
  GroupedTile tile;
  int chunk = 0;
  uint32_t turn = 0;
  for (int item = 0; schedule.next(tile); ++item) {
    const int stages = ceil_divide(tile.depth, kWgradDepth);
    if (item % kWgradGroups == group) {
      WgradAccumulators top, bottom;  // 64 rows each
      multiply_wgrad_tile(shared, turn, stages, top, bottom);
      finish_wgrad_half<kTile>(p, shared, tile, group, chunk, tile.row0, top);
      finish_wgrad_half<kTile>(p, shared, tile, group, chunk, tile.row0 + 64, bottom);
    }
    turn += static_cast<uint32_t>(stages);
  }
  wait_stores();
}

template <WgradTile kTile>
__global__ void __launch_bounds__(kWgradThreads, 1)
    grouped_wgrad_kernel(const __grid_constant__ WgradTileParams p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const WgradShared shared(memory);
  const int rank = static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    for (uint32_t stage = 0; stage < kWgradStages; ++stage) {
      init_barrier(shared.full(stage), 1 + kWarpgroupThreads);
      init_barrier(shared.empty(stage), kWarpgroupThreads / kWarpLanes * kWgradCluster);
    }
    fence_barrier_init();
    prefetch_tensor_map(p.b_map);
    prefetch_tensor_map(p.d_w_map);
  }
  load_offsets(p.extent, shared.table);
  __syncthreads();
  DepthSchedule<kWgradCluster>::build(p.extent, shared.table);
  __syncthreads();
  cluster_sync();
  if (threadIdx.x < kWarpgroupThreads) {
    give_registers<kWgradProducerRegisters>();
    fetch_wgrad_tiles(p, shared, rank);
  } else {
    take_registers<kWgradConsumerRegisters>();
    multiply_wgrad_tiles<kTile>(p, shared, rank);
  }
  // A CTA may not leave while its peer still writes to it or signals it.
  __syncwarp();
  cluster_sync();
}

}  // namespace cambium::cuda
