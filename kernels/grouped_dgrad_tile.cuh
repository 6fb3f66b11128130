// The down input gradient on the tensor cores (kernels/grouped_turns.cuh): d_y's rows, gathered, by
// the expert's [D, F] weights, then SwiGLU backward of the stored gate and up and <g, h> of each
// row.
//
// A warp finishes its 16 rows 64 columns at a time. Gate and up come in 16-byte copies to the
// scratch, where their gradients take their places, so that each memory request is a whole 128-byte
// line.
// Napkin at 131072 x 2048 x 768: 412 GFLOP, 0.56 ms; 1.0 GB of gate, up and results, 0.25 ms.
#pragma once

#include "kernels/grouped_epilogue.cuh"
#include "kernels/grouped_turns.cuh"

namespace cambium::cuda {

using DgradRegisters = TurnRegisters<40, 232>;
constexpr int kDgradPieces = 3;  // of a warp's scratch: gate, up, weighted_h
static_assert(4 * kDgradPieces * kWarpScratchBytes <= kTurnScratchBytes);

// --- Fetching ---

// By a warpgroup.
__device__ __forceinline__ void fetch_dgrad_tiles(const GroupedTileParams& p,
                                                  const TurnShared& shared, int rank) {
  RowSchedule<kTurnCluster> schedule(p.extent, shared.table, rank);
  GroupedTile tile;
  GatheredRows<kWarpgroupThreads> rows;
  uint32_t turn = 0;
  while (schedule.next(tile)) {
    const int slices = slices_of(tile.rows);
    rows.find(p, tile);
    for (int k = 0; k < tile.depth; k += kTurnDepth, ++turn) {
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

// 64 columns of rows of a [R, columns] tensor.
template <class Element>
struct LinesOf {
  Element* data;
  int64_t stride;

  // The lane's place in 4 rows of 128 bytes. NOTE: found anew for each call, where accumulators
  // fill the registers: a spilled address costs more than it saves, the L1 beside the stages is
  // little.
  __device__ __forceinline__ Element* first(const WarpRows& warp, int row0, int column) const {
    asm volatile("" : "+r"(row0));
    return data + int64_t{row0 + warp.lane / 8} * stride + (column + warp.lane % 8 * 8);
  }
};

// Between memory and a piece of the warp's scratch; rows that do not exist read as zeros.
__device__ __forceinline__ void load_lines(const WarpRows& warp, uint32_t piece,
                                           const __nv_bfloat16* from, int64_t stride) {
#pragma unroll
  for (int pass = 0; pass < 4; ++pass, from += 4 * stride) {
    uint32_t place = piece + warp.line_place(0);
    asm volatile("" : "+l"(from), "+r"(place));
    place = (place ^ pass % 2 << 6) + pass * 4 * kSwizzleBytes;
    copy_16(place, from, warp.line_row(pass) < warp.rows ? 16 : 0);
  }
}
__device__ __forceinline__ void store_lines(const WarpRows& warp, uint32_t piece, __nv_bfloat16* to,
                                            int64_t stride) {
#pragma unroll
  for (int pass = 0; pass < 4; ++pass, to += 4 * stride) {
    uint32_t place = piece + warp.line_place(0);
    asm volatile("" : "+l"(to), "+r"(place));
    place = (place ^ pass % 2 << 6) + pass * 4 * kSwizzleBytes;
    const uint4 line = load_shared_16(place);
    if (warp.line_row(pass) < warp.rows) *reinterpret_cast<uint4*>(to) = line;
  }
}

// The 64 gate and up columns of a chunk on their way into the L2: a lane a row of one of them.
__device__ __forceinline__ void prefetch_gate_up(const GroupedTileParams& p, const WarpRows& warp,
                                                 int row0, int column) {
  const int row = warp.lane % kWarpRows, second = warp.lane / kWarpRows * p.F;
  if (row >= warp.rows || column >= p.F) return;
  prefetch_to_l2(p.gate_up + int64_t{row0 + row} * p.gate_up_stride + column + second);
}

// 64 columns of a tile's half, in the scratch; `dot` sums g h of the lane's two rows.
__device__ __forceinline__ void finish_dgrad_chunk(const WarpRows& warp,
                                                   const RowWeightPair& weight, float (&dot)[2],
                                                   const TurnAccumulators& acc, int first) {
#pragma unroll
  for (int i = 0; i < kChunkGroups / 2; ++i) {
    uint32_t place = warp.tile_place(0);
    asm volatile("" : "+r"(place), "+f"(dot[0]), "+f"(dot[1]));
    place ^= i << 5;
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
                                                  int row0, const TurnAccumulators& acc) {
  if (warp.rows == 0) return;
  const RowWeightPair weight(p.weight == nullptr ? nullptr : p.weight + row0, warp);
  const LinesOf<const __nv_bfloat16> gate_up{p.gate_up, p.gate_up_stride};
  const LinesOf<__nv_bfloat16> d_gate_up{p.wide, p.wide_stride},
      weighted_h{p.narrow, p.narrow_stride};
  float dot[2] = {0.0f, 0.0f};
#pragma unroll
  for (int c = 0; c < kTurnColumns / kChunkColumns; ++c) {
    const int column = tile.column0 + c * kChunkColumns;
    if (column >= p.F) break;
    __syncwarp();
    load_lines(warp, 0, gate_up.first(warp, row0, column), gate_up.stride);
    load_lines(warp, kWarpScratchBytes, gate_up.first(warp, row0, p.F + column), gate_up.stride);
    prefetch_gate_up(p, warp, row0, column + kChunkColumns);
    wait_copies();
    __syncwarp();
    finish_dgrad_chunk(warp, weight, dot, acc, c * kChunkColumns / 2);
    __syncwarp();
    store_lines(warp, 0, d_gate_up.first(warp, row0, column), d_gate_up.stride);
    store_lines(warp, kWarpScratchBytes, d_gate_up.first(warp, row0, p.F + column),
                d_gate_up.stride);
    store_lines(warp, 2 * kWarpScratchBytes, weighted_h.first(warp, row0, column),
                weighted_h.stride);
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
    DgradRegisters::give();
    fetch_dgrad_tiles(p, shared, rank);
  } else {
    DgradRegisters::take();
    const int lane = threadIdx.x % kWarpLanes;
    const int first = static_cast<int>(threadIdx.x) % kWarpgroupThreads / kWarpLanes * kWarpRows;
    const auto rows_of = [&](const GroupedTile& tile, int group, int half_row) {
      const uint32_t scratch =
          shared.scratch(group) + first / kWarpRows * (kDgradPieces * kWarpScratchBytes);
      return WarpRows{scratch, lane, max(0, min(kWarpRows, tile.rows - half_row - first))};
    };
    take_turns<Schedule, 0>(
        p.extent, shared, rank,
        [&](const GroupedTile& tile) {
          for (int half_row = 0; half_row < kTileRows; half_row += 64) {
            prefetch_gate_up(p, rows_of(tile, 0, half_row), tile.row0 + half_row + first,
                             tile.column0);
          }
        },
        [&](const GroupedTile& tile, int group, const TurnAccumulators& top,
            const TurnAccumulators& bottom) {
          finish_dgrad_half(p, tile, rows_of(tile, group, 0), tile.row0 + first, top);
          finish_dgrad_half(p, tile, rows_of(tile, group, 64), tile.row0 + 64 + first, bottom);
        });
  }
  end_turns();
}

}  // namespace cambium::cuda
