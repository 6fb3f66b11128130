// dQ of attention on tensor cores: see kernels/attention_backward.cuh.
//
// A persistent kernel like the forward one. Two warpgroups of 64 queries take turns at the tensor
// cores: one's dQ += dS K, S = Q K^T and dP = dO V^T run while the other computes P and dS.
// Shared memory: Q, dO, dQ and two stages of K and V, 32 KB each at Q = 128.
#pragma once

#include "kernels/attention_backward.cuh"

namespace cambium::cuda {

template <int kColumns>
struct QueryGradientShared {
  static constexpr int kTileBytes = kTileRows * kColumns * 2;
  char q[kTileBytes];
  char d_o[kTileBytes];
  char k[kBackwardStages][kTileBytes];
  char v[kBackwardStages][kTileBytes];
  char d_q[kTileBytes];  // each warpgroup's 64 rows as a tile of their own
  uint64_t q_full, q_empty;
  uint64_t k_full[kBackwardStages], k_empty[kBackwardStages];
  uint64_t v_full[kBackwardStages], v_empty[kBackwardStages];
};

template <int kColumns, class Shape>
__device__ __forceinline__ void query_gradient_producer(const BackwardMaps& maps,
                                                        const Shape& shape,
                                                        QueryGradientShared<kColumns>& shared) {
  const int tiles = shape.query_tiles() * shape.sequences * shape.H;
  RingPosition<kBackwardStages> ring;
  for (int round = 0, index = snake_index(0); index < tiles; index = snake_index(++round)) {
    const QueryTile tile = query_tile(shape, index);
    const int group = tile.head / shape.heads();
    wait_barrier(shared_address(&shared.q_empty), round % 2 ^ 1);
    const TileAt query{0, tile.head, tile.row, tile.sequence};
    load_tile<kColumns>(&maps.q, &shared.q_full, shared.q, query);
    load_tile<kColumns>(&maps.d_o, &shared.q_full, shared.d_o, query);
    for (int key = tile.first_key_tile; key <= tile.last_key_tile; ++key, ring.advance()) {
      const TileAt at{0, group, key * kTileRows, tile.sequence};
      wait_barrier(shared_address(&shared.k_empty[ring.stage]), ring.parity ^ 1);
      load_tile<kColumns>(&maps.k, &shared.k_full[ring.stage], shared.k[ring.stage], at);
      wait_barrier(shared_address(&shared.v_empty[ring.stage]), ring.parity ^ 1);
      load_tile<kColumns>(&maps.v, &shared.v_full[ring.stage], shared.v[ring.stage], at);
    }
  }
}

// s = exp2(s * scale_log2 - lse_log2) of this thread's two rows.
template <int kElements>
__device__ __forceinline__ void scores_to_probs(float (&s)[kElements], float scale_log2,
                                                const float (&lse_log2)[2]) {
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    s[i] = exp2_fast(fmaf(s[i], scale_log2, -lse_log2[i / 2 % 2]));
  }
}

// lse and delta of this thread's two rows; a row past the end has probabilities zero.
struct RowStatistics {
  float lse_log2[2], delta[2];
};
template <class Shape>
__device__ __forceinline__ RowStatistics row_statistics(const BackwardArgs<Shape>& args,
                                                        const QueryTile& tile,
                                                        const QueryRows& rows) {
  RowStatistics statistics;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int length = args.shape.query_length();
    const bool exists = rows.row[r] < length;
    const int64_t row = int64_t{tile.sequence} * length + rows.row[r];
    statistics.lse_log2[r] =
        exists ? args.lse[row * args.lse_stride + tile.head] * kLog2E : INFINITY;
    statistics.delta[r] = exists ? args.delta[row * args.delta_stride + tile.head] : 0.0f;
  }
  return statistics;
}

template <int kColumns, int kElements>
__device__ __forceinline__ void store_query_gradient(const BackwardMaps& maps,
                                                     const AttentionShape& shape,
                                                     QueryGradientShared<kColumns>& shared,
                                                     TileAt at, const float (&d_q)[kElements]) {
  const int warpgroup = consumer_index();
  const bool is_leader = threadIdx.x % kWarpgroupThreads == 0;
  char* staging = shared.d_q + warpgroup * kWarpgroupRows * kColumns * 2;
  if (is_leader) wait_stores_read<0>();  // of the tile before
  warpgroup_sync(warpgroup);
  store_accumulator<kWarpgroupRows>(d_q, shape.scale, staging, 0);
  fence_async_proxy();
  warpgroup_sync(warpgroup);
  if (is_leader) {
    store_rows<kColumns>(&maps.d_q, staging, kWarpgroupRows * kSwizzleBytes, at);
  }
}

// A part's dQ is added to that of the parts before it.
template <class Shape, int kElements>
__device__ __forceinline__ void add_query_gradient(const BackwardArgs<Shape>& args,
                                                   const QueryTile& tile, const QueryRows& rows,
                                                   const float (&d_q)[kElements]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float* row = sum_at(args.d_q_sum, args.d_q_sum_stride, args.shape, tile, rows.row[r]);
    each_pair<kElements>(r, args.shape.Q, row, [&](int i, float2* to) {
      const float2 value = args.shape.adds ? *to : float2{0.0f, 0.0f};
      *to = make_float2(fmaf(d_q[i], args.shape.scale, value.x),
                        fmaf(d_q[i + 1], args.shape.scale, value.y));
    });
  }
}

