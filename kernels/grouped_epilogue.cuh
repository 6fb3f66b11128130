// What the grouped GEMM does with a tile's accumulators (kernels/grouped_tile.cuh).
//
// A thread's accumulators are pairs of columns, 8 columns of a row over the four lanes of a quad.
// When neighbouring lanes swap a pair, each has 4 neighbouring columns, a quad 16: loads and stores
// of 8 bytes in whole 32-byte sectors, one shuffle for two registers, no shared memory.
#pragma once

#include "kernels/grouped_tile.cuh"
#include "kernels/swiglu_device.cuh"

namespace cambium::cuda {

constexpr int kSetColumns = 16;

// Two bf16 of neighbouring columns, the lower column in the lower half.
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ float low_of(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

// 16 columns of one row over a quad: v[i] of lane q is columns 8 i + 2 q and the next, as
// accumulators lie, before swap(), and columns at(q) + 2 i and the next, as memory lies, after it;
// and back.
struct QuadRow {
  uint32_t v[2];

  __device__ static __forceinline__ int at(int q) { return q % 2 * 8 + q / 2 * 4; }
  __device__ __forceinline__ void swap(int q) {
    const bool is_even = q % 2 == 0;
    const uint32_t received = __shfl_xor_sync(kAllLanes, is_even ? v[1] : v[0], 1);
    (is_even ? v[1] : v[0]) = received;
  }
  __device__ __forceinline__ void store(__nv_bfloat16* columns, int q) const {
    *reinterpret_cast<uint2*>(columns + at(q)) = make_uint2(v[0], v[1]);
  }
  __device__ __forceinline__ void load(const __nv_bfloat16* columns, int q) {
    const uint2 raw = *reinterpret_cast<const uint2*>(columns + at(q));
    v[0] = raw.x;
    v[1] = raw.y;
  }
};

// Memory accesses stay on their side: loads that the compiler moves up cost registers that the
// accumulators leave no room for.
__device__ __forceinline__ void keep_order() { asm volatile("" ::: "memory"); }

// Stores a row's 16 columns that lie as accumulators do.
__device__ __forceinline__ void store_set(QuadRow row, __nv_bfloat16* columns, int q,
                                          bool is_stored) {
  row.swap(q);
  if (is_stored) row.store(columns, q);
}

// up: the tile's first 96 columns are gate, the others up. h is computed from the rounded values.
__device__ __forceinline__ void finish_up(const GroupedTileParams& p, const GroupedTile& tile,
                                          const Consumer& consumer, const Accumulators& acc,
                                          int slices) {
  const int q = consumer.lane % 4;
#pragma unroll
  for (int slice = 0; slice < kGroupSlices; ++slice) {
    if (slice >= slices) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int local = consumer.row(slice, half);
      const int64_t row = tile.row0 + local;
      __nv_bfloat16* gate_up = p.wide + row * p.wide_stride + tile.column0;
      __nv_bfloat16* h = p.narrow + row * p.narrow_stride + tile.column0;
#pragma unroll
      for (int set = 0; set < kUpColumns / kSetColumns; ++set) {
        QuadRow gate, up, out;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = 4 * (2 * set + i) + 2 * half, up_at = at + kUpColumns / 2;
          gate.v[i] = pack_pair(acc[slice][at], acc[slice][at + 1]);
          up.v[i] = pack_pair(acc[slice][up_at], acc[slice][up_at + 1]);
          out.v[i] = pack_pair(swiglu_value(low_of(gate.v[i]), low_of(up.v[i])),
                               swiglu_value(high_of(gate.v[i]), high_of(up.v[i])));
        }
        const int column = set * kSetColumns;
        const bool is_stored = local < tile.rows && tile.column0 + column < p.F;
        store_set(gate, gate_up + column, q, is_stored);
        store_set(up, gate_up + p.F + column, q, is_stored);
        store_set(out, h + column, q, is_stored);
      }
    }
  }
}

