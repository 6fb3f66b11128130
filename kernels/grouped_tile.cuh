// The tensor cores' kernel of the grouped GEMM: persistent, warp-specialised, one CTA per SM.
//
// A CTA computes tiles of 128 rows and 256 columns, 64 of the contracted extent at a time, through
// three stages of 48 KB. Two warpgroups multiply 64 rows each, 128 accumulators a thread, and leave
// their results in shared memory. Of a third one some warps fetch the stages, the others bring
// results out while the next tile is multiplied. B is fetched by the copy engine, half by each CTA
// of a cluster for both; A by the copy engine, or row by row through token indices. Weight
// gradients and the down input gradient go another way (kernels/grouped_turns.cuh).
//
// D2: the sum of an element runs over 16-wide steps of the contracted extent in ascending order,
// whatever the tile, the slice or the cut of the rows. Rows beyond a tile's end are not stored.
// Napkin, up forward at 131072 x 2048 x 1536: 825 GFLOP; a stage takes 1,024 cycles at the full
// rate of 4,096 FLOP and 32 KB from the L2.
#pragma once

#include "kernels/cuda_hopper.cuh"
#include "kernels/grouped_schedule.cuh"

namespace cambium::cuda {

// Which product: what lies in A and B and what happens to the result.
enum class Product { up, down, up_dgrad };

// A is fetched row by row, through a token index where one is given.
template <Product kProduct>
inline constexpr bool kGathersRows = kProduct == Product::up;
// B's contracted extent is its outer one: weights in input gradients.
template <Product kProduct>
inline constexpr bool kIsBTransposed = !(kProduct == Product::up || kProduct == Product::down);

constexpr int kTileColumns = 256;
constexpr int kTileDepth = 64;
constexpr int kStages = 3;
constexpr int kConsumerGroups = kTileSlices;             // a slice of 64 rows each
constexpr int kSliceBytes = kSliceRows * kSwizzleBytes;  // 64 x 64 bf16
constexpr int kABytes = kTileSlices * kSliceBytes;
constexpr int kBBytes = kTileColumns * kSwizzleBytes;
constexpr int kStageBytes = kABytes + kBBytes;
constexpr int kUpColumns = kTileColumns / 2;  // columns of h in a tile: as many gate and up columns
constexpr int kScratchBytes = kSliceRows * kTileColumns * 2;  // of each consumer group: results

constexpr int kGroupedThreads = (1 + kConsumerGroups) * kWarpgroupThreads;

// Threads of the first warpgroup that fetch; the others write results out.
template <Product kProduct>
inline constexpr int kFetchThreads = kGathersRows<kProduct> ? 2 * kWarpLanes : kWarpLanes;
template <Product kProduct>
inline constexpr int kWriteThreads = kWarpgroupThreads - kFetchThreads<kProduct>;

// Registers per thread after the warpgroups have exchanged them: what 384 threads start with.
constexpr int kProducerRegisters = 88, kConsumerRegisters = 208;
static_assert(kProducerRegisters + kConsumerGroups * kConsumerRegisters <= 3 * 168,
              "a warpgroup would wait for registers that do not exist");

struct GroupedTileParams {
  CUtensorMap a_map;  // where A comes by the copy engine
  CUtensorMap b_map;
  GroupedExtent extent;
  const __nv_bfloat16* a = nullptr;  // where it comes row by row
  int64_t a_stride = 0;
  const int32_t* a_token = nullptr;  // optional
  int F = 0;                         // up, down_dgrad
  __nv_bfloat16* wide = nullptr;     // [R, 2F]: gate_up or its gradient
  int64_t wide_stride = 0;
  __nv_bfloat16* narrow = nullptr;  // h, weighted_h, y or d_x
  int64_t narrow_stride = 0;
  const float* weight = nullptr;  // optional, of each row
  float* partial_dot = nullptr;   // down_dgrad, optional: [column tiles, R]
  int R = 0;
};

// Shared memory: the stages, the consumers' scratch, the barriers, the schedule's table.
struct GroupedShared {
  static constexpr int kScratch = kStages * kStageBytes;
  static constexpr int kBarriers = kScratch + kConsumerGroups * kScratchBytes;
  static constexpr int kTable = kBarriers + 16 * kStages;
  static constexpr int kBytes = kTable + static_cast<int>(sizeof(GroupedTable));
  static_assert(kBytes <= 232448, "what a CTA may have");

