// Forward pass on tensor cores (FlashAttention-3, arXiv 2407.08608): a persistent kernel of one
// loading warp and two computing warpgroups of 64 queries each.
//
// While a warpgroup's products S(j+1) = Q K^T and O += P(j) V run, it folds... the other one's
// softmax runs: named barriers let the two take turns at the tensor cores. A query's key tiles are
// folded from its own position backwards, so that the first tile gives every row a finite maximum.
// P is rounded to bf16 as an operand; its sum is not. Scores, O and the softmax state are fp32.
// Napkin at Q = 128: a step of 128 x 128 takes 2,048 cycles of tensor cores and 1,024 of exp2, and
// reads 64 KB through L2. Shared memory: Q, O and two stages of K and V, 32 KB each.
#pragma once

#include "kernels/attention_tiles.cuh"

namespace cambium::cuda {

constexpr int kForwardStages = 2;

struct ForwardMaps {
  CUtensorMap q, k, v, o;
};

template <class Shape>
struct ForwardArgs {
  Shape shape;
  float* lse;  // of a part: of the parts so far, as o_sum
  int64_t lse_stride;
  float* o_sum;
  int64_t o_sum_stride;
};

template <int kColumns>
struct ForwardShared {
  static constexpr int kTileBytes = kTileRows * kColumns * 2;
  static constexpr int kPanelBytes = kTileRows * kSwizzleBytes;
  char q[kTileBytes];
  char k[kForwardStages][kTileBytes];
  char v[kForwardStages][kTileBytes];
  char o[kTileBytes];  // each warpgroup's 64 rows as a tile of their own
  uint64_t q_full, q_empty;
  uint64_t k_full[kForwardStages], k_empty[kForwardStages];
  uint64_t v_full[kForwardStages], v_empty[kForwardStages];
};

// Softmax state of this thread's two rows; `sum` is of this thread's columns.
struct RowSoftmax {
  float largest[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};
};

// Scores become probabilities relative to the largest score so far; `rescale` is what earlier sums
// are worth under it. A row may see no key yet where a part is not its own.
template <bool kMayBeEmpty, int kElements>
__device__ __forceinline__ void fold_scores(float (&s)[kElements], float scale_log2,
                                            RowSoftmax& state, float (&rescale)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float most[2] = {state.largest[r], -INFINITY};
#pragma unroll
    for (int i = 2 * r; i < kElements; i += 4) {
      most[0] = fmaxf(most[0], s[i]);
      most[1] = fmaxf(most[1], s[i + 1]);
    }
    float largest = fmaxf(most[0], most[1]);
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
    const float base = kMayBeEmpty && largest == -INFINITY ? 0.0f : largest;
    rescale[r] = exp2_fast((state.largest[r] - base) * scale_log2);
    const float shift = base * scale_log2;
    state.largest[r] = largest;
    float sum[2] = {state.sum[r] * rescale[r], 0.0f};
#pragma unroll
    for (int i = 2 * r; i < kElements; i += 4) {
      s[i] = exp2_fast(fmaf(s[i], scale_log2, -shift));
      s[i + 1] = exp2_fast(fmaf(s[i + 1], scale_log2, -shift));
      sum[0] += s[i];
      sum[1] += s[i + 1];
    }
    state.sum[r] = sum[0] + sum[1];
  }
}

// Minus infinity where a key is later than the row's query or before its document.
// `first_key` is the tile's.
template <int kElements>
__device__ __forceinline__ void mask_scores(float (&s)[kElements], int first_key,
                                            const QueryRows& rows) {
  const int key = first_key + accumulator_lane().column;
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const int at = key + i / 4 * 8 + i % 2, r = i / 2 % 2;
    if ((at > rows.last_seen[r]) | (at < rows.first_seen[r])) s[i] = -INFINITY;
  }
}

template <int kElements>
__device__ __forceinline__ void pack_operand(const float (&s)[kElements],
                                             uint32_t (&packed)[kElements / 2]) {
#pragma unroll
  for (int i = 0; i < kElements / 2; ++i) packed[i] = pack_pair(s[2 * i], s[2 * i + 1]);
}

// A whole tile of 128 rows into shared memory.
template <int kColumns>
__device__ __forceinline__ void load_tile(const CUtensorMap* map, uint64_t* full, char* to,
                                          TileAt at) {
  arrive_expecting(shared_address(full), ForwardShared<kColumns>::kTileBytes);
#pragma unroll
  for (int panel = 0; panel < kColumns / kPanelColumns; ++panel) {
    tma_load(map, full, to + panel * ForwardShared<kColumns>::kPanelBytes,
             {at.column + panel * kPanelColumns, at.head, at.position, at.sequence});
  }
}