template <int kColumns, class Shape, int kElements>
__device__ __forceinline__ void finish_query_gradient(const BackwardMaps& maps,
                                                      const BackwardArgs<Shape>& args,
                                                      QueryGradientShared<kColumns>& shared,
                                                      const QueryTile& tile, const QueryRows& rows,
                                                      const float (&d_q)[kElements]) {
  if constexpr (Shape::kIsPart) {
    add_query_gradient(args, tile, rows, d_q);
  } else {
    const TileAt at{0, tile.head, rows.first_row, tile.sequence};
    store_query_gradient(maps, args.shape, shared, at, d_q);
  }
}

template <int kColumns, class Shape>
__device__ __forceinline__ void query_gradient_consumer(const BackwardMaps& maps,
                                                        const BackwardArgs<Shape>& args,
                                                        QueryGradientShared<kColumns>& shared) {
  constexpr int kPanelBytes = kTileRows * kSwizzleBytes;
  const Shape& shape = args.shape;
  const int warpgroup = consumer_index();
  const int tiles = shape.query_tiles() * shape.sequences * shape.H;
  const float scale_log2 = shape.scale * kLog2E;
  const AccumulatorLane lane = accumulator_lane();
  const int my_rows = warpgroup * kWarpgroupRows * kSwizzleBytes;
  const uint32_t q_operand = operand_k_major(shared_address(shared.q) + my_rows);
  const uint32_t d_o_operand = operand_k_major(shared_address(shared.d_o) + my_rows);
  RingPosition<kBackwardStages> ring;
  if (warpgroup == 1) give_turn(1);
  for (int round = 0, index = snake_index(0); index < tiles; index = snake_index(++round)) {
    const QueryTile tile = query_tile(shape, index);
    const QueryRows rows = query_rows(shape, tile, warpgroup);
    const RowStatistics statistics = row_statistics(args, tile, rows);
    float s[kTileRows / 2], d_p[kTileRows / 2], d_q[kColumns / 2] = {};
    uint32_t d_s[kTileRows / 4];

    wait_barrier(shared_address(&shared.q_full), round % 2);
    const auto start_scores = [&] {
      wait_barrier(shared_address(&shared.k_full[ring.stage]), ring.parity);
      wgmma_fence();
      tile_product_abt<kColumns, kTileRows>(s, q_operand,
                                            operand_k_major(shared_address(shared.k[ring.stage])));
      wgmma_commit();
    };
    pin_registers(d_q);
    take_turn(warpgroup);
    start_scores();
    for (int key = tile.first_key_tile, before = -1;; ++key) {
      const int stage = ring.stage;
      wait_barrier(shared_address(&shared.v_full[stage]), ring.parity);
      wgmma_wait<1>(d_q);  // of the key tile before
      if (before >= 0) release(&shared.k_empty[before]);
      before = stage;
      wgmma_fence();
      tile_product_abt<kColumns, kTileRows>(d_p, d_o_operand,
                                            operand_k_major(shared_address(shared.v[stage])));
      wgmma_commit();
      give_turn(warpgroup);
      wgmma_wait<1>(s);
      if (key == tile.last_key_tile || key * kTileRows < rows.latest_first) {
        mask_scores(s, key * kTileRows, rows);
      }
      scores_to_probs(s, scale_log2, statistics.lse_log2);
      wgmma_wait<0>(d_p);
      release(&shared.v_empty[stage]);
#pragma unroll
      for (int i = 0; i < kTileRows / 2; ++i) s[i] *= d_p[i] - statistics.delta[i / 2 % 2];
      pack_operand(s, d_s);
      take_turn(warpgroup);
      wgmma_fence();
      tile_product_ab<kTileRows>(d_q, d_s,
                                 operand_mn_major(shared_address(shared.k[stage]), kPanelBytes));
      wgmma_commit();
      ring.advance();
      if (key == tile.last_key_tile) break;
      start_scores();
    }
    give_turn(warpgroup);
    release(&shared.q_empty);
    wgmma_wait<0>(d_q);
    release(&shared.k_empty[(ring.stage + kBackwardStages - 1) % kBackwardStages]);

    finish_query_gradient(maps, args, shared, tile, rows, d_q);
  }
  if (threadIdx.x % kWarpgroupThreads == 0) wait_stores_read<0>();
}

template <int kColumns, class Shape>
__global__ void __launch_bounds__(kTileThreads, 1)
    attention_query_gradient_kernel(const __grid_constant__ BackwardMaps maps,
                                    const BackwardArgs<Shape> args) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<QueryGradientShared<kColumns>*>(memory);
  if (threadIdx.x == 0) {
    init_barrier(shared_address(&shared.q_full), 2);
    init_barrier(shared_address(&shared.q_empty), kConsumerWarps);
    for (int stage = 0; stage < kBackwardStages; ++stage) {
      init_barrier(shared_address(&shared.k_full[stage]), 1);
      init_barrier(shared_address(&shared.v_full[stage]), 1);
      init_barrier(shared_address(&shared.k_empty[stage]), kConsumerWarps);
      init_barrier(shared_address(&shared.v_empty[stage]), kConsumerWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroupThreads) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) query_gradient_producer<kColumns>(maps, args.shape, shared);
  } else {
    take_registers<kConsumerRegisters>();
    query_gradient_consumer<kColumns>(maps, args, shared);
  }
}

}  // namespace cambium::cuda
