// The down input gradient on the tensor cores (kernels/grouped_turns.cuh): d_y's rows, gathered, by
// the expert's [D, F] weights, then SwiGLU backward of the stored gate and up and <g, h> of each
// row.
//
// A warp finishes its 16 rows of each half 32 columns at a time, through two buffers: the copy
// engine brings gate and up of the next chunk and takes results out, the first two chunks come
// while the tile is multiplied. Gradients take the places of gate and up. Rows at an expert's end
// are stored by the warp itself, which does not write those of the next expert.
// Napkin at 131072 x 2048 x 768: 412 GFLOP, 0.56 ms; 1.0 GB of gate, up and results, 0.25 ms.
#pragma once

#include "kernels/grouped_epilogue.cuh"
#include "kernels/grouped_turns.cuh"

namespace cambium::cuda {

using DgradRegisters = TurnRegisters<40, 232>;

constexpr int kDgradChunkColumns = 32;
constexpr int kDgradChunks = kTurnColumns / kDgradChunkColumns;  // of a half
constexpr int kDgradRowBytes = kDgradChunkColumns * 2;           // swizzled as the copy engine does
constexpr int kDgradPieceBytes = kWarpRows * kDgradRowBytes;
constexpr int kDgradPieces = 3;  // gate, up, weighted_h
constexpr int kDgradBuffers = 2;
constexpr int kDgradWarpBytes = kDgradBuffers * kDgradPieces * kDgradPieceBytes;
static_assert(4 * kDgradWarpBytes <= kTurnScratchBytes);
static_assert(4 * kTurnGroups * kDgradBuffers <= TurnShared::kOwnBarriers);
static_assert(64 % (kDgradBuffers * kDgradChunkColumns) == 0, "a half has whole rounds of buffers");

struct DownDgradParams {
  GroupedTileParams tile;
  CUtensorMap gate_up_map, d_gate_up_map, weighted_h_map;  // boxes of 32 columns and 16 rows
};

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

// A warp's way through the chunks of its tiles.
struct DgradChunks {
  uint32_t buffers, loaded_0;
  int lane, first_row;  // of the warp in a half
  uint32_t rounds = 0;  // of the buffers, before this half

