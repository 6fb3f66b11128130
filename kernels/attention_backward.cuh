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

// lse and delta of this thread's two rows; a row past the end has probabilities zero.
struct RowStatistics {
  float lse_log2[2], delta[2];
};
__device__ __forceinline__ RowStatistics row_statistics(const BackwardArgs& args,
                                                        const QueryTile& tile,
                                                        const QueryRows& rows) {
  RowStatistics statistics;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool exists = rows.position[r] < args.shape.S;
    const int64_t row = int64_t{tile.sequence} * args.shape.S + rows.position[r];
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
  if (is_leader) tma_store_wait_read();  // of the tile before
  warpgroup_sync(warpgroup);
  store_accumulator<kWarpgroupRows>(d_q, shape.scale, staging, 0);
  fence_async_proxy();
  warpgroup_sync(warpgroup);
  if (is_leader) {
    store_rows<kColumns>(&maps.d_q, staging, kWarpgroupRows * kSwizzleRowBytes, at);
  }
}

template <int kColumns>
__device__ __forceinline__ void query_gradient_consumer(const BackwardMaps& maps,
                                                        const BackwardArgs& args,
                                                        QueryGradientShared<kColumns>& shared) {
  constexpr int kPanelBytes = kTileRows * kSwizzleRowBytes;
  const AttentionShape& shape = args.shape;
  const int warpgroup = consumer_index();
  const int tiles = shape.query_tiles() * shape.sequences * shape.H;
  const float scale_log2 = shape.scale * kLog2E;
  const AccumulatorLane lane = accumulator_lane();
  const int my_rows = warpgroup * kWarpgroupRows * kSwizzleRowBytes;
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

    barrier_wait(&shared.q_full, round % 2);
    const auto start_scores = [&] {
      barrier_wait(&shared.k_full[ring.stage], ring.parity);
      wgmma_fence();
      tile_product_abt<kColumns, kTileRows>(s, q_operand,
                                            operand_k_major(shared_address(shared.k[ring.stage])));
      wgmma_commit();
    };
    pin_accumulator(d_q);
    take_turn(warpgroup);
    start_scores();
    for (int key = tile.first_key_tile, before = -1;; ++key) {
      const int stage = ring.stage;
      barrier_wait(&shared.v_full[stage], ring.parity);
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

    store_query_gradient(maps, shape, shared, {0, tile.head, rows.first, tile.sequence}, d_q);
  }
  if (threadIdx.x % kWarpgroupThreads == 0) tma_store_wait_read();
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

constexpr int kKeyStages = 3;

template <int kColumns>
struct KeyGradientShared {
  static constexpr int kTileBytes = kTileRows * kColumns * 2;
  static constexpr int kStepBytes = kStepRows * kColumns * 2;
  char k[kTileBytes];  // later dK
  char v[kTileBytes];  // later dV
  char q[kKeyStages][kStepBytes];
  char d_o[kKeyStages][kStepBytes];
  float lse[kKeyStages][kStepRows];
  float delta[kKeyStages][kStepRows];
  int document_start[kKeyStages][kStepRows];
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
      // NOTE: rows past the end get zeros: their probability is then 1, times a d_o of zeros.
      for (int i = lane; i < kStepRows; i += kWarpLanes) {
        const int position = step * kStepRows + i;
        const int bytes = position < shape.S ? 4 : 0;
        const int64_t row = int64_t{tile.sequence} * shape.S + min(position, shape.S - 1);
        copy_4(&shared.lse[stage][i], args.lse + row * args.lse_stride + head, bytes);
        copy_4(&shared.delta[stage][i], args.delta + row * args.delta_stride + head, bytes);
        if (shape.document_start != nullptr) {
          copy_4(&shared.document_start[stage][i], shape.document_start + row, bytes);
        }
      }
      arrive_after_copies(&shared.full[stage]);
    }
  }
}

// d = factor * value of this thread's columns in every row: what a product then adds to.
template <int kElements>
__device__ __forceinline__ void start_from_columns(float (&d)[kElements], const float* value,
                                                   float factor) {
#pragma unroll
  for (int i = 0; i < kElements; i += 4) {
    const float2 pair = *reinterpret_cast<const float2*>(value + i * 2);
    d[i] = d[i + 2] = pair.x * factor;
    d[i + 1] = d[i + 3] = pair.y * factor;
  }
}

// Minus infinity where the query comes before the key: `lead` = key - query at this thread's first
// element.
template <int kElements>
__device__ __forceinline__ void mask_earlier_queries(float (&s)[kElements], int lead) {
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    if (i / 4 * 8 + i % 2 - i / 2 % 2 * 8 < lead) s[i] = -INFINITY;
  }
}

// Minus infinity where the query's document begins after the key; both are rows of the micro-batch.
template <int kElements>
__device__ __forceinline__ void mask_later_documents(float (&s)[kElements], int key_row,
                                                     const int* document_start) {
#pragma unroll
  for (int i = 0; i < kElements; i += 4) {
    const int2 start = *reinterpret_cast<const int2*>(document_start + i * 2);
    if (start.x > key_row) s[i] = -INFINITY;
    if (start.y > key_row) s[i + 1] = -INFINITY;
    if (start.x > key_row + 8) s[i + 2] = -INFINITY;
    if (start.y > key_row + 8) s[i + 3] = -INFINITY;
  }
}

