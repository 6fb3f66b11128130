// Tiles of a grouped GEMM by two warpgroups in turn: what weight gradients
// (kernels/grouped_wgrad_tile.cuh) and the down input gradient (kernels/grouped_dgrad_tile.cuh)
// share.
//
// A tile is 128 rows and 192 columns; 64 of the summed extent at a time go through four stages of
// 40 KB. A comes in 16-byte copies by a warpgroup, so that its rows may be gathered; B by the copy
// engine, half by each CTA of a pair for both. Two warpgroups multiply whole tiles, every other one
// each: while one brings its results out, the other has the tensor cores to itself.
#pragma once

#include "kernels/cuda_hopper.cuh"
#include "kernels/grouped_schedule.cuh"

namespace cambium::cuda {

constexpr int kTurnColumns = 192;
constexpr int kTurnDepth = 64;
constexpr int kTurnStages = 4;
constexpr int kTurnCluster = 2;
constexpr int kTurnGroups = 2;                               // warpgroups that multiply
constexpr int kTurnPanelBytes = kTurnDepth * kSwizzleBytes;  // 64 x 64 bf16
constexpr int kTurnPanelsOfA = kTileRows / 64;
constexpr int kTurnPanelsOfB = kTurnColumns / 64;
constexpr int kTurnABytes = kTurnPanelsOfA * kTurnPanelBytes;
constexpr int kTurnBBytes = kTurnPanelsOfB * kTurnPanelBytes;
constexpr int kTurnStageBytes = kTurnABytes + kTurnBBytes;
constexpr int kTurnBoxDepthOfB = kTurnDepth / kTurnCluster;
constexpr int kTurnThreads = (1 + kTurnGroups) * kWarpgroupThreads;
constexpr int kTurnScratchBytes = 24 << 10;  // of each group, for its results

// Registers per thread after the warpgroups have exchanged them: what 384 threads start with.
template <int kProducer, int kConsumer>
struct TurnRegisters {
  static_assert(kProducer + kTurnGroups * kConsumer <= 3 * 168,
                "a warpgroup would wait for registers that do not exist");
  __device__ static __forceinline__ void give() { give_registers<kProducer>(); }
  __device__ static __forceinline__ void take() { take_registers<kConsumer>(); }
};

// Shared memory: the stages, the groups' scratch, the barriers, the schedule's table.
struct TurnShared {
  static constexpr int kScratch = kTurnStages * kTurnStageBytes;
  static constexpr int kBarriers = kScratch + kTurnGroups * kTurnScratchBytes;
  static constexpr int kOwnBarriers = 16;
  static constexpr int kTable = kBarriers + 16 * kTurnStages + 8 * (kTurnGroups + kOwnBarriers);
  static constexpr int kBytes = kTable + static_cast<int>(sizeof(GroupedTable));
  static_assert(kBytes <= 232448, "what a CTA may have");

