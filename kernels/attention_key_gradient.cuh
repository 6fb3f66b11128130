// dK and dV of attention on tensor cores: see kernels/attention_backward.cuh.
//
// One warp loads queries and d_o by TMA and their statistics by 4-byte copies, three stages deep;
// two warpgroups own 64 keys each and keep dK and dV in registers. lse and delta enter as what S^T
// and dP^T add to. Shared memory at Q = 128: K, V 32 KB each, a stage 32 KB.
#pragma once

#include "kernels/attention_backward.cuh"

namespace cambium::cuda {

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

  // What the other block of the cluster sends, over q and d_o when no product reads them any more:
  // four floats of each computing thread after four.
  __device__ char* received() { return q[0]; }
  static constexpr int kFourBytes = 16 * kConsumers * kWarpgroupThreads;
  static_assert(kColumns / 8 * kFourBytes <= 2 * kKeyStages * kStepBytes);
};

// 128 keys of one group, the heads of it that this block takes, and the query steps that see one of
// the keys, first_step .. end_step - 1. `is_own`: the first step's queries are the first keys'.
struct KeyTile {
  int sequence, group, first, first_head, heads, first_step, end_step;
  bool is_own;
};

// Longest first. Document starts never decrease, so the queries that see the tile are a range.
template <int kSplit, class Shape>
__device__ __forceinline__ KeyTile key_tile(const Shape& shape) {
  const int index = static_cast<int>(blockIdx.x) / kSplit, columns = shape.sequences * shape.G;
  KeyTile tile;
  tile.sequence = index % columns / shape.G;
  tile.group = index % columns % shape.G;
  tile.first = index / columns * kTileRows;
  tile.heads = shape.heads() / kSplit;
  tile.first_head = tile.group * shape.heads() + static_cast<int>(blockIdx.x) % kSplit * tile.heads;
  const int end = shape.end_query();
  const int first_row = min(max(shape.first_row(tile.first), shape.first_query()), end);
  tile.first_step = first_row / kStepRows;
  tile.end_step = (end + kStepRows - 1) / kStepRows;
  tile.is_own = shape.is_own(first_row, tile.first);
  int seen = tile.first_step + tile.is_own;  // its own queries always see the tile
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
template <int kColumns, class Shape>
__device__ __forceinline__ void key_gradient_producer(const BackwardMaps& maps,
                                                      const BackwardArgs<Shape>& args,
                                                      const KeyTile& tile,
                                                      KeyGradientShared<kColumns>& shared) {
  using Shared = KeyGradientShared<kColumns>;
  constexpr int kPanels = kColumns / kPanelColumns;
  const Shape& shape = args.shape;
  const int length = shape.query_length();
  const int lane = static_cast<int>(threadIdx.x);
  if (lane == 0) {
    const TileAt keys{0, tile.group, tile.first, tile.sequence};
    load_tile<kColumns>(&maps.k, &shared.keys_full, shared.k, keys);
    load_tile<kColumns>(&maps.v, &shared.keys_full, shared.v, keys);
  }
  RingPosition<kKeyStages> ring;
  for (int step = tile.first_step; step < tile.end_step; ++step) {
    for (int head = tile.first_head; head < tile.first_head + tile.heads; ++head, ring.advance()) {
      const int stage = ring.stage;
      wait_barrier(shared_address(&shared.empty[stage]), ring.parity ^ 1);
      if (lane == 0) {
        arrive_expecting(shared_address(&shared.full[stage]), 2 * Shared::kStepBytes);
        for (int panel = 0; panel < kPanels; ++panel) {
          const TileAt at{panel * kPanelColumns, head, step * kStepRows, tile.sequence};
          const int offset = panel * kStepRows * kSwizzleBytes;
          tma_load(&maps.q, &shared.full[stage], shared.q[stage] + offset, at);
          tma_load(&maps.d_o, &shared.full[stage], shared.d_o[stage] + offset, at);
        }
      }
      // NOTE: rows past the end get zeros: their probability is then 1, times a d_o of zeros.
      for (int i = lane; i < kStepRows; i += kWarpLanes) {
        const int at = step * kStepRows + i;
        const int bytes = at < length ? 4 : 0;
        const int64_t row = int64_t{tile.sequence} * length + min(at, length - 1);
        copy_4(&shared.lse[stage][i], args.lse + row * args.lse_stride + head, bytes);
        copy_4(&shared.delta[stage][i], args.delta + row * args.delta_stride + head, bytes);
        if (shape.document_start != nullptr) {
          copy_4(&shared.document_start[stage][i], shape.document_start + row, bytes);
        }
      }
      arrive_after_copies(shared_address(&shared.full[stage]));
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

// This warpgroup's 64 rows into `tile` in shared memory, where K or V lay, and from there to `map`.
// No other warpgroup reads those rows of K and V, and this one is done with them.
template <int kColumns, int kElements>
__device__ __forceinline__ void store_key_gradient(const CUtensorMap* map, const KeyTile& at,
                                                   char* tile, const float (&d)[kElements],
                                                   float factor) {
  const int warpgroup = consumer_index(), first_row = warpgroup * kWarpgroupRows;
  store_accumulator<kTileRows>(d, factor, tile, first_row);
  fence_async_proxy();
  warpgroup_sync(warpgroup);
  if (threadIdx.x % kWarpgroupThreads != 0) return;
  store_rows<kColumns>(map, tile + first_row * kSwizzleBytes, kTileRows * kSwizzleBytes,
                       {0, at.group, at.first + first_row, at.sequence});
  wait_stores_read<0>();
}

// body(i, its place) for pairs of this warpgroup's 64 rows of fp32 sums, by owner of the keys.
template <int kElements, class Shape, class Body>
__device__ __forceinline__ void for_key_sums(const Shape& shape, float* sum, int64_t stride,
                                             const KeyTile& at, Body&& body) {
  const AccumulatorLane lane = accumulator_lane();
  const int64_t row =
      shape.sum_row(at.sequence, at.first) + consumer_index() * kWarpgroupRows + lane.row;
  float* first = sum + row * stride + at.group * shape.Q + lane.column;
#pragma unroll
  for (int i = 0; i < kElements; i += 2) {
    const int column = i / 4 * 8;
    if (column < shape.Q) {
      body(i, reinterpret_cast<float2*>(first + i / 2 % 2 * 8 * stride + column));
    }
  }
}

template <int kElements, class Shape>
__device__ __forceinline__ void load_key_sums(const Shape& shape, float* sum, int64_t stride,
                                              const KeyTile& at, float (&d)[kElements]) {
  for_key_sums<kElements>(shape, sum, stride, at, [&](int i, const float2* from) {
    d[i] = from->x;
    d[i + 1] = from->y;
  });
}

template <int kElements, class Shape>
__device__ __forceinline__ void store_key_sums(const Shape& shape, float* sum, int64_t stride,
                                               const KeyTile& at, const float (&d)[kElements],
                                               float factor) {
  for_key_sums<kElements>(shape, sum, stride, at, [&](int i, float2* to) {
    *to = make_float2(d[i] * factor, d[i + 1] * factor);
  });
}

enum class KeyGradient { d_k, d_v };
template <int kColumns, KeyGradient kWhich, class Shape, int kElements>
__device__ __forceinline__ void store_one(const BackwardMaps& maps, const BackwardArgs<Shape>& args,
                                          KeyGradientShared<kColumns>& shared, const KeyTile& tile,
                                          const float (&d)[kElements]) {
  constexpr bool kKeys = kWhich == KeyGradient::d_k;
  const float factor = kKeys ? args.shape.scale : 1.0f;
  if constexpr (Shape::kIsShared) {
    store_key_sums(args.shape, kKeys ? args.d_k_sum : args.d_v_sum,
                   kKeys ? args.d_k_stride : args.d_v_stride, tile, d,
                   args.shape.is_end() ? factor : 1.0f);
  } else {
    store_key_gradient<kColumns>(kKeys ? &maps.d_k : &maps.d_v, tile, kKeys ? shared.k : shared.v,
                                 d, factor);
  }
}

template <int kColumns, int kElements>
__device__ __forceinline__ void send_sums(KeyGradientShared<kColumns>& shared, uint32_t to_rank,
                                          const float (&d)[kElements]) {
  const uint32_t mine = (threadIdx.x - kWarpgroupThreads) * 16;
  const uint32_t to = address_in_block(shared_address(shared.received()), to_rank) + mine;
#pragma unroll
  for (int i = 0; i < kElements / 4; ++i) {
    store_in_cluster(to + i * KeyGradientShared<kColumns>::kFourBytes, d + 4 * i);
  }
}

template <int kColumns, int kElements>
__device__ __forceinline__ void add_received(KeyGradientShared<kColumns>& shared,
                                             float (&d)[kElements]) {
  const char* from = shared.received() + (threadIdx.x - kWarpgroupThreads) * 16;
#pragma unroll
  for (int i = 0; i < kElements / 4; ++i) {
    const auto four =
        *reinterpret_cast<const float4*>(from + i * KeyGradientShared<kColumns>::kFourBytes);
    d[4 * i] += four.x;
    d[4 * i + 1] += four.y;
    d[4 * i + 2] += four.z;
    d[4 * i + 3] += four.w;
  }
}

// Stores dK and dV; of a cluster, block 0 adds and stores dK, block 1 dV.
template <int kColumns, int kSplit, class Shape, int kElements>
__device__ __forceinline__ void finish_key_gradients(const BackwardMaps& maps,
                                                     const BackwardArgs<Shape>& args,
                                                     KeyGradientShared<kColumns>& shared,
                                                     const KeyTile& tile, float (&d_k)[kElements],
                                                     float (&d_v)[kElements]) {
  if constexpr (kSplit == 1) {
    store_one<kColumns, KeyGradient::d_k>(maps, args, shared, tile, d_k);
    store_one<kColumns, KeyGradient::d_v>(maps, args, shared, tile, d_v);
  } else {
    cluster_sync();  // neither block reads its q and d_o any more
    const bool takes_d_k = cluster_rank() == 0;
    if (takes_d_k) {
      send_sums(shared, 1, d_v);
    } else {
      send_sums(shared, 0, d_k);
    }
    cluster_sync();
    if (takes_d_k) {
      add_received(shared, d_k);
      store_one<kColumns, KeyGradient::d_k>(maps, args, shared, tile, d_k);
    } else {
      add_received(shared, d_v);
      store_one<kColumns, KeyGradient::d_v>(maps, args, shared, tile, d_v);
    }
  }
}

template <int kElements>
__device__ __forceinline__ void scores_to_transposed_probs(float (&s)[kElements],
                                                           float scale_log2) {
#pragma unroll
  for (float& score : s) score = exp2_fast(score * scale_log2);
}

// dS^T = P^T * (dP^T - delta), as an operand.
template <int kElements>
__device__ __forceinline__ void pack_products(const float (&p)[kElements],
                                              const float (&d_p)[kElements],
                                              uint32_t (&packed)[kElements / 2]) {
#pragma unroll
  for (int i = 0; i < kElements; i += 2) {
    packed[i / 2] = pack_pair(p[i] * d_p[i], p[i + 1] * d_p[i + 1]);
  }
}

struct KeyStep {
  int stage, step;
  int first_key;  // position of this thread's first key
  bool is_first;  // of those that this warpgroup does not skip
};

// What the product S^T of a step adds to, so that S^T scale = log(P^T): minus lse, or minus
// infinity where the query does not see the key.
template <int kColumns, class Shape, int kElements>
__device__ __forceinline__ void start_scores_of_step(float (&s)[kElements], const Shape& shape,
                                                     const KeyTile& tile,
                                                     KeyGradientShared<kColumns>& shared,
                                                     const KeyStep& at) {
  const int column = accumulator_lane().column;
  start_from_columns(s, shared.lse[at.stage] + column, -1.0f / shape.scale);
  if (tile.is_own && at.is_first) {  // queries and keys are the same positions
    mask_earlier_queries(s, at.first_key - (tile.first / kStepRows + at.step) * kStepRows - column);
  }
  if (shape.document_start != nullptr) {
    mask_later_documents(s, shape.key_number(tile.sequence, at.first_key),
                         shared.document_start[at.stage] + column);
  }
}

// Stages that this warpgroup does not read.
template <int kColumns>
__device__ __forceinline__ void pass_over(KeyGradientShared<kColumns>& shared, int stages,
                                          RingPosition<kKeyStages>& ring) {
  for (int i = 0; i < stages; ++i, ring.advance()) {
    wait_barrier(shared_address(&shared.full[ring.stage]), ring.parity);
    release(&shared.empty[ring.stage]);
  }
}

template <int kColumns, int kSplit, class Shape>
__device__ __forceinline__ void key_gradient_consumer(const BackwardMaps& maps,
                                                      const BackwardArgs<Shape>& args,
                                                      const KeyTile& tile,
                                                      KeyGradientShared<kColumns>& shared) {
  constexpr int kStepPanelBytes = kStepRows * kSwizzleBytes;
  const Shape& shape = args.shape;
  const int warpgroup = consumer_index();
  const AccumulatorLane lane = accumulator_lane();
  const int my_rows = warpgroup * kWarpgroupRows * kSwizzleBytes;
  const uint32_t k_operand = operand_k_major(shared_address(shared.k) + my_rows);
  const uint32_t v_operand = operand_k_major(shared_address(shared.v) + my_rows);
  const int first_key = tile.first + warpgroup * kWarpgroupRows + lane.row;
  // The second warpgroup's keys come after every query of the first step, if it is theirs.
  const int steps = tile.end_step - tile.first_step;
  const int skipped = tile.is_own ? min(warpgroup, steps) : 0;
  float s[kStepRows / 2], d_p[kStepRows / 2], d_k[kColumns / 2] = {}, d_v[kColumns / 2] = {};
  uint32_t p[kStepRows / 4], d_s[kStepRows / 4];
  if constexpr (Shape::kIsShared && kSplit == 1) {
    if (shape.is_chain()) {
      load_key_sums(shape, args.d_k_sum, args.d_k_stride, tile, d_k);
      load_key_sums(shape, args.d_v_sum, args.d_v_stride, tile, d_v);
    }
  }
  RingPosition<kKeyStages> ring;
  int step = skipped, head = 0;
  const auto start_scores = [&] {
    wait_barrier(shared_address(&shared.full[ring.stage]), ring.parity);
    start_scores_of_step(s, shape, tile, shared, {ring.stage, step, first_key, step == skipped});
    wgmma_fence();
    tile_product_abt<kColumns, kTileRows, Start::accumulate>(
        s, k_operand, operand_k_major(shared_address(shared.q[ring.stage])));
    wgmma_commit();
  };
  wait_barrier(shared_address(&shared.keys_full), 0);
  pass_over(shared, skipped * tile.heads, ring);
  const bool has_steps = step < steps;
  pin_registers(d_k);
  pin_registers(d_v);
  if (has_steps) start_scores();
  for (int before = -1; has_steps;) {
    const int stage = ring.stage;
    wgmma_wait<1>(d_k, d_v);  // of the step before
    if (before >= 0) release(&shared.empty[before]);
    before = stage;
    start_from_columns(d_p, shared.delta[stage] + lane.column, -1.0f);
    wgmma_fence();
    tile_product_abt<kColumns, kTileRows, Start::accumulate>(
        d_p, v_operand, operand_k_major(shared_address(shared.d_o[stage])));
    wgmma_commit();
    wgmma_wait<1>(s);
    scores_to_transposed_probs(s, shape.scale * kLog2E);
    pack_operand(s, p);
    wgmma_fence();
    tile_product_ab<kStepRows>(
        d_v, p, operand_mn_major(shared_address(shared.d_o[stage]), kStepPanelBytes));
    wgmma_commit();
    wgmma_wait<1>(d_p);
    pack_products(s, d_p, d_s);
    wgmma_fence();
    tile_product_ab<kStepRows>(d_k, d_s,
                               operand_mn_major(shared_address(shared.q[stage]), kStepPanelBytes));
    wgmma_commit();
    ring.advance();
    if (++head == tile.heads) head = 0, ++step;
    if (step == steps) {
      wgmma_wait<0>(d_k, d_v);
      break;
    }
    start_scores();
  }
  finish_key_gradients<kColumns, kSplit>(maps, args, shared, tile, d_k, d_v);
}

template <int kColumns, int kSplit, class Shape>
__global__ void __launch_bounds__(kTileThreads, 1)
    attention_key_gradient_kernel(const __grid_constant__ BackwardMaps maps,
                                  const BackwardArgs<Shape> args) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<KeyGradientShared<kColumns>*>(memory);
  if (threadIdx.x == 0) {
    init_barrier(shared_address(&shared.keys_full), 2);
    for (int stage = 0; stage < kKeyStages; ++stage) {
      init_barrier(shared_address(&shared.full[stage]), 1 + kWarpLanes);
      init_barrier(shared_address(&shared.empty[stage]), kConsumerWarps);
    }
    fence_barrier_init();
  }
  const KeyTile tile = key_tile<kSplit>(args.shape);
  __syncthreads();
  if (threadIdx.x < kWarpgroupThreads) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x < kWarpLanes) key_gradient_producer<kColumns>(maps, args, tile, shared);
  } else {
    take_registers<kConsumerRegisters>();
    key_gradient_consumer<kColumns, kSplit>(maps, args, tile, shared);
  }
}

}  // namespace cambium::cuda