// Over K and V in shared memory: this warpgroup's rows of them are read by it alone, and no more.
template <int kColumns, int kElements>
__device__ __forceinline__ void store_key_gradients(
    const BackwardMaps& maps, const AttentionShape& shape, KeyGradientShared<kColumns>& shared,
    const KeyTile& tile, const float (&d_k)[kElements], const float (&d_v)[kElements]) {
  constexpr int kPanelBytes = kTileRows * kSwizzleRowBytes;
  const int warpgroup = consumer_index();
  const int first_row = warpgroup * kWarpgroupRows, offset = first_row * kSwizzleRowBytes;
  store_accumulator<kTileRows>(d_k, shape.scale, shared.k, first_row);
  store_accumulator<kTileRows>(d_v, 1.0f, shared.v, first_row);
  fence_async_proxy();
  warpgroup_sync(warpgroup);
  if (threadIdx.x % kWarpgroupThreads != 0) return;
  const TileAt at{0, tile.group, tile.first + first_row, tile.sequence};
  store_rows<kColumns>(&maps.d_k, shared.k + offset, kPanelBytes, at);
  store_rows<kColumns>(&maps.d_v, shared.v + offset, kPanelBytes, at);
  tma_store_wait_read();
}

template <int kColumns>
__device__ __forceinline__ void key_gradient_consumer(const BackwardMaps& maps,
                                                      const BackwardArgs& args, const KeyTile& tile,
                                                      KeyGradientShared<kColumns>& shared) {
  constexpr int kStepPanelBytes = kStepRows * kSwizzleRowBytes;
  const AttentionShape& shape = args.shape;
  const int warpgroup = consumer_index();
  const float scale_log2 = shape.scale * kLog2E;
  const AccumulatorLane lane = accumulator_lane();
  const int my_rows = warpgroup * kWarpgroupRows * kSwizzleRowBytes;
  const uint32_t k_operand = operand_k_major(shared_address(shared.k) + my_rows);
  const uint32_t v_operand = operand_k_major(shared_address(shared.v) + my_rows);
  const int first_key = tile.first + warpgroup * kWarpgroupRows + lane.row;
  // The second warpgroup's keys come after every query of the first step.
  const int skipped = warpgroup, steps = tile.end_step - tile.first_step;
  float s[kStepRows / 2], d_p[kStepRows / 2], d_k[kColumns / 2] = {}, d_v[kColumns / 2] = {};
  uint32_t p[kStepRows / 4], d_s[kStepRows / 4];
  RingPosition<kKeyStages> ring;
  int step = 0, head = 0;
  const auto skip = [&] {
    for (; head < shape.heads() && step < skipped; ring.advance()) {
      barrier_wait(&shared.full[ring.stage], ring.parity);
      release(&shared.empty[ring.stage]);
      if (++step == steps) step = 0, ++head;
    }
  };
  const auto start_scores = [&] {
    barrier_wait(&shared.full[ring.stage], ring.parity);
    start_from_columns(s, shared.lse[ring.stage] + lane.column, -1.0f / shape.scale);
    if (step == skipped) {
      mask_earlier_queries(s, first_key - (tile.first_step + step) * kStepRows - lane.column);
    }
    if (shape.document_start != nullptr) {
      mask_later_documents(s, tile.sequence * shape.S + first_key,
                           shared.document_start[ring.stage] + lane.column);
    }
    wgmma_fence();
    tile_product_abt<kColumns, kTileRows, Start::accumulate>(
        s, k_operand, operand_k_major(shared_address(shared.q[ring.stage])));
    wgmma_commit();
  };
  barrier_wait(&shared.keys_full, 0);
  skip();
  const bool has_steps = head < shape.heads();
  pin_accumulator(d_k);
  pin_accumulator(d_v);
  if (has_steps) start_scores();
  for (int before = -1; has_steps;) {
    const int stage = ring.stage;
    const uint32_t d_o_step = shared_address(shared.d_o[stage]);
    wgmma_wait<1>(d_k, d_v);  // of the step before
    if (before >= 0) release(&shared.empty[before]);
    before = stage;
    start_from_columns(d_p, shared.delta[stage] + lane.column, -1.0f);
    wgmma_fence();
    tile_product_abt<kColumns, kTileRows, Start::accumulate>(d_p, v_operand,
                                                             operand_k_major(d_o_step));
    wgmma_commit();
    wgmma_wait<1>(s);
#pragma unroll
    for (float& score : s) score = exp2_fast(score * scale_log2);
    pack_operand(s, p);
    wgmma_fence();
    tile_product_ab<kStepRows>(d_v, p, operand_mn_major(d_o_step, kStepPanelBytes));
    wgmma_commit();
    wgmma_wait<1>(d_p);
#pragma unroll
    for (int i = 0; i < kStepRows / 2; ++i) s[i] *= d_p[i];
    pack_operand(s, d_s);
    wgmma_fence();
    tile_product_ab<kStepRows>(d_k, d_s,
                               operand_mn_major(shared_address(shared.q[stage]), kStepPanelBytes));
    wgmma_commit();
    ring.advance();
    if (++step == steps) step = 0, ++head;
    skip();
    if (head == shape.heads()) {
      wgmma_wait<0>(d_k, d_v);
      break;
    }
    start_scores();
  }
  store_key_gradients(maps, shape, shared, tile, d_k, d_v);
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
