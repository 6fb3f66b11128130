// What the grouped GEMM does with a tile's accumulators (kernels/grouped_tile.cuh).
//
// Results go through shared memory, so that each memory request is a whole 128-byte line: written
// from the accumulators' layout, 8 rows of 32 bytes at a time, they take four times as many
// requests and 13,000 cycles a tile. They lie there as operand tiles do, 64 columns next to each
// other.
#pragma once

#include "kernels/grouped_tile.cuh"
#include "kernels/swiglu_device.cuh"

namespace cambium::cuda {

constexpr int kChunkColumns = 64;
constexpr int kChunkGroups = kChunkColumns / 8;
constexpr int kWarpRows = 16;
constexpr int kWarpScratchBytes = kWarpRows * kSwizzleBytes;
static_assert(4 * kWarpScratchBytes <= kScratchBytes);

__device__ __forceinline__ float low_of(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

// 64 columns of a warp's 16 rows as accumulators lie: pair[g][h] of a lane is row lane / 4 + 8 h,
// columns 8 g + 2 (lane % 4) and the next.
struct Chunk {
  uint32_t pair[kChunkGroups][2];
};

// A warp's scratch and the part of a tensor that belongs to the warp's rows.
struct WarpRows {
  uint32_t scratch;
  int lane;
  int rows;  // of the 16 that exist

  // Address of the 16 bytes that the lane serves in pass `pass` of four: 4 rows of 128 bytes each.
  __device__ __forceinline__ int line_row(int pass) const { return 4 * pass + lane / 8; }
  __device__ __forceinline__ uint32_t line_place(int pass) const {
    const uint32_t first = scratch + lane / 8 * kSwizzleBytes + ((lane % 8 ^ lane / 8) << 4);
    return (first ^ pass % 2 << 6) + pass * 4 * kSwizzleBytes;
  }
  __device__ __forceinline__ uint32_t tile_place(int two_groups) const {
    const uint32_t row = scratch + (lane / 8 % 2 * 8 + lane % 8) * kSwizzleBytes;
    return row + ((lane / 16 ^ lane % 8) << 4) ^ two_groups << 5;
  }
  // Into the scratch, `offset` bytes further.
  __device__ __forceinline__ void put(const Chunk& chunk, int offset = 0) const {
#pragma unroll
    for (int i = 0; i < kChunkGroups / 2; ++i) {
      store_tiles(tile_place(i) + offset, {chunk.pair[2 * i][0], chunk.pair[2 * i][1],
                                           chunk.pair[2 * i + 1][0], chunk.pair[2 * i + 1][1]});
    }
  }
};

// Calls body(g, h, at): column group and row half of a chunk, index of its accumulator pair.
template <class Body>
__device__ __forceinline__ void each_pair(int first_group, Body&& body) {
#pragma unroll
  for (int g = 0; g < kChunkGroups; ++g) {
#pragma unroll
    for (int h = 0; h < 2; ++h) body(g, h, 4 * (first_group + g) + 2 * h);
  }
}

// Weights of the lane's rows lane / 4 and lane / 4 + 8.
struct RowWeightPair {
  float of[2] = {1.0f, 1.0f};
  __device__ __forceinline__ RowWeightPair(const float* weight, const WarpRows& warp) {
    if (weight == nullptr || warp.rows == 0) return;
    for (int half = 0; half < 2; ++half) {
      of[half] = weight[min(warp.lane / 4 + 8 * half, warp.rows - 1)];
    }
  }
};

// --- up, down, up_dgrad: consumers leave bf16 results in the scratch, writers bring them out ---

template <Product kProduct>
inline constexpr int kHandOverThreads = kWarpgroupThreads + kWriteThreads<kProduct>;
constexpr int kFilledBarrier = 2;   // + consumer group: consumers arrive, writers wait
constexpr int kEmptiedBarrier = 4;  // + consumer group: writers arrive, consumers wait

// Rows scaled by their weight where there is one.
template <Product kProduct>
__device__ __forceinline__ void hand_over(const GroupedTileParams& p, const GroupedTile& tile,
                                          Consumer& consumer, uint32_t scratch,
                                          const Accumulators& acc) {
  const int first_row = consumer.first_row();
  const WarpRows warp{scratch + consumer.warp * kWarpScratchBytes, consumer.lane,
                      max(0, min(kWarpRows, tile.rows - first_row))};
  const RowWeightPair weight(p.weight == nullptr ? nullptr : p.weight + tile.row0 + first_row,
                             warp);
  if (consumer.has_results_out) {
    named_barrier_sync(kEmptiedBarrier + consumer.group, kHandOverThreads<kProduct>);
  }
  consumer.has_results_out = true;
#pragma unroll
  for (int c = 0; c < kTileColumns / kChunkColumns; ++c) {
    Chunk chunk;
    each_pair(c * kChunkGroups, [&](int g, int half, int at) {
      const float scale = weight.of[half];
      chunk.pair[g][half] = pack_pair(scale * acc[at], scale * acc[at + 1]);
    });
    warp.put(chunk, c * kSliceBytes);
  }
  named_barrier_arrive(kFilledBarrier + consumer.group, kHandOverThreads<kProduct>);
}

// 8 results of one row: chunk `piece` of 32.
__device__ __forceinline__ uint32_t result_place(uint32_t scratch, int row, int piece) {
  return scratch + piece / 8 * kSliceBytes + row * kSwizzleBytes + ((piece % 8 ^ row % 8) << 4);
}

__device__ __forceinline__ uint32_t swiglu_pair(uint32_t gate, uint32_t up) {
  return pack_pair(swiglu_value(low_of(gate), low_of(up)),
                   swiglu_value(high_of(gate), high_of(up)));
}

// up: the tile's first 128 columns are gate, the others up; h is computed from the rounded values.
template <int kThreads>
__device__ __forceinline__ void write_up(const GroupedTileParams& p, const GroupedTile& tile,
                                         int first_row, uint32_t scratch) {
  constexpr int kPieces = kUpColumns / 8;
  const int t = static_cast<int>(threadIdx.x) - (kWarpgroupThreads - kThreads);
  const int rows = min(kSliceRows, tile.rows - first_row), piece = t % kPieces;
  const int column = tile.column0 + piece * 8;
  if (column >= p.F) return;
#pragma unroll 4
  for (int row = t / kPieces; row < rows; row += kThreads / kPieces) {
    const int64_t at = tile.row0 + first_row + row;
    const uint4 gate = load_shared_16(result_place(scratch, row, piece));
    const uint4 up = load_shared_16(result_place(scratch, row, kPieces + piece));
    __nv_bfloat16* gate_up = p.wide + at * p.wide_stride + column;
    *reinterpret_cast<uint4*>(gate_up) = gate;
    *reinterpret_cast<uint4*>(gate_up + p.F) = up;
    *reinterpret_cast<uint4*>(p.narrow + at * p.narrow_stride + column) =
        make_uint4(swiglu_pair(gate.x, up.x), swiglu_pair(gate.y, up.y), swiglu_pair(gate.z, up.z),
                   swiglu_pair(gate.w, up.w));
  }
}

template <int kThreads>
__device__ __forceinline__ void write_rows(const GroupedTileParams& p, const GroupedTile& tile,
                                           int first_row, uint32_t scratch) {
  constexpr int kPieces = kTileColumns / 8;
  const int t = static_cast<int>(threadIdx.x) - (kWarpgroupThreads - kThreads);
  const int rows = min(kSliceRows, tile.rows - first_row), piece = t % kPieces;
  const int column = tile.column0 + piece * 8;
  if (column >= p.extent.columns) return;
#pragma unroll 8
  for (int row = t / kPieces; row < rows; row += kThreads / kPieces) {
    *reinterpret_cast<uint4*>(p.narrow + (tile.row0 + first_row + row) * p.narrow_stride + column) =
        load_shared_16(result_place(scratch, row, piece));
  }
}

template <Product kProduct, int kCluster>
__device__ __forceinline__ void write_tiles(const GroupedTileParams& p, const GroupedShared& shared,
                                            int rank) {
  RowSchedule<kCluster> schedule(p.extent, shared.table, rank);
  GroupedTile tile;
  while (schedule.next(tile)) {
    for (int group = 0; group < kConsumerGroups; ++group) {
      const int first_row = group * kSliceRows;
      if (tile.rows <= first_row) break;
      named_barrier_sync(kFilledBarrier + group, kHandOverThreads<kProduct>);
      if constexpr (kProduct == Product::up) {
        write_up<kWriteThreads<kProduct>>(p, tile, first_row, shared.scratch(group));
      } else {
        write_rows<kWriteThreads<kProduct>>(p, tile, first_row, shared.scratch(group));
      }
      named_barrier_arrive(kEmptiedBarrier + group, kHandOverThreads<kProduct>);
    }
  }
}

// --- The kernel ---

template <Product kProduct, int kCluster>
__device__ __forceinline__ void multiply_tiles(const GroupedTileParams& p,
                                               const GroupedShared& shared, int rank) {
  RowSchedule<kCluster> schedule(p.extent, shared.table, rank);
  Consumer consumer;
  GroupedTile tile;
  Accumulators acc;
  while (schedule.next(tile)) {
    if (tile.rows > consumer.group * kSliceRows) {
      multiply_tile<kProduct, kCluster>(shared, consumer, stages_of(tile), acc);
      hand_over<kProduct>(p, tile, consumer, shared.scratch(consumer.group), acc);
    } else {
      skip_tile<kCluster>(shared, consumer, stages_of(tile));
    }
  }
}

template <Product kProduct, int kCluster>
__global__ void __launch_bounds__(kGroupedThreads, 1)
    grouped_tile_kernel(const __grid_constant__ GroupedTileParams p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const GroupedShared shared(memory);
  const int rank = kCluster == 1 ? 0 : static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    constexpr int kFillers = kGathersRows<kProduct> ? 1 + kFetchThreads<kProduct> : 1;
    constexpr int kWarps = kConsumerGroups * kWarpgroupThreads / kWarpLanes;
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(shared.full + 8 * stage, kFillers);
      init_barrier(shared.empty + 8 * stage, kWarps * kCluster);
    }
    fence_barrier_init();
    prefetch_tensor_map(p.b_map);
    if (!kGathersRows<kProduct>) prefetch_tensor_map(p.a_map);
  }
  load_offsets(p.extent, shared.table);
  __syncthreads();
  RowSchedule<kCluster>::build(p.extent, shared.table);
  __syncthreads();
  if constexpr (kCluster > 1) cluster_sync();
  if (threadIdx.x < kWarpgroupThreads) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x >= kFetchThreads<kProduct>) {
      write_tiles<kProduct, kCluster>(p, shared, rank);
    } else if constexpr (kGathersRows<kProduct>) {
      fetch_tiles_by_row<kProduct, kCluster>(p, shared, rank);
    } else {
      if (threadIdx.x == 0) fetch_tiles<kProduct, kCluster>(p, shared, rank);
    }
  } else {
    take_registers<kConsumerRegisters>();
    multiply_tiles<kProduct, kCluster>(p, shared, rank);
  }
  // A CTA of a cluster may not leave while its peer still writes to it or signals it.
  __syncwarp();
  if constexpr (kCluster > 1) cluster_sync();
}

}  // namespace cambium::cuda
