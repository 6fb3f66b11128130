// Backward pass on tensor cores, without atomics: one kernel for dQ, one for dK and dV.
//
// Both compute S and dP again (7 products for the 5 of a fused kernel): every sum has one owner
// that adds in a fixed order, nothing waits for another block, no gradient is staged in fp32
// through memory, and dS stays in registers as the next product's operand.
//   dQ: 128 queries of a head against its key tiles in position order.
//   dK, dV: 128 keys of a group against (head of the group, query tile of 64), scores transposed:
//     S^T = K Q^T, dP^T = V dO^T, so that P^T and dS^T are register operands of dV += P^T dO and
//     dK += dS^T Q.
// P and dS are rounded to bf16 as operands; everything else is fp32. `delta` = d_o . o per row.
// Napkin at Q = 128: a step of 128 x 128 takes 3,072 (dQ) and 4,096 (dK, dV) cycles of tensor
// cores beside 1,024 of exp2 each.
#pragma once

#include "kernels/attention_forward.cuh"

namespace cambium::cuda {

constexpr int kBackwardStages = 2;
constexpr int kStepRows = 64;  // queries of a step of dK, dV

struct BackwardMaps {
  CUtensorMap q, d_o, k, v;   // boxes of 128 rows; q and d_o of 64 for dK, dV
  CUtensorMap d_q, d_k, d_v;  // boxes of 64 rows
};

struct BackwardArgs {
  AttentionShape shape;
  const float* lse;
  int64_t lse_stride;
  const float* delta;
  int64_t delta_stride;
};

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

template <int kColumns>
__device__ __forceinline__ void query_gradient_producer(const BackwardMaps& maps,
                                                        const AttentionShape& shape,
                                                        QueryGradientShared<kColumns>& shared) {
  const int tiles = shape.query_tiles() * shape.sequences * shape.H;
  RingPosition<kBackwardStages> ring;
  for (int round = 0, index = snake_index(0); index < tiles; index = snake_index(++round)) {
    const QueryTile tile = query_tile(shape, index);
    const int group = tile.head / shape.heads();
    barrier_wait(&shared.q_empty, round % 2 ^ 1);
    const TileAt query{0, tile.head, tile.first, tile.sequence};
    load_tile<kColumns>(&maps.q, &shared.q_full, shared.q, query);
    load_tile<kColumns>(&maps.d_o, &shared.q_full, shared.d_o, query);
    for (int key = tile.first_key_tile; key <= tile.last_key_tile; ++key, ring.advance()) {
      const TileAt at{0, group, key * kTileRows, tile.sequence};
      barrier_wait(&shared.k_empty[ring.stage], ring.parity ^ 1);
      load_tile<kColumns>(&maps.k, &shared.k_full[ring.stage], shared.k[ring.stage], at);
      barrier_wait(&shared.v_empty[ring.stage], ring.parity ^ 1);
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

// A warpgroup's 64 rows from `staging` into `map`; the caller has written them.
template <int kColumns>
__device__ __forceinline__ void store_rows(const CUtensorMap* map, const char* staging,
                                           int panel_bytes, TileAt at) {
  for (int panel = 0; panel < kColumns / kPanelColumns; ++panel) {
    tma_store(map, staging + panel * panel_bytes,
              {panel * kPanelColumns, at.head, at.position, at.sequence});
  }
  tma_store_commit();
}

template <int kColumns>
__device__ __forceinline__ void query_gradient_consumer(const BackwardMaps& maps,
                                                        const BackwardArgs& args,
                                                        QueryGradientShared<kColumns>& shared) {
  constexpr int kPanelBytes = kTileRows * kSwizzleRowBytes;
  const AttentionShape& shape = args.shape;
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroupThreads - 1;
  const bool is_leader = threadIdx.x % kWarpgroupThreads == 0;
  const int tiles = shape.query_tiles() * shape.sequences * shape.H;
  const float scale_log2 = shape.scale * kLog2E;
  const AccumulatorLane lane = accumulator_lane();
  const int my_rows = warpgroup * kWarpgroupRows * kSwizzleRowBytes;
  const uint64_t q_operand = operand_k_major(shared_address(shared.q) + my_rows);
  const uint64_t d_o_operand = operand_k_major(shared_address(shared.d_o) + my_rows);
  RingPosition<kBackwardStages> ring;
  for (int round = 0, index = snake_index(0); index < tiles; index = snake_index(++round)) {
    const QueryTile tile = query_tile(shape, index);
    const int first = tile.first + warpgroup * kWarpgroupRows;
    const int position[2] = {first + lane.row, first + lane.row + 8};
    int first_seen[2];
    float lse_log2[2], delta[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool exists = position[r] < shape.S;
      const int64_t row = int64_t{tile.sequence} * shape.S + position[r];
      lse_log2[r] = exists ? args.lse[row * args.lse_stride + tile.head] * kLog2E : INFINITY;
      delta[r] = exists ? args.delta[row * args.delta_stride + tile.head] : 0.0f;
      first_seen[r] = shape.first_key(tile.sequence, position[r]);
    }
    const int latest_first =
        shape.first_key(tile.sequence, min(first + kWarpgroupRows, shape.S) - 1);
    float s[kTileRows / 2], d_p[kTileRows / 2], d_q[kColumns / 2] = {};
    uint32_t d_s[kTileRows / 4];

    barrier_wait(&shared.q_full, round % 2);
    for (int key = tile.first_key_tile; key <= tile.last_key_tile; ++key) {
      const uint32_t k_tile = shared_address(shared.k[ring.stage]);
      barrier_wait(&shared.k_full[ring.stage], ring.parity);
      wgmma_fence();
      tile_product_abt<kColumns, kTileRows>(s, q_operand, operand_k_major(k_tile));
      wgmma_commit();
      wgmma_wait<1>(d_q);  // of the key tile before
      if (key != tile.first_key_tile) {
        release(&shared.k_empty[(ring.stage + kBackwardStages - 1) % kBackwardStages]);
      }
      barrier_wait(&shared.v_full[ring.stage], ring.parity);
      tile_product_abt<kColumns, kTileRows>(d_p, d_o_operand,
                                            operand_k_major(shared_address(shared.v[ring.stage])));
      wgmma_commit();
      wgmma_wait<1>(s);
      if (key == tile.last_key_tile || key * kTileRows < latest_first) {
        mask_scores(s, key * kTileRows, position, first_seen);
      }
      scores_to_probs(s, scale_log2, lse_log2);
      wgmma_wait<0>(d_p);
      release(&shared.v_empty[ring.stage]);
#pragma unroll
      for (int i = 0; i < kTileRows / 2; ++i) s[i] *= d_p[i] - delta[i / 2 % 2];
      pack_operand(s, d_s);
      wgmma_fence();
      tile_product_ab<kTileRows>(d_q, d_s, operand_mn_major(k_tile, kPanelBytes));
      wgmma_commit();
      ring.advance();
    }
    release(&shared.q_empty);
    wgmma_wait<0>(d_q);
    release(&shared.k_empty[(ring.stage + kBackwardStages - 1) % kBackwardStages]);

    char* staging = shared.d_q + warpgroup * kWarpgroupRows * kColumns * 2;
    if (is_leader) tma_store_wait_read();  // of the tile before
    warpgroup_sync(warpgroup);
    store_accumulator<kWarpgroupRows>(d_q, shape.scale, staging, 0);
    fence_async_proxy();
    warpgroup_sync(warpgroup);
    if (is_leader) {
      store_rows<kColumns>(&maps.d_q, staging, kWarpgroupRows * kSwizzleRowBytes,
                           {0, tile.head, first, tile.sequence});
    }
  }
  if (is_leader) tma_store_wait_read();
}

template <int kColumns>
__global__ void __launch_bounds__(kTileThreads, 1)
    attention_query_gradient_kernel(const __grid_constant__ BackwardMaps maps,
                                    const BackwardArgs args) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<QueryGradientShared<kColumns>*>(memory);
  if (threadIdx.x == 0) {
    barrier_init(&shared.q_full, 2);
    barrier_init(&shared.q_empty, kConsumerWarps);
    for (int stage = 0; stage < kBackwardStages; ++stage) {
      barrier_init(&shared.k_full[stage], 1);
      barrier_init(&shared.v_full[stage], 1);
      barrier_init(&shared.k_empty[stage], kConsumerWarps);
      barrier_init(&shared.v_empty[stage], kConsumerWarps);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroupThreads) {
    lower_registers<kProducerRegisters>();
    if (threadIdx.x == 0) query_gradient_producer<kColumns>(maps, args.shape, shared);
  } else {
    raise_registers<kConsumerRegisters>();
    query_gradient_consumer<kColumns>(maps, args, shared);
  }
}

// ---- dK and dV -------------------------------------------------------------------------------

constexpr int kKeyStages = 2;

template <int kColumns>
struct KeyGradientShared {
  static constexpr int kTileBytes = kTileRows * kColumns * 2;
  static constexpr int kStepBytes = kStepRows * kColumns * 2;
  char k[kTileBytes];  // later dK
  char v[kTileBytes];  // later dV
  char q[kKeyStages][kStepBytes];
  char d_o[kKeyStages][kStepBytes];
  float lse_log2[kKeyStages][kStepRows];
  float delta[kKeyStages][kStepRows];
  int first_seen[kKeyStages][kStepRows];
  uint64_t keys_full;
  uint64_t full[kKeyStages], empty[kKeyStages];
};

// 128 keys of one group and the query steps that see one of them, first_step .. end_step - 1.
struct KeyTile {
  int sequence, group, first, first_step, end_step;
};

// Longest first. Document starts never decrease, so the queries that see the tile are a range.
__device__ __forceinline__ KeyTile key_tile(const AttentionShape& shape) {
  const int columns = shape.sequences * shape.G, column = blockIdx.x % columns;
  KeyTile tile;
  tile.sequence = column / shape.G;
  tile.group = column % shape.G;
  tile.first = static_cast<int>(blockIdx.x) / columns * kTileRows;
  tile.first_step = tile.first / kStepRows;
  tile.end_step = (shape.S + kStepRows - 1) / kStepRows;
  int seen = tile.first_step + 1;  // the first step always sees the tile
  while (shape.document_start != nullptr && seen < tile.end_step) {
    const int middle = (seen + tile.end_step) / 2;
    if (shape.first_key(tile.sequence, middle * kStepRows) < tile.first + kTileRows) {
      seen = middle + 1;
    } else {
      tile.end_step = middle;
    }
  }
  return tile;
}

// The whole warp: lane 0 starts the copies, all lanes bring lse, delta and document starts.
template <int kColumns>
__device__ __forceinline__ void key_gradient_producer(const BackwardMaps& maps,
                                                      const BackwardArgs& args, const KeyTile& tile,
                                                      KeyGradientShared<kColumns>& shared) {
  using Shared = KeyGradientShared<kColumns>;
  constexpr int kPanels = kColumns / kPanelColumns;
  const AttentionShape& shape = args.shape;
  const int lane = static_cast<int>(threadIdx.x);
  if (lane == 0) {
    const TileAt keys{0, tile.group, tile.first, tile.sequence};
    load_tile<kColumns>(&maps.k, &shared.keys_full, shared.k, keys);
    load_tile<kColumns>(&maps.v, &shared.keys_full, shared.v, keys);
  }
  RingPosition<kKeyStages> ring;
  for (int head = tile.group * shape.heads(); head < (tile.group + 1) * shape.heads(); ++head) {
    for (int step = tile.first_step; step < tile.end_step; ++step, ring.advance()) {
      const int stage = ring.stage;
      barrier_wait(&shared.empty[stage], ring.parity ^ 1);
      if (lane == 0) {
        barrier_expect(&shared.full[stage], 2 * Shared::kStepBytes);
        for (int panel = 0; panel < kPanels; ++panel) {
          const TileAt at{panel * kPanelColumns, head, step * kStepRows, tile.sequence};
          const int offset = panel * kStepRows * kSwizzleRowBytes;
          tma_load(&maps.q, &shared.full[stage], shared.q[stage] + offset, at);
          tma_load(&maps.d_o, &shared.full[stage], shared.d_o[stage] + offset, at);
        }
      }
      for (int i = lane; i < kStepRows; i += kWarpLanes) {
        const int position = step * kStepRows + i;
        const bool exists = position < shape.S;
        const int64_t row = int64_t{tile.sequence} * shape.S + position;
        shared.lse_log2[stage][i] =
            exists ? args.lse[row * args.lse_stride + head] * kLog2E : INFINITY;
        shared.delta[stage][i] = exists ? args.delta[row * args.delta_stride + head] : 0.0f;
        shared.first_seen[stage][i] = shape.first_key(tile.sequence, position);
      }
      barrier_arrive(&shared.full[stage]);
    }
  }
}

// s = P^T: this thread's rows are keys, its columns queries.
template <int kElements>
__device__ __forceinline__ void transposed_probs(float (&s)[kElements], float scale_log2,
                                                 const float* lse_log2) {
#pragma unroll
  for (int i = 0; i < kElements; i += 4) {
    const float2 lse = *reinterpret_cast<const float2*>(lse_log2 + i * 2);
    s[i] = exp2_fast(fmaf(s[i], scale_log2, -lse.x));
    s[i + 1] = exp2_fast(fmaf(s[i + 1], scale_log2, -lse.y));
    s[i + 2] = exp2_fast(fmaf(s[i + 2], scale_log2, -lse.x));
    s[i + 3] = exp2_fast(fmaf(s[i + 3], scale_log2, -lse.y));
  }
}

// Zero where query `first_query + column` comes before the key or its document begins after it.
template <int kElements>
__device__ __forceinline__ void mask_transposed(float (&s)[kElements], int first_key,
                                                int first_query, const int* first_seen) {
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const int column = i / 4 * 8 + i % 2, key = first_key + i / 2 % 2 * 8;
    if ((first_query + column < key) | (first_seen[column] > key)) s[i] = 0.0f;
  }
}

// s = dS^T = P^T * (dP^T - delta)
template <int kElements>
__device__ __forceinline__ void transposed_score_gradient(float (&s)[kElements],
                                                          const float (&d_p)[kElements],
                                                          const float* delta) {
#pragma unroll
  for (int i = 0; i < kElements; i += 4) {
    const float2 d = *reinterpret_cast<const float2*>(delta + i * 2);
    s[i] *= d_p[i] - d.x;
    s[i + 1] *= d_p[i + 1] - d.y;
    s[i + 2] *= d_p[i + 2] - d.x;
    s[i + 3] *= d_p[i + 3] - d.y;
  }
}

template <int kColumns>
__device__ __forceinline__ void key_gradient_consumer(const BackwardMaps& maps,
                                                      const BackwardArgs& args, const KeyTile& tile,
                                                      KeyGradientShared<kColumns>& shared) {
  constexpr int kStepPanelBytes = kStepRows * kSwizzleRowBytes;
  constexpr int kPanelBytes = kTileRows * kSwizzleRowBytes;
  const AttentionShape& shape = args.shape;
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroupThreads - 1;
  const float scale_log2 = shape.scale * kLog2E;
  const AccumulatorLane lane = accumulator_lane();
  const int my_rows = warpgroup * kWarpgroupRows * kSwizzleRowBytes;
  const uint64_t k_operand = operand_k_major(shared_address(shared.k) + my_rows);
  const uint64_t v_operand = operand_k_major(shared_address(shared.v) + my_rows);
  const int first_key = tile.first + warpgroup * kWarpgroupRows + lane.row;
  // The second warpgroup's keys come after every query of the first step.
  const int skipped = warpgroup;
  const int steps = tile.end_step - tile.first_step;
  float s[kStepRows / 2], d_p[kStepRows / 2], d_k[kColumns / 2] = {}, d_v[kColumns / 2] = {};
  uint32_t p[kStepRows / 4], d_s[kStepRows / 4];
  RingPosition<kKeyStages> ring;
  barrier_wait(&shared.keys_full, 0);
  for (int head = 0; head < shape.heads(); ++head) {
    for (int step = 0; step < steps; ++step, ring.advance()) {
      const int stage = ring.stage;
      barrier_wait(&shared.full[stage], ring.parity);
      if (step < skipped) {
        release(&shared.empty[stage]);
        continue;
      }
      const uint32_t q_step = shared_address(shared.q[stage]);
      const uint32_t d_o_step = shared_address(shared.d_o[stage]);
      wgmma_fence();
      tile_product_abt<kColumns, kTileRows>(s, k_operand, operand_k_major(q_step));
      wgmma_commit();
      tile_product_abt<kColumns, kTileRows>(d_p, v_operand, operand_k_major(d_o_step));
      wgmma_commit();
      wgmma_wait<1>(s);
      transposed_probs(s, scale_log2, shared.lse_log2[stage] + lane.column);
      if (step == skipped || shape.document_start != nullptr) {
        mask_transposed(s, first_key, (tile.first_step + step) * kStepRows + lane.column,
                        shared.first_seen[stage] + lane.column);
      }
      pack_operand(s, p);
      wgmma_fence();
      tile_product_ab<kStepRows>(d_v, p, operand_mn_major(d_o_step, kStepPanelBytes));
      wgmma_commit();
      wgmma_wait<1>(d_p);
      transposed_score_gradient(s, d_p, shared.delta[stage] + lane.column);
      pack_operand(s, d_s);
      wgmma_fence();
      tile_product_ab<kStepRows>(d_k, d_s, operand_mn_major(q_step, kStepPanelBytes));
      wgmma_commit();
      wgmma_wait<0>(d_k, d_v);
      release(&shared.empty[stage]);
    }
  }
  // This warpgroup's rows of K and V are read by it alone, and no more.
  store_accumulator<kTileRows>(d_k, shape.scale, shared.k, warpgroup * kWarpgroupRows);
  store_accumulator<kTileRows>(d_v, 1.0f, shared.v, warpgroup * kWarpgroupRows);
  fence_async_proxy();
  warpgroup_sync(warpgroup);
  if (threadIdx.x % kWarpgroupThreads != 0) return;
  const TileAt at{0, tile.group, tile.first + warpgroup * kWarpgroupRows, tile.sequence};
  store_rows<kColumns>(&maps.d_k, shared.k + my_rows, kPanelBytes, at);
  store_rows<kColumns>(&maps.d_v, shared.v + my_rows, kPanelBytes, at);
  tma_store_wait_read();
}

template <int kColumns>
__global__ void __launch_bounds__(kTileThreads, 1)
    attention_key_gradient_kernel(const __grid_constant__ BackwardMaps maps,
                                  const BackwardArgs args) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<KeyGradientShared<kColumns>*>(memory);
  if (threadIdx.x == 0) {
    barrier_init(&shared.keys_full, 2);
    for (int stage = 0; stage < kKeyStages; ++stage) {
      barrier_init(&shared.full[stage], 1 + kWarpLanes);
      barrier_init(&shared.empty[stage], kConsumerWarps);
    }
    barrier_init_fence();
  }
  const KeyTile tile = key_tile(args.shape);
  __syncthreads();
  if (threadIdx.x < kWarpgroupThreads) {
    lower_registers<kProducerRegisters>();
    if (threadIdx.x < kWarpLanes) key_gradient_producer<kColumns>(maps, args, tile, shared);
  } else {
    raise_registers<kConsumerRegisters>();
    key_gradient_consumer<kColumns>(maps, args, tile, shared);
  }
}

// ---- delta -----------------------------------------------------------------------------------

constexpr int kDeltaThreads = 256;
constexpr int kDeltaLanes = 16;  // of one row, 8 columns each at a time

struct DeltaArgs {
  const __nv_bfloat16 *o, *d_o;
  int64_t o_stride, d_o_stride, rows;  // rows: tokens * heads
  int H, Q;
  float* delta;
  int64_t delta_stride;
};

__global__ void __launch_bounds__(kDeltaThreads) attention_delta_kernel(const DeltaArgs a) {
  const int64_t row = (int64_t{blockIdx.x} * kDeltaThreads + threadIdx.x) / kDeltaLanes;
  const int lane = static_cast<int>(threadIdx.x) % kDeltaLanes;
  const bool exists = row < a.rows;
  const int64_t token = row / a.H, head = row % a.H;
  float sum = 0.0f;
  for (int column = lane * 8; exists && column < a.Q; column += kDeltaLanes * 8) {
    const auto o = *reinterpret_cast<const uint4*>(a.o + token * a.o_stride + head * a.Q + column);
    const auto d_o =
        *reinterpret_cast<const uint4*>(a.d_o + token * a.d_o_stride + head * a.Q + column);
    const auto* left = reinterpret_cast<const __nv_bfloat162*>(&o);
    const auto* right = reinterpret_cast<const __nv_bfloat162*>(&d_o);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = __bfloat1622float2(left[i]), y = __bfloat1622float2(right[i]);
      sum = fmaf(x.x, y.x, sum);
      sum = fmaf(x.y, y.y, sum);
    }
  }
  for (int step = kDeltaLanes / 2; step > 0; step /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, step);
  }
  if (exists && lane == 0) a.delta[token * a.delta_stride + head] = sum;
}

}  // namespace cambium::cuda