  uint32_t stages, full, empty;
  GroupedTable& table;
  __device__ explicit GroupedShared(unsigned char* memory)
      : stages(shared_address(memory)),
        full(stages + kBarriers),
        empty(full + 8 * kStages),
        table(*reinterpret_cast<GroupedTable*>(memory + kTable)) {}
  __device__ uint32_t a(int stage) const { return stages + stage * kStageBytes; }
  __device__ uint32_t b(int stage) const { return a(stage) + kABytes; }
  __device__ uint32_t scratch(int group) const { return stages + kScratch + group * kScratchBytes; }
};

__device__ __forceinline__ int slices_of(int rows) { return ceil_divide(rows, kSliceRows); }
__device__ __forceinline__ int stages_of(const GroupedTile& tile) {
  return ceil_divide(tile.depth, kTileDepth);
}

// --- Fetching ---

// B of one stage, by one thread. In a cluster each CTA fetches its half for both.
template <Product kProduct, int kCluster>
__device__ __forceinline__ void fetch_b(const GroupedTileParams& p, const GroupedTile& tile, int k,
                                        uint32_t to, uint32_t barrier, int rank) {
  const auto copy = [&](uint32_t place, TensorCoordinate at) {
    if constexpr (kCluster == 1) {
      copy_tensor(place, p.b_map, barrier, at);
    } else {
      copy_tensor_multicast(place, p.b_map, barrier, at, (1 << kCluster) - 1);
    }
  };
  constexpr int kHalfRows = kTileColumns / 2, kHalfDepth = kTileDepth / 2;
  for (int half = kCluster == 1 ? 0 : rank; half < (kCluster == 1 ? 2 : rank + 1); ++half) {
    if constexpr (!kIsBTransposed<kProduct>) {
      const int second = kProduct == Product::up ? p.F : kHalfRows;
      copy(to + half * kHalfRows * kSwizzleBytes, {k, tile.column0 + half * second, tile.expert});
    } else {
      for (int chunk = 0; chunk < kTileColumns / 64; ++chunk) {
        const int column = tile.column0 + chunk * 64;
        if (column >= p.extent.columns) break;
        copy(to + chunk * kSliceBytes + half * kHalfDepth * kSwizzleBytes,
             {column, k + half * kHalfDepth, tile.expert});
      }
    }
  }
}

template <Product kProduct>
__device__ __forceinline__ uint32_t b_bytes(const GroupedTileParams& p, const GroupedTile& tile) {
  if constexpr (!kIsBTransposed<kProduct>) return kBBytes;
  return min(kTileColumns / 64, ceil_divide(p.extent.columns - tile.column0, 64)) * kSliceBytes;
}

// A's rows of one tile as offsets in 16 bytes: thread t serves rows t / 8 + kRowStep i, chunk t
// % 8.
template <int kThreads>
struct GatheredRows {
  static constexpr int kRowStep = kThreads / kSwizzleRows;
  static_assert(kRowStep % kSwizzleRows == 0, "a thread's rows have one swizzle");
  uint32_t offset[kTileRows / kRowStep];