  __device__ DgradChunks(const TurnShared& shared, int group, int thread_of_group) {
    const int warp = thread_of_group / kWarpLanes;
    lane = thread_of_group % kWarpLanes;
    first_row = warp * kWarpRows;
    buffers = shared.scratch(group) + warp * kDgradWarpBytes;
    loaded_0 = shared.own((group * 4 + warp) * kDgradBuffers);
  }
  // Of a half of the tile.
  __device__ __forceinline__ static int count(const DownDgradParams& p, const GroupedTile& tile) {
    return min(kDgradChunks, (p.tile.F - tile.column0) / kDgradChunkColumns);
  }
  // Rows from the warp's first one in the half to the tile's end: the warp has none of them, some,
  // or kWarpRows and more. NOTE: clamped to that range and compared with its ends, ptxas 13.0 takes
  // the comparison from a predicate of VIMNMX.RELU, which is not it.
  __device__ __forceinline__ int rows_left(const GroupedTile& tile, int half) const {
    return tile.rows - 64 * half - first_row;
  }
  __device__ __forceinline__ uint32_t buffer(int chunk) const {
    return buffers + chunk % kDgradBuffers * (kDgradPieces * kDgradPieceBytes);
  }
  __device__ __forceinline__ uint32_t loaded(int chunk) const {
    return loaded_0 + 8 * (chunk % kDgradBuffers);
  }
  __device__ __forceinline__ uint32_t parity(int chunk) const {
    return (rounds + chunk / kDgradBuffers) % 2;
  }
  // Gate and up of a chunk, by one thread.
  __device__ __forceinline__ void load(const DownDgradParams& p, int chunk, int column,
                                       int row) const {
    arrive_expecting(loaded(chunk), 2 * kDgradPieceBytes);
    copy_tensor(buffer(chunk), p.gate_up_map, loaded(chunk), {column, row, 0});
    copy_tensor(buffer(chunk) + kDgradPieceBytes, p.gate_up_map, loaded(chunk),
                {p.tile.F + column, row, 0});
  }
  // A half's chunks on their way into the L2, gate or up of one by each lane.
  __device__ __forceinline__ void prefetch(const DownDgradParams& p, const GroupedTile& tile,
                                           int half) const {
    if (rows_left(tile, half) <= 0 || lane >= 2 * count(p, tile)) return;
    prefetch_tensor(p.gate_up_map,
                    {lane % 2 * p.tile.F + tile.column0 + lane / 2 * kDgradChunkColumns,
                     tile.row0 + 64 * half + first_row, 0});
  }
  __device__ __forceinline__ void prepare(const DownDgradParams& p, const GroupedTile& tile) const {
    if (rows_left(tile, 0) <= 0) return;
    if (lane == 0) {
      wait_stores_read<0>();
      for (int chunk = 0; chunk < kDgradBuffers; ++chunk) {
        load(p, chunk, tile.column0 + chunk * kDgradChunkColumns, tile.row0 + first_row);
      }
    }
    __syncwarp();
    prefetch(p, tile, 0);
  }
  // While chunk `chunk` is worked on, the next one comes into the other buffer, once that one's
  // results have left it: in the half's columns or, after its last, in the second half.
  __device__ __forceinline__ void look_ahead(const DownDgradParams& p, const GroupedTile& tile,
                                             int half, int chunk) const {
    if (half == 0 && chunk == 0) return prefetch(p, tile, 1);  // prepare() loaded the first two
    const bool is_last = chunk + 1 == count(p, tile);
    if (lane != 0 || (is_last && (half == 1 || rows_left(tile, 1) <= 0))) return;
    wait_stores_read<0>();
    load(p, chunk + 1, tile.column0 + (is_last ? 0 : (chunk + 1) * kDgradChunkColumns),
         tile.row0 + 64 * (is_last ? half + 1 : half) + first_row);
  }
  __device__ __forceinline__ void store(const DownDgradParams& p, const GroupedTile& tile, int half,
                                        int chunk) const {
    const uint32_t from = buffer(chunk);
    const int row = tile.row0 + 64 * half + first_row, left = rows_left(tile, half);
    const int column = tile.column0 + chunk * kDgradChunkColumns;
    if (left >= kWarpRows) {
      if (lane != 0) return;
      store_tensor(p.d_gate_up_map, from, {column, row, 0});
      store_tensor(p.d_gate_up_map, from + kDgradPieceBytes, {p.tile.F + column, row, 0});
      store_tensor(p.weighted_h_map, from + 2 * kDgradPieceBytes, {column, row, 0});
      return commit_stores();
    }
#pragma unroll 1
    for (int i = lane; i < left * 4; i += kWarpLanes) {  // 16 bytes of a row
      const uint32_t at = from + i / 4 * kDgradRowBytes + ((i % 4 ^ i / 8 % 4) << 4);
      __nv_bfloat16* wide =
          p.tile.wide + int64_t{row + i / 4} * p.tile.wide_stride + column + i % 4 * 8;
      *reinterpret_cast<uint4*>(wide) = load_shared_16(at);
      *reinterpret_cast<uint4*>(wide + p.tile.F) = load_shared_16(at + kDgradPieceBytes);
      *reinterpret_cast<uint4*>(p.tile.narrow + int64_t{row + i / 4} * p.tile.narrow_stride +
                                column + i % 4 * 8) = load_shared_16(at + 2 * kDgradPieceBytes);
    }
    fence_async_proxy();
    __syncwarp();
  }
};

// 32 columns of a tile's half, in a buffer; `dot` sums g h of the lane's two rows. NOTE: a pair of
// elements at a time, although matrix loads would bring eight: the accumulators leave forty
// registers, and what spills goes through the L2.
__device__ __forceinline__ void finish_dgrad_chunk(uint32_t buffer, int lane,
                                                   const RowWeightPair& weight, float (&dot)[2],
                                                   const TurnAccumulators& acc, int first) {
  const int row = lane / 4;
  const uint32_t place_0 = buffer + row * kDgradRowBytes + (row / 2 << 4) + lane % 4 * 4;
#pragma unroll
  for (int g = 0; g < kDgradChunkColumns / 8; ++g) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t place = place_0;
      asm volatile("" : "+r"(place), "+f"(dot[0]), "+f"(dot[1]));
      place = (place ^ g << 4) + half * 8 * kDgradRowBytes;
      const uint32_t gate = load_shared_pair(place);
      const uint32_t up = load_shared_pair(place + kDgradPieceBytes);
      const int at = first + 4 * g + 2 * half;
      const float w = weight.of[half], g_low = acc[at], g_high = acc[at + 1];
      const DownDgradPoint low = down_dgrad_point(low_of(gate), low_of(up), w, g_low);
      const DownDgradPoint high = down_dgrad_point(high_of(gate), high_of(up), w, g_high);
      dot[half] = fmaf(g_high, high.h, fmaf(g_low, low.h, dot[half]));
      store_shared_pair(place, pack_pair(low.d_gate, high.d_gate));
      store_shared_pair(place + kDgradPieceBytes, pack_pair(low.d_up, high.d_up));
      store_shared_pair(place + 2 * kDgradPieceBytes, pack_pair(low.weighted_h, high.weighted_h));
    }
  }
}