// down, up_dgrad: rows scaled by their weight where there is one.
__device__ __forceinline__ void finish_scaled(const GroupedTileParams& p, const GroupedTile& tile,
                                              const Consumer& consumer, const Accumulators& acc,
                                              int slices) {
  const int q = consumer.lane % 4;
#pragma unroll
  for (int slice = 0; slice < kGroupSlices; ++slice) {
    if (slice >= slices) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int local = consumer.row(slice, half);
      const int64_t row = tile.row0 + local;
      const bool is_row = local < tile.rows;
      const float scale = p.weight != nullptr && is_row ? p.weight[row] : 1.0f;
      __nv_bfloat16* out = p.narrow + row * p.narrow_stride + tile.column0;
#pragma unroll
      for (int set = 0; set < kTileColumns / kSetColumns; ++set) {
        QuadRow result;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = 4 * (2 * set + i) + 2 * half;
          result.v[i] = pack_pair(scale * acc[slice][at], scale * acc[slice][at + 1]);
        }
        const int column = set * kSetColumns;
        store_set(result, out + column, q, is_row && tile.column0 + column < p.extent.columns);
      }
    }
  }
}

// down_dgrad: SwiGLU backward of the stored gate and up; <g, h> of the tile's columns as a partial
// sum of the row, columns in the lane's order, then lanes of the quad.
__device__ __forceinline__ void finish_down_dgrad(const GroupedTileParams& p,
                                                  const GroupedTile& tile, const Consumer& consumer,
                                                  const Accumulators& acc, int slices) {
  const int q = consumer.lane % 4;
  const int last_set = min(kTileColumns, p.F - tile.column0) / kSetColumns - 1;
#pragma unroll
  for (int slice = 0; slice < kGroupSlices; ++slice) {
    if (slice >= slices) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int local = consumer.row(slice, half);
      const bool is_row = local < tile.rows;
      const int64_t row = tile.row0 + min(local, tile.rows - 1);
      const float weight = p.weight != nullptr ? p.weight[row] : 1.0f;
      const __nv_bfloat16* gate_up = p.gate_up + row * p.gate_up_stride + tile.column0;
      __nv_bfloat16* d_gate_up = p.wide + row * p.wide_stride + tile.column0;
      __nv_bfloat16* weighted_h = p.narrow + row * p.narrow_stride + tile.column0;
      float dot = 0;
      QuadRow next_gate, next_up;
      next_gate.load(gate_up, q);
      next_up.load(gate_up + p.F, q);
#pragma unroll
      for (int set = 0; set < kTileColumns / kSetColumns; ++set) {
        if (set > last_set) break;
        QuadRow gate = next_gate, up = next_up, out;
        keep_order();
        const int next = min(set + 1, last_set) * kSetColumns;
        next_gate.load(gate_up + next, q);
        next_up.load(gate_up + p.F + next, q);
        gate.swap(q);
        up.swap(q);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = 4 * (2 * set + i) + 2 * half;
          const float g_low = acc[slice][at], g_high = acc[slice][at + 1];
          const DownDgradPoint low =
              down_dgrad_point(low_of(gate.v[i]), low_of(up.v[i]), weight, g_low);
          const DownDgradPoint high =
              down_dgrad_point(high_of(gate.v[i]), high_of(up.v[i]), weight, g_high);
          dot = fmaf(g_low, low.h, dot);
          dot = fmaf(g_high, high.h, dot);
          gate.v[i] = pack_pair(low.d_gate, high.d_gate);
          up.v[i] = pack_pair(low.d_up, high.d_up);
          out.v[i] = pack_pair(low.weighted_h, high.weighted_h);
        }
        const int column = set * kSetColumns;
        store_set(gate, d_gate_up + column, q, is_row);
        store_set(up, d_gate_up + p.F + column, q, is_row);
        store_set(out, weighted_h + column, q, is_row);
      }
      dot += __shfl_xor_sync(kAllLanes, dot, 1);
      dot += __shfl_xor_sync(kAllLanes, dot, 2);
      if (q == 0 && is_row && p.partial_dot != nullptr) {
        p.partial_dot[int64_t{tile.column0 / kTileColumns} * p.R + row] = dot;
      }
    }
  }
}