  __device__ __forceinline__ void find(const GroupedTileParams& p, const GroupedTile& tile) {
    const int first = static_cast<int>(threadIdx.x) / kSwizzleRows;
#pragma unroll
    for (int i = 0; i < kTileRows / kRowStep; ++i) {
      // Rows beyond the tile's end repeat the last one: they are multiplied and not stored.
      const int row = tile.row0 + max(0, min(first + i * kRowStep, tile.rows - 1));
      const int64_t from = p.a_token != nullptr && tile.rows > 0 ? p.a_token[row] : row;
      offset[i] = static_cast<uint32_t>(from * p.a_stride / 8);
    }
  }
  __device__ __forceinline__ void fetch(const GroupedTileParams& p, int slices, int k,
                                        uint32_t to) const {
    const int t = static_cast<int>(threadIdx.x), row = t / kSwizzleRows, chunk = t % kSwizzleRows;
    const auto* from = reinterpret_cast<const uint4*>(p.a + k) + chunk;
    to += row * kSwizzleBytes + ((chunk ^ row % kSwizzleRows) << 4);
    constexpr int kPerSlice = kSliceRows / kRowStep;
#pragma unroll
    for (int slice = 0; slice < kTileSlices; ++slice) {
      if (slice >= slices) break;
#pragma unroll
      for (int i = 0; i < kPerSlice; ++i) {
        copy_16(to + slice * kSliceBytes + i * kRowStep * kSwizzleBytes,
                from + offset[slice * kPerSlice + i]);
      }
    }
  }
};

// A and B by the copy engine: one thread.
template <Product kProduct, int kCluster>
__device__ __forceinline__ void fetch_tiles(const GroupedTileParams& p, const GroupedShared& shared,
                                            int rank) {
  RowSchedule<kCluster> schedule(p.extent, shared.table, rank);
  PipelineStage stage;
  GroupedTile tile;
  while (schedule.next(tile)) {
    const int slices = slices_of(tile.rows);
    const uint32_t bytes = b_bytes<kProduct>(p, tile) + slices * kSliceBytes;
    for (int k = 0; k < tile.depth; k += kTileDepth, stage.advance(kStages)) {
      const uint32_t full = shared.full + 8 * stage.index;
      wait_barrier(shared.empty + 8 * stage.index, stage.parity ^ 1);
      arrive_expecting(full, bytes);
      for (int slice = 0; slice < slices; ++slice) {
        copy_tensor(shared.a(stage.index) + slice * kSliceBytes, p.a_map, full,
                    {k, tile.row0 + slice * kSliceRows, 0});
      }
      fetch_b<kProduct, kCluster>(p, tile, k, shared.b(stage.index), full, rank);
    }
  }
}

// A row by row, B by the copy engine: kFetchThreads threads.
template <Product kProduct, int kCluster>
__device__ __forceinline__ void fetch_tiles_by_row(const GroupedTileParams& p,
                                                   const GroupedShared& shared, int rank) {
  RowSchedule<kCluster> schedule(p.extent, shared.table, rank);
  PipelineStage stage;
  GroupedTile tile;
  GatheredRows<kFetchThreads<kProduct>> rows;
  while (schedule.next(tile)) {
    const int slices = slices_of(tile.rows);
    rows.find(p, tile);
    for (int k = 0; k < tile.depth; k += kTileDepth, stage.advance(kStages)) {
      const uint32_t full = shared.full + 8 * stage.index;
      wait_barrier(shared.empty + 8 * stage.index, stage.parity ^ 1);
      if (threadIdx.x == 0) {
        arrive_expecting(full, b_bytes<kProduct>(p, tile));
        fetch_b<kProduct, kCluster>(p, tile, k, shared.b(stage.index), full, rank);
      }
      __syncwarp();
      rows.fetch(p, slices, k, shared.a(stage.index));
      arrive_after_copies(full);
    }
  }
}

// --- Multiplying ---

using Accumulators = float[kTileColumns / 2];

// One consumer warpgroup's place.
struct Consumer {
  int group, warp, lane;
  PipelineStage stage;
  bool has_results_out = false;  // the scratch was used before
  __device__ Consumer() {
    const int t = static_cast<int>(threadIdx.x) - kWarpgroupThreads;
    group = __shfl_sync(kAllLanes, t / kWarpgroupThreads, 0);
    warp = t % kWarpgroupThreads / kWarpLanes;
    lane = t % kWarpLanes;
  }
  __device__ int first_row() const { return group * kSliceRows + warp * 16; }  // of the tile
};

template <int kCluster>
__device__ __forceinline__ void release_stage(const GroupedShared& shared, int index, int lane) {
  const uint32_t empty = shared.empty + 8 * index;
  if constexpr (kCluster == 1) {
    if (lane == 0) arrive(empty);
  } else {
    if (lane < kCluster) arrive_at(empty, lane);
  }
}

// acc = A B of the group's slice over all stages of a tile.
template <Product kProduct, int kCluster>
__device__ __forceinline__ void multiply_tile(const GroupedShared& shared, Consumer& consumer,
                                              int stages, Accumulators& acc) {
  constexpr int kTransposeB = kIsBTransposed<kProduct> ? 1 : 0;
  constexpr int kStep = 16;  // of the contracted extent
  constexpr int kAStep = kStep * 2;
  constexpr int kBStep = kTransposeB ? kStep * kSwizzleBytes : kStep * 2;
  constexpr int kRowGroup = kSwizzleRows * kSwizzleBytes;
  const uint64_t a_base =
      matrix_descriptor(shared.a(0) + consumer.group * kSliceBytes, kSliceBytes, kRowGroup);
  const uint64_t b_base = matrix_descriptor(shared.b(0), kSliceBytes, kRowGroup);
  pin_registers(acc);
  int previous = 0;
  for (int i = 0; i < stages; ++i) {
    const PipelineStage& stage = consumer.stage;
    wait_barrier(shared.full + 8 * stage.index, stage.parity);
    if constexpr (kGathersRows<kProduct>) fence_async_proxy();
    const uint64_t at = static_cast<uint64_t>(stage.index * kStageBytes) >> 4;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kTileDepth / kStep; ++step) {
      wgmma_64x256x16<0, kTransposeB>(acc, a_base + at + (step * kAStep >> 4),
                                      b_base + at + (step * kBStep >> 4), i + step);
    }
    wgmma_commit();
    if (i > 0) {
      wgmma_wait<1>();
      release_stage<kCluster>(shared, previous, consumer.lane);
    }
    previous = stage.index;
    consumer.stage.advance(kStages);
  }
  wgmma_wait<0>();
  release_stage<kCluster>(shared, previous, consumer.lane);
  pin_registers(acc);
}

// A group without rows in a tile keeps step with the pipeline.
template <int kCluster>
__device__ __forceinline__ void skip_tile(const GroupedShared& shared, Consumer& consumer,
                                          int stages) {
  for (int i = 0; i < stages; ++i) {
    wait_barrier(shared.full + 8 * consumer.stage.index, consumer.stage.parity);
    release_stage<kCluster>(shared, consumer.stage.index, consumer.lane);
    consumer.stage.advance(kStages);
  }
}

}  // namespace cambium::cuda