// <g, h> of the tile's columns is a partial sum of the row: columns in the lane's order, then the
// four lanes of the row.
template <int kHalf>
__device__ __forceinline__ void finish_dgrad_half(const DownDgradParams& p, const GroupedTile& tile,
                                                  DgradChunks& chunks,
                                                  const TurnAccumulators& acc) {
  const int left = chunks.rows_left(tile, kHalf), row0 = tile.row0 + 64 * kHalf + chunks.first_row;
  if (left <= 0) return;
  const int lane = chunks.lane;
  const RowWeightPair weight(p.tile.weight == nullptr ? nullptr : p.tile.weight + row0,
                             {0, lane, min(left, kWarpRows)});
  float dot[2] = {0.0f, 0.0f};
#pragma unroll
  for (int c = 0; c < kDgradChunks; ++c) {
    if (c >= DgradChunks::count(p, tile)) break;
    wait_barrier(chunks.loaded(c), chunks.parity(c));
    chunks.look_ahead(p, tile, kHalf, c);
    __syncwarp();
    finish_dgrad_chunk(chunks.buffer(c), lane, weight, dot, acc, c * kDgradChunkColumns / 2);
    fence_async_proxy();
    __syncwarp();
    chunks.store(p, tile, kHalf, c);
  }
  chunks.rounds += DgradChunks::count(p, tile) / kDgradBuffers;
  if (p.tile.partial_dot == nullptr) return;
  float* partial = p.tile.partial_dot + int64_t{tile.column0 / kTurnColumns} * p.tile.R + row0;
  for (int half = 0; half < 2; ++half) {
    dot[half] += __shfl_xor_sync(kAllLanes, dot[half], 1);
    dot[half] += __shfl_xor_sync(kAllLanes, dot[half], 2);
    const int at = lane / 4 + 8 * half;
    if (lane % 4 == 0 && at < left) partial[at] = dot[half];
  }
}

template <class = void>
__global__ void __launch_bounds__(kTurnThreads, 1)
    grouped_down_dgrad_kernel(const __grid_constant__ DownDgradParams p) {
  using Schedule = RowSchedule<kTurnCluster>;
  extern __shared__ __align__(1024) unsigned char memory[];
  const TurnShared shared(memory);
  const int rank = static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    for (int i = 0; i < 4 * kTurnGroups * kDgradBuffers; ++i) init_barrier(shared.own(i), 1);
  }
  begin_turns<Schedule>(p.tile.extent, shared, p.tile.b_map);
  if (threadIdx.x < kWarpgroupThreads) {
    DgradRegisters::give();
    fetch_dgrad_tiles(p.tile, shared, rank);
  } else {
    DgradRegisters::take();
    const int thread = static_cast<int>(threadIdx.x);
    DgradChunks chunks(shared, thread / kWarpgroupThreads - 1, thread % kWarpgroupThreads);
    take_turns<Schedule, 0>(
        p.tile.extent, shared, rank, [&](const GroupedTile& tile) { chunks.prepare(p, tile); },
        [&](const GroupedTile& tile, int, const TurnAccumulators& top,
            const TurnAccumulators& bottom) {
          finish_dgrad_half<0>(p, tile, chunks, top);
          finish_dgrad_half<1>(p, tile, chunks, bottom);
        });
    wait_stores();
  }
  end_turns();
}

}  // namespace cambium::cuda