// wgrad: added to the expert's fp32 matrix by the tile's only owner. Transposed: the tile's rows
// are the matrix's columns.
template <Product kProduct>
__device__ __forceinline__ void finish_wgrad(const GroupedTileParams& p, const GroupedTile& tile,
                                             const Consumer& consumer, const Accumulators& acc,
                                             int slices) {
  constexpr int kBatch = 6;  // column groups whose old values are in flight together
  const int q = consumer.lane % 4;
  float* matrix = p.d_w + tile.expert * p.d_w_expert_stride;
#pragma unroll
  for (int slice = 0; slice < kGroupSlices; ++slice) {
    if (slice >= slices) break;
#pragma unroll
    for (int batch = 0; batch < kTileColumns / 8 / kBatch; ++batch) {
      const int first = tile.column0 + batch * kBatch * 8, column = first + 2 * q;
      if (first >= p.extent.columns) break;
      keep_order();
      float2 old[2][kBatch];
#pragma unroll
      for (int store = 0; store < 2; ++store) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t row = tile.row0 + consumer.row(slice, half);
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            if (first + 8 * i >= p.extent.columns) break;
            const int at = 4 * (batch * kBatch + i) + 2 * half;
            if constexpr (kProduct == Product::wgrad) {
              float2& place =
                  *reinterpret_cast<float2*>(matrix + row * p.d_w_stride + column + 8 * i);
              if (store == 0) {
                old[half][i] = place;
              } else {
                place = make_float2(old[half][i].x + acc[slice][at],
                                    old[half][i].y + acc[slice][at + 1]);
              }
            } else {
              float* place = matrix + (column + 8 * i) * p.d_w_stride + row;
              if (store == 0) {
                old[half][i] = make_float2(place[0], place[p.d_w_stride]);
              } else {
                place[0] = old[half][i].x + acc[slice][at];
                place[p.d_w_stride] = old[half][i].y + acc[slice][at + 1];
              }
            }
          }
        }
      }
    }
  }
}

template <Product kProduct>
__device__ __forceinline__ void finish_tile(const GroupedTileParams& p, const GroupedTile& tile,
                                            const Consumer& consumer, const Accumulators& acc,
                                            int slices) {
  if constexpr (kProduct == Product::up) {
    finish_up(p, tile, consumer, acc, slices);
  } else if constexpr (kProduct == Product::down_dgrad) {
    finish_down_dgrad(p, tile, consumer, acc, slices);
  } else if constexpr (kIsWgrad<kProduct>) {
    finish_wgrad<kProduct>(p, tile, consumer, acc, slices);
  } else {
    finish_scaled(p, tile, consumer, acc, slices);
  }
}

// --- The kernel ---

template <Product kProduct, int kCluster>
__device__ __forceinline__ void multiply_tiles(const GroupedTileParams& p,
                                               const GroupedShared& shared, int rank) {
  Schedule<kProduct, kCluster> schedule(p.extent, shared.table, rank);
  Consumer consumer;
  GroupedTile tile;
  Accumulators acc;
  while (schedule.next(tile)) {
    const int slices = consumer.active_slices(tile.rows);
    if (slices == 2) {
      multiply_slices<kProduct, kCluster, 2>(p, shared, consumer, tile, acc);
    } else if (slices == 1) {
      multiply_slices<kProduct, kCluster, 1>(p, shared, consumer, tile, acc);
    } else {
      multiply_slices<kProduct, kCluster, 0>(p, shared, consumer, tile, acc);
    }
    finish_tile<kProduct>(p, tile, consumer, acc, slices);
  }
}

template <Product kProduct, int kCluster>
__global__ void __launch_bounds__(kGroupedThreads, 1)
    grouped_tile_kernel(const __grid_constant__ GroupedTileParams p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  const GroupedShared shared(memory);
  const int rank = kCluster == 1 ? 0 : static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    constexpr int kFillers = kGathersRows<kProduct> ? 1 + kWarpgroupThreads : 1;
    constexpr int kWarps = kConsumerGroups * kWarpgroupThreads / kWarpLanes;
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(shared.full + 8 * stage, kFillers);
      init_barrier(shared.empty + 8 * stage, kWarps * kCluster);
    }
    fence_barrier_init();
    prefetch_tensor_map(p.b_map);
    if (!kGathersRows<kProduct>) prefetch_tensor_map(p.a_map);
  }
  if constexpr (kIsWgrad<kProduct>) {
    Schedule<kProduct, kCluster>::build(p.extent, shared.table);
  } else {
    if (threadIdx.x < kWarpLanes) Schedule<kProduct, kCluster>::build(p.extent, shared.table);
  }
  __syncthreads();
  if constexpr (kCluster > 1) cluster_sync();
  if (threadIdx.x < kWarpgroupThreads) {
    give_registers<kProducerRegisters>();
    if constexpr (kGathersRows<kProduct>) {
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