template <int kColumns, class Shape>
__device__ __forceinline__ void forward_producer(const ForwardMaps& maps, const Shape& shape,
                                                 ForwardShared<kColumns>& shared) {
  const int tiles = shape.query_tiles() * shape.sequences * shape.H;
  RingPosition<kForwardStages> ring;
  for (int round = 0, index = snake_index(0); index < tiles; index = snake_index(++round)) {
    const QueryTile tile = query_tile(shape, index);
    const int group = tile.head / shape.heads();
    wait_barrier(shared_address(&shared.q_empty), round % 2 ^ 1);
    load_tile<kColumns>(&maps.q, &shared.q_full, shared.q, {0, tile.head, tile.row, tile.sequence});
    for (int key = tile.last_key_tile; key >= tile.first_key_tile; --key, ring.advance()) {
      const TileAt at{0, group, key * kTileRows, tile.sequence};
      wait_barrier(shared_address(&shared.k_empty[ring.stage]), ring.parity ^ 1);
      load_tile<kColumns>(&maps.k, &shared.k_full[ring.stage], shared.k[ring.stage], at);
      wait_barrier(shared_address(&shared.v_empty[ring.stage]), ring.parity ^ 1);
      load_tile<kColumns>(&maps.v, &shared.v_full[ring.stage], shared.v[ring.stage], at);
    }
  }
}

// One arrival for this warp.
__device__ __forceinline__ void release(uint64_t* empty) {
  if (threadIdx.x % kWarpLanes == 0) arrive(shared_address(empty));
}

// Named barriers: 1, 2 give the tensor cores to a warpgroup, 3, 4 are a warpgroup's own.
__device__ __forceinline__ void take_turn(int warpgroup) {
  named_barrier_sync(1 + warpgroup, kConsumers * kWarpgroupThreads);
}
__device__ __forceinline__ void give_turn(int warpgroup) {
  named_barrier_arrive(2 - warpgroup, kConsumers * kWarpgroupThreads);
}
__device__ __forceinline__ void warpgroup_sync(int warpgroup) {
  named_barrier_sync(3 + warpgroup, kWarpgroupThreads);
}

// o / sum as bf16 through shared memory, and lse = largest + log(sum).
template <int kColumns, class Shape, int kElements>
__device__ __forceinline__ void store_output(const ForwardMaps& maps,
                                             const ForwardArgs<Shape>& args,
                                             ForwardShared<kColumns>& shared, const QueryTile& tile,
                                             int warpgroup, RowSoftmax& state,
                                             float (&o)[kElements]) {
  const bool is_leader = threadIdx.x % kWarpgroupThreads == 0;
  const int first = tile.row + warpgroup * kWarpgroupRows, length = args.shape.query_length();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = state.sum[r];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
#pragma unroll
    for (int i = 2 * r; i < kElements; i += 4) {
      o[i] = __fdiv_rn(o[i], sum);
      o[i + 1] = __fdiv_rn(o[i + 1], sum);
    }
    const AccumulatorLane lane = accumulator_lane();
    const int at = first + lane.row + 8 * r;
    if (lane.column == 0 && at < length) {
      const int64_t row = int64_t{tile.sequence} * length + at;
      args.lse[row * args.lse_stride + tile.head] = state.largest[r] * args.shape.scale + logf(sum);
    }
  }
  char* staging = shared.o + warpgroup * kWarpgroupRows * kColumns * 2;
  if (is_leader) wait_stores_read<0>();  // of the tile before
  warpgroup_sync(warpgroup);
  store_accumulator<kWarpgroupRows>(o, 1.0f, staging, 0);
  fence_async_proxy();
  warpgroup_sync(warpgroup);
  if (!is_leader) return;
  for (int panel = 0; panel < kColumns / kPanelColumns; ++panel) {
    tma_store(&maps.o, staging + panel * kWarpgroupRows * kSwizzleBytes,
              {panel * kPanelColumns, tile.head, first, tile.sequence});
  }
  commit_stores();
}

// A part's output and log-sum-exp meet those of the parts before it.
template <class Shape, int kElements>
__device__ __forceinline__ void add_output(const ForwardArgs<Shape>& args, const QueryTile& tile,
                                           const QueryRows& rows, const RowSoftmax& state,
                                           const float (&o)[kElements]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = state.sum[r];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    const int64_t token = int64_t{tile.sequence} * args.shape.S + rows.row[r];
    float* lse = args.lse + token * args.lse_stride + tile.head;
    const float part = sum > 0.0f ? state.largest[r] * args.shape.scale + logf(sum) : -INFINITY;
    const MergedLse merged(args.shape.adds ? *lse : -INFINITY, part);
    const float factor = sum > 0.0f ? merged.part / sum : 0.0f;
    __syncwarp();  // every lane has read what one of them writes
    if (accumulator_lane().column == 0) *lse = merged.lse;
    float* row = sum_at(args.o_sum, args.o_sum_stride, args.shape, tile, rows.row[r]);
    each_pair<kElements>(r, args.shape.Q, row, [&](int i, float2* to) {
      float2 value = args.shape.adds ? *to : float2{0.0f, 0.0f};
      value.x = fmaf(o[i], factor, value.x * merged.before);
      value.y = fmaf(o[i + 1], factor, value.y * merged.before);
      *to = value;
    });
  }
}

