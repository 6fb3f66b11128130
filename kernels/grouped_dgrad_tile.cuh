// The down input gradient on the tensor cores (kernels/grouped_turns.cuh): d_y's rows, gathered, by
// the expert's [D, F] weights, then SwiGLU backward of the stored gate and up and <g, h> of each
// row.
//
// A warp finishes its 16 rows 64 columns at a time. Gate and up come in 16-byte copies to the
// scratch, where their gradients take their places, so that each memory request is a whole 128-byte
// line; the producers have asked for those lines six stages before.
// Napkin at 131072 x 2048 x 768: 412 GFLOP, 0.56 ms; 1.0 GB of gate, up and results, 0.25 ms.
#pragma once

#include "kernels/grouped_epilogue.cuh"
#include "kernels/grouped_turns.cuh"

namespace cambium::cuda {

constexpr int kDgradPieces = 3;  // of a warp's scratch: gate, up, weighted_h
static_assert(4 * kDgradPieces * kWarpScratchBytes <= kTurnScratchBytes);

// --- Fetching ---

// The lines of gate and up that a tile's results need, on their way into the L2.
__device__ __forceinline__ void prefetch_gate_up(const GroupedTileParams& p,
                                                 const GroupedTile& tile) {
  const int lines = min(kTurnColumns, p.F - tile.column0) / 64;  // of a row, gate or up
  const __nv_bfloat16* gate = p.gate_up + tile.row0 * p.gate_up_stride + tile.column0;
  for (int row = static_cast<int>(threadIdx.x); row < tile.rows; row += kWarpgroupThreads) {
    for (int line = 0; line < lines; ++line) {
      const __nv_bfloat16* at = gate + row * p.gate_up_stride + line * 64;
      prefetch_to_l2(at);
      prefetch_to_l2(at + p.F);
    }
  }
}

// By a warpgroup.
__device__ __forceinline__ void fetch_dgrad_tiles(const GroupedTileParams& p,
                                                  const TurnShared& shared, int rank) {
  constexpr int kPrefetchStages = 6;
  RowSchedule<kTurnCluster> schedule(p.extent, shared.table, rank);
  GroupedTile tile;
  GatheredRows<kWarpgroupThreads> rows;
  uint32_t turn = 0;
  while (schedule.next(tile)) {
    const int slices = slices_of(tile.rows);
    const int prefetch_k =
        max(0, ceil_divide(tile.depth, kTurnDepth) - kPrefetchStages) * kTurnDepth;
    rows.find(p, tile);
    for (int k = 0; k < tile.depth; k += kTurnDepth, ++turn) {
      if (k == prefetch_k) prefetch_gate_up(p, tile);
      wait_barrier(shared.empty(turn), TurnShared::parity(turn) ^ 1);
      if (threadIdx.x == 0) {
        fetch_turn_b(p.b_map, shared.b(turn), shared.full(turn), rank,
                     {tile.column0, k, tile.expert});
      }
      __syncwarp();
      rows.fetch(p, slices, k, shared.a(turn));
      arrive_after_copies(shared.full(turn));
    }
  }
}

// --- Results ---

// 64 columns of a warp's rows between memory and a piece of its scratch.
__device__ __forceinline__ void load_lines(const WarpRows& warp, uint32_t piece,
                                           const __nv_bfloat16* from, int64_t stride) {
#pragma unroll
  for (int pass = 0; pass < 4; ++pass) {
    const int row = min(warp.line_row(pass), warp.rows - 1);  // beyond the last one: it again
    copy_16(piece + warp.line_place(pass), from + row * stride + warp.lane % 8 * 8);
  }
}
__device__ __forceinline__ void store_lines(const WarpRows& warp, uint32_t piece, __nv_bfloat16* to,
                                            int64_t stride) {
#pragma unroll
  for (int pass = 0; pass < 4; ++pass) {
    const int row = warp.line_row(pass);
    const uint4 line = load_shared_16(piece + warp.line_place(pass));
    if (row < warp.rows) *reinterpret_cast<uint4*>(to + row * stride + warp.lane % 8 * 8) = line;
  }
}

// 64 columns of a tile's half, in the scratch; `dot` sums g h of the lane's two rows.
__device__ __forceinline__ void finish_dgrad_chunk(const WarpRows& warp,
                                                   const RowWeightPair& weight, float (&dot)[2],
                                                   const TurnAccumulators& acc, int first) {
#pragma unroll
  for (int i = 0; i < kChunkGroups / 2; ++i) {
    const uint32_t place = warp.tile_place(i);
    uint32_t gate[4], up[4], out[4];
    load_tiles(place, gate);
    load_tiles(place + kWarpScratchBytes, up);
#pragma unroll
    for (int v = 0; v < 4; ++v) {  // two column groups of two row halves
      const int half = v % 2, at = first + 8 * i + 2 * v;
      const float w = weight.of[half], g_low = acc[at], g_high = acc[at + 1];
      const DownDgradPoint low = down_dgrad_point(low_of(gate[v]), low_of(up[v]), w, g_low);
      const DownDgradPoint high = down_dgrad_point(high_of(gate[v]), high_of(up[v]), w, g_high);
      dot[half] = fmaf(g_high, high.h, fmaf(g_low, low.h, dot[half]));
      gate[v] = pack_pair(low.d_gate, high.d_gate);
      up[v] = pack_pair(low.d_up, high.d_up);
      out[v] = pack_pair(low.weighted_h, high.weighted_h);
    }
    store_tiles(place, gate);
    store_tiles(place + kWarpScratchBytes, up);
    store_tiles(place + 2 * kWarpScratchBytes, out);
  }
}

// A warp's rows from `row0` of all R. <g, h> of the tile's columns as a partial sum of the row:
// columns in the lane's order, then the four lanes of the row.
__device__ __forceinline__ void finish_dgrad_half(const GroupedTileParams& p,
                                                  const GroupedTile& tile, const WarpRows& warp,
                                                  int64_t row0, const TurnAccumulators& acc) {
  if (warp.rows == 0) return;
  const RowWeightPair weight(p.weight == nullptr ? nullptr : p.weight + row0, warp);
  const __nv_bfloat16* gate_up = p.gate_up + row0 * p.gate_up_stride + tile.column0;
  __nv_bfloat16* d_gate_up = p.wide + row0 * p.wide_stride + tile.column0;
  __nv_bfloat16* weighted_h = p.narrow + row0 * p.narrow_stride + tile.column0;
  float dot[2] = {0.0f, 0.0f};
#pragma unroll
  for (int c = 0; c < kTurnColumns / kChunkColumns; ++c) {
    const int column = c * kChunkColumns;
    if (tile.column0 + column >= p.F) break;
    __syncwarp();
    load_lines(warp, 0, gate_up + column, p.gate_up_stride);
    load_lines(warp, kWarpScratchBytes, gate_up + p.F + column, p.gate_up_stride);
    wait_copies();
    __syncwarp();
    finish_dgrad_chunk(warp, weight, dot, acc, c * kChunkColumns / 2);
    __syncwarp();
    store_lines(warp, 0, d_gate_up + column, p.wide_stride);
    store_lines(warp, kWarpScratchBytes, d_gate_up + p.F + column, p.wide_stride);
    store_lines(warp, 2 * kWarpScratchBytes, weighted_h + column, p.narrow_stride);
  }
  if (p.partial_dot == nullptr) return;
  float* partial = p.partial_dot + int64_t{tile.column0 / kTurnColumns} * p.R + row0;
  for (int half = 0; half < 2; ++half) {
    dot[half] += __shfl_xor_sync(kAllLanes, dot[half], 1);
    dot[half] += __shfl_xor_sync(kAllLanes, dot[half], 2);
    const int at = warp.lane / 4 + 8 * half;
    if (warp.lane % 4 == 0 && at < warp.rows) partial[at] = dot[half];
  }
}

template <class = void>
__global__ void __launch_bounds__(kTurnThreads, 1)
    grouped_down_dgrad_kernel(const __grid_constant__ GroupedTileParams p) {
  using Schedule = RowSchedule<kTurnCluster>;
  extern __shared__ __align__(1024) unsigned char memory[];
  const TurnShared shared(memory);
  const int rank = static_cast<int>(cluster_rank());
  begin_turns<Schedule>(p.extent, shared, p.b_map);
  if (threadIdx.x < kWarpgroupThreads) {
    give_registers<kTurnProducerRegisters>();
    fetch_dgrad_tiles(p, shared, rank);
  } else {
    take_registers<kTurnConsumerRegisters>();
    const int lane = threadIdx.x % kWarpLanes;
    const int first = static_cast<int>(threadIdx.x) % kWarpgroupThreads / kWarpLanes * kWarpRows;
    const auto finish_half = [&](const GroupedTile& tile, int group, int half_row,
                                 const TurnAccumulators& acc) {
      const int row = half_row + first;
      const uint32_t scratch =
          shared.scratch(group) + first / kWarpRows * (kDgradPieces * kWarpScratchBytes);
      const WarpRows warp{scratch, lane, max(0, min(kWarpRows, tile.rows - row))};
      finish_dgrad_half(p, tile, warp, tile.row0 + row, acc);
    };
    take_turns<Schedule, 0>(p.extent, shared, rank,
                            [&](const GroupedTile& tile, int group, const TurnAccumulators& top,
                                const TurnAccumulators& bottom) {
                              finish_half(tile, group, 0, top);
                              finish_half(tile, group, 64, bottom);
                            });
  }
  end_turns();
}

}  // namespace cambium::cuda