  uint32_t stages, full_0, empty_0, begin_0;
  GroupedTable& table;
  __device__ explicit TurnShared(unsigned char* memory)
      : stages(shared_address(memory)),
        full_0(stages + kBarriers),
        empty_0(full_0 + 8 * kTurnStages),
        begin_0(empty_0 + 8 * kTurnStages),
        table(*reinterpret_cast<GroupedTable*>(memory + kTable)) {}
  // `turn` counts stages since the kernel began.
  __device__ static uint32_t index(uint32_t turn) { return turn % kTurnStages; }
  __device__ static uint32_t parity(uint32_t turn) { return turn / kTurnStages % 2; }
  __device__ uint32_t a(uint32_t turn) const { return stages + index(turn) * kTurnStageBytes; }
  __device__ uint32_t b(uint32_t turn) const { return a(turn) + kTurnABytes; }
  __device__ uint32_t full(uint32_t turn) const { return full_0 + 8 * index(turn); }
  __device__ uint32_t empty(uint32_t turn) const { return empty_0 + 8 * index(turn); }
  // The group may begin its next tile.
  __device__ uint32_t begin(int group) const { return begin_0 + 8 * group; }
  // A barrier of the kernel's own.
  __device__ uint32_t own(int i) const { return begin(kTurnGroups + i); }
  __device__ uint32_t scratch(int group) const {
    return stages + kScratch + group * kTurnScratchBytes;
  }
};

// B of one whole stage, by one thread: this CTA's half of the summed extent, for both CTAs, from
// row `depth` of matrix `outer` of the map.
__device__ __forceinline__ void fetch_turn_b(const CUtensorMap& map, uint32_t to, uint32_t barrier,
                                             int rank, TensorCoordinate at) {
  arrive_expecting(barrier, kTurnBBytes);
  const int first = rank * kTurnBoxDepthOfB;
  for (int panel = 0; panel < kTurnPanelsOfB; ++panel) {
    copy_tensor_multicast(to + panel * kTurnPanelBytes + first * kSwizzleBytes, map, barrier,
                          {at.inner + panel * 64, at.middle + first, at.outer},
                          (1 << kTurnCluster) - 1);
  }
}

using TurnAccumulators = float[kTurnColumns / 2];  // of 64 rows

__device__ __forceinline__ void release_turn(uint32_t empty) {
  const uint32_t lane = threadIdx.x % kWarpLanes;
  if (lane < kTurnCluster) arrive_at(empty, lane);
}

// The two halves of A B over a tile's stages, which begin at `turn`. B is MN-major; A is where
// kTransposeA is 1. Once the last stage is there, the other group may begin.
template <int kTransposeA>
__device__ __forceinline__ void multiply_turns(const TurnShared& shared, uint32_t turn, int stages,
                                               uint32_t begin_of_other, TurnAccumulators& top,
                                               TurnAccumulators& bottom) {
  constexpr int kStep = 16, kBStep = kStep * kSwizzleBytes;
  constexpr int kAStep = kTransposeA ? kStep * kSwizzleBytes : kStep * 2;
  constexpr int kRowGroup = kSwizzleRows * kSwizzleBytes;
  const uint64_t base = matrix_descriptor(shared.stages, kTurnPanelBytes, kRowGroup);
  for (int i = 0; i < stages; ++i, ++turn) {
    wait_barrier(shared.full(turn), TurnShared::parity(turn));
    fence_async_proxy();
    const uint64_t a = base + (TurnShared::index(turn) * kTurnStageBytes >> 4);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kTurnDepth / kStep; ++step) {
      const uint64_t a_step = a + (step * kAStep >> 4);
      const uint64_t b_step = a + ((kTurnABytes + step * kBStep) >> 4);
      wgmma_64x192x16<kTransposeA, 1>(top, a_step, b_step, i + step);
      wgmma_64x192x16<kTransposeA, 1>(bottom, a_step + (kTurnPanelBytes >> 4), b_step, i + step);
    }
    wgmma_commit();
    if (i == stages - 1 && threadIdx.x % kWarpLanes == 0) arrive(begin_of_other);
    if (i == 0) continue;
    wgmma_wait<1>();
    release_turn(shared.empty(turn - 1));
  }
  wgmma_wait<0>();
  release_turn(shared.empty(turn - 1));
  pin_registers(top);
  pin_registers(bottom);
}

// Group g multiplies every other tile, beginning with its g-th, between prepare(tile) and
// finish(tile, group, top, bottom).
// NOTE: a barrier tells apart two fillings of a stage, no more: a group that waited for its first
// stage while the other still multiplies would take an earlier filling for it.
template <class Schedule, int kTransposeA, class Prepare, class Finish>
__device__ __forceinline__ void take_turns(const GroupedExtent& extent, const TurnShared& shared,
                                           int rank, Prepare&& prepare, Finish&& finish) {
  Schedule schedule(extent, shared.table, rank);
  const int group =
      __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroupThreads - 1, 0);
  if (group > 0 && threadIdx.x % kWarpLanes == 0) arrive(shared.begin(0));
  GroupedTile tile;
  uint32_t turn = 0;
  for (int item = 0; schedule.next(tile); ++item) {
    const int stages = ceil_divide(tile.depth, kTurnDepth);
    if (item % kTurnGroups == group) {
      prepare(tile);
      TurnAccumulators top, bottom;
      wait_barrier(shared.begin(group), static_cast<uint32_t>(item / kTurnGroups % 2));
      multiply_turns<kTransposeA>(shared, turn, stages, shared.begin(1 - group), top, bottom);
      finish(tile, group, top, bottom);
    }
    turn += static_cast<uint32_t>(stages);
  }
}

// What all threads do before they part: barriers, table, the pair of CTAs meets.
template <class Schedule>
__device__ __forceinline__ void begin_turns(const GroupedExtent& extent, const TurnShared& shared,
                                            const CUtensorMap& b_map) {
  if (threadIdx.x == 0) {
    for (uint32_t stage = 0; stage < kTurnStages; ++stage) {
      init_barrier(shared.full(stage), 1 + kWarpgroupThreads);
      init_barrier(shared.empty(stage), kWarpgroupThreads / kWarpLanes * kTurnCluster);
    }
    for (int group = 0; group < kTurnGroups; ++group) {
      init_barrier(shared.begin(group), kWarpgroupThreads / kWarpLanes);
    }
    fence_barrier_init();
    prefetch_tensor_map(b_map);
  }
  load_offsets(extent, shared.table);
  __syncthreads();
  Schedule::build(extent, shared.table);
  __syncthreads();
  cluster_sync();
}

// A CTA may not leave while its peer still writes to it or signals it.
__device__ __forceinline__ void end_turns() {
  __syncwarp();
  cluster_sync();
}

}  // namespace cambium::cuda