template <int kColumns, class Shape, int kElements>
__device__ __forceinline__ void finish_output(const ForwardMaps& maps,
                                              const ForwardArgs<Shape>& args,
                                              ForwardShared<kColumns>& shared,
                                              const QueryTile& tile, const QueryRows& rows,
                                              RowSoftmax& state, float (&o)[kElements]) {
  if constexpr (Shape::kIsPart) {
    add_output(args, tile, rows, state, o);
  } else {
    store_output(maps, args, shared, tile, consumer_index(), state, o);
  }
}

template <int kColumns, class Shape>
__device__ __forceinline__ void forward_consumer(const ForwardMaps& maps,
                                                 const ForwardArgs<Shape>& args,
                                                 ForwardShared<kColumns>& shared) {
  using Shared = ForwardShared<kColumns>;
  const Shape& shape = args.shape;
  const int warpgroup = consumer_index();
  const int tiles = shape.query_tiles() * shape.sequences * shape.H;
  const float scale_log2 = shape.scale * kLog2E;
  const uint32_t q_operand =
      operand_k_major(shared_address(shared.q) + warpgroup * kWarpgroupRows * kSwizzleBytes);
  RingPosition<kForwardStages> k_ring, v_ring;
  if (warpgroup == 1) give_turn(1);
  for (int round = 0, index = snake_index(0); index < tiles; index = snake_index(++round)) {
    const QueryTile tile = query_tile(shape, index);
    const QueryRows rows = query_rows(shape, tile, warpgroup);
    RowSoftmax state;
    float rescale[2];
    float s[kTileRows / 2], o[kColumns / 2] = {};
    uint32_t p[kTileRows / 4];

    const auto start_scores = [&] {
      tile_product_abt<kColumns, kTileRows>(
          s, q_operand, operand_k_major(shared_address(shared.k[k_ring.stage])));
      wgmma_commit();
    };
    const auto start_output = [&] {
      tile_product_ab<kTileRows>(
          o, p, operand_mn_major(shared_address(shared.v[v_ring.stage]), Shared::kPanelBytes));
      wgmma_commit();
    };

    wait_barrier(shared_address(&shared.q_full), round % 2);
    wait_barrier(shared_address(&shared.k_full[k_ring.stage]), k_ring.parity);
    wgmma_fence();
    start_scores();
    wgmma_wait<0>(s);
    release(&shared.k_empty[k_ring.stage]);
    k_ring.advance();
    mask_scores(s, tile.last_key_tile * kTileRows, rows);
    fold_scores<Shape::kIsPart>(s, scale_log2, state, rescale);
    pack_operand(s, p);
    for (int key = tile.last_key_tile - 1; key >= tile.first_key_tile; --key) {
      wait_barrier(shared_address(&shared.k_full[k_ring.stage]), k_ring.parity);
      take_turn(warpgroup);
      wgmma_fence();
      start_scores();
      wait_barrier(shared_address(&shared.v_full[v_ring.stage]), v_ring.parity);
      start_output();
      give_turn(warpgroup);
      wgmma_wait<1>(s);
      release(&shared.k_empty[k_ring.stage]);
      k_ring.advance();
      if (key * kTileRows < rows.latest_first) mask_scores(s, key * kTileRows, rows);
      fold_scores<Shape::kIsPart>(s, scale_log2, state, rescale);
      wgmma_wait<0>(o);
      release(&shared.v_empty[v_ring.stage]);
      v_ring.advance();
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) o[i] *= rescale[i / 2 % 2];
      pack_operand(s, p);
    }
    release(&shared.q_empty);
    wait_barrier(shared_address(&shared.v_full[v_ring.stage]), v_ring.parity);
    wgmma_fence();
    start_output();
    wgmma_wait<0>(o);
    release(&shared.v_empty[v_ring.stage]);
    v_ring.advance();
    finish_output(maps, args, shared, tile, rows, state, o);
  }
  if (threadIdx.x % kWarpgroupThreads == 0) wait_stores_read<0>();
}

template <int kColumns, class Shape>
__global__ void __launch_bounds__(kTileThreads, 1)
    attention_forward_kernel(const __grid_constant__ ForwardMaps maps,
                             const ForwardArgs<Shape> args) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<ForwardShared<kColumns>*>(memory);
  if (threadIdx.x == 0) {
    init_barrier(shared_address(&shared.q_full), 1);
    init_barrier(shared_address(&shared.q_empty), kConsumerWarps);
    for (int stage = 0; stage < kForwardStages; ++stage) {
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
    if (threadIdx.x == 0) forward_producer<kColumns>(maps, args.shape, shared);
  } else {
    take_registers<kConsumerRegisters>();
    forward_consumer<kColumns>(maps, args, shared);
  }
}

}  // namespace cambium::cuda
