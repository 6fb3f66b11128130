// Routing sort on the GPU: a counting sort in two kernels, over the same chunks of choices.
//
// The first counts each chunk's choices by expert. In the second a block adds up the counts of the
// chunks before its own, which gives the rows where its choices begin, and walks its chunk a choice
// a thread: ranks within a warp come from the lanes of equal choice, those across warps from
// prefix sums. Positions are ranks, never atomics (D1).
// Napkin: at T K = 131,072 and 128 experts 128 chunks, whose counts every block reads: 8 MB of the
// L2's, 5 us.
#include "kernels/routing_sort.h"

#include "kernels/block_scan.cuh"

namespace cambium::cuda {

namespace {

constexpr int kTile = kScanThreads;  // choices, one a thread
constexpr int kMostChunks = 256;
constexpr int kMostExperts = 1024;  // whose counts by warp fit shared memory

struct RoutingSort {
  Rows<const int32_t> expert_index_TK;
  int32_t* expert_offset_e1;
  int32_t *row_token_R, *row_slot_R, *ordered_row_R;
  Rows<int32_t> slot_row_TK;
  int32_t* count_CE;  // of each chunk by expert, then of all its experts: E + 1 columns
  int experts, K, R;
  int slots;  // T K
  int chunks, chunk_slots;
  bool is_reversed;

  // The expert of a slot; -1: absent, or beyond the chunk's end.
  __device__ __forceinline__ int choice(int slot, int end) const {
    if (slot >= end) return -1;
    const int expert = expert_index_TK.row(slot / K)[slot % K];
    device_check(expert >= -1 && expert < experts);
    return expert;
  }
  __device__ __forceinline__ int first_slot() const {
    return static_cast<int>(blockIdx.x) * chunk_slots;
  }
  __device__ __forceinline__ int end_slot() const {
    return static_cast<int>(min(int64_t{first_slot()} + chunk_slots, int64_t{slots}));
  }
};

__global__ void __launch_bounds__(kScanThreads) routing_count_kernel(const RoutingSort a) {
  extern __shared__ int32_t count_E[];
  for (int e = threadIdx.x; e <= a.experts; e += kScanThreads) count_E[e] = 0;
  __syncthreads();
  const int end = a.end_slot();
  for (int first = a.first_slot(); first < end; first += kTile) {
    const int expert = a.choice(first + static_cast<int>(threadIdx.x), end);
    if (expert >= 0) atomicAdd(&count_E[expert], 1);  // tidy: allow float-atomics: integers
    const unsigned there = __ballot_sync(kAllLanes, expert >= 0);
    if (threadIdx.x % kWarpLanes != 0) continue;
    atomicAdd(&count_E[a.experts], __popc(there));  // tidy: allow float-atomics: integers
  }
  __syncthreads();
  int32_t* to = a.count_CE + int64_t{blockIdx.x} * (a.experts + 1);
  for (int e = threadIdx.x; e <= a.experts; e += kScanThreads) to[e] = count_E[e];
}

// Shared memory of the second kernel; column E stands for all experts together.
struct RoutingShared {
  int32_t *before, *total, *begin;  // [E + 1]: choices before the tile, all, first row
  int32_t* of_warp;                 // [warps, E + 1]: choices before the warp's

  __device__ RoutingShared(int32_t* memory, int columns)
      : before(memory),
        total(memory + columns),
        begin(memory + 2 * columns),
        of_warp(memory + 3 * columns) {}
  static int64_t bytes(int columns) { return int64_t{4} * (3 + kWarpLanes) * columns; }
};

// Counts before this chunk and of all chunks; first rows by a prefix sum over the experts.
__device__ __forceinline__ void begin_chunk(const RoutingSort& a, const RoutingShared& s) {
  const int columns = a.experts + 1, chunk = static_cast<int>(blockIdx.x);
  int first = 0;
  for (int base = 0; base < columns; base += kScanThreads) {
    const int e = base + static_cast<int>(threadIdx.x);
    int before = 0, total = 0;
#pragma unroll 8
    for (int c = 0; c < a.chunks && e < columns; ++c) {
      const int count = a.count_CE[int64_t{c} * columns + e];
      before += c < chunk ? count : 0;
      total += count;
    }
    int all;
    const int begin = first + block_prefix(e < a.experts ? total : 0, all);
    first += all;
    if (e >= columns) continue;
    s.before[e] = before;
    s.total[e] = total;
    s.begin[e] = begin;
    if (chunk == 0) a.expert_offset_e1[e] = begin;
  }
  __syncthreads();
}

// A tile's choices before each warp's, by expert; `before` moves on to the next tile.
__device__ __forceinline__ void count_warps(const RoutingShared& s, int columns, int expert,
                                            unsigned same, unsigned there) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  for (int i = threadIdx.x; i < kWarpLanes * columns; i += kScanThreads) s.of_warp[i] = 0;
  __syncthreads();
  if (expert >= 0 && lane == __ffs(same) - 1) s.of_warp[warp * columns + expert] = __popc(same);
  if (lane == 0) s.of_warp[warp * columns + columns - 1] = __popc(there);
  __syncthreads();
  for (int e = threadIdx.x; e < columns; e += kScanThreads) {
    int sum = s.before[e];
#pragma unroll 8
    for (int w = 0; w < kWarpLanes; ++w) {
      const int count = s.of_warp[w * columns + e];
      s.of_warp[w * columns + e] = sum;
      sum += count;
    }
    s.before[e] = sum;
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kScanThreads) routing_place_kernel(const RoutingSort a) {
  extern __shared__ int32_t memory[];
  const int columns = a.experts + 1, end = a.end_slot();
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const unsigned below = (1u << threadIdx.x % kWarpLanes) - 1;
  const RoutingShared s(memory, columns);
  begin_chunk(a, s);
  for (int first = a.first_slot(); first < end; first += kTile) {
    const int slot = first + static_cast<int>(threadIdx.x), expert = a.choice(slot, end);
    const unsigned same = __match_any_sync(kAllLanes, expert);
    const unsigned there = __ballot_sync(kAllLanes, expert >= 0);
    count_warps(s, columns, expert, same, there);
    if (expert >= 0) {
      const int mine = s.of_warp[warp * columns + expert] + __popc(same & below);
      // The one site of the injected fault `routing_order`.
      const int row = s.begin[expert] + (a.is_reversed ? s.total[expert] - 1 - mine : mine);
      const int present = s.of_warp[warp * columns + a.experts] + __popc(there & below);
      a.row_token_R[row] = slot / a.K;
      a.row_slot_R[row] = slot;
      a.ordered_row_R[present] = row;
      a.slot_row_TK.row(slot / a.K)[slot % a.K] = row;
    } else if (slot < end) {
      a.slot_row_TK.row(slot / a.K)[slot % a.K] = -1;
    }
    __syncthreads();  // the counts were read
  }
  const int rows = s.total[a.experts];
  device_check(rows <= a.R);
  const int64_t step = int64_t{gridDim.x} * kScanThreads;
  for (int64_t r = rows + int64_t{blockIdx.x} * kScanThreads + threadIdx.x; r < a.R; r += step) {
    a.row_token_R[r] = a.row_slot_R[r] = a.ordered_row_R[r] = -1;
  }
}

}  // namespace

void routing_sort(const RoutingSortArgs& args, Stream& stream) {
  CHECK_LT(args.row_token_R[0], int64_t{INT_MAX});
  CHECK_LE(args.experts, int64_t{kMostExperts});
  RoutingSort a{.expert_index_TK = rows_of<const int32_t>(args.expert_index_TK),
                .expert_offset_e1 = args.expert_offset_e1.pointer(),
                .row_token_R = args.row_token_R.pointer(),
                .row_slot_R = args.row_slot_R.pointer(),
                .ordered_row_R = args.ordered_row_R.pointer(),
                .slot_row_TK = rows_of<int32_t>(args.slot_row_TK),
                .experts = static_cast<int>(args.experts),
                .K = static_cast<int>(args.expert_index_TK[1]),
                .R = static_cast<int>(args.row_token_R[0]),
                .slots = static_cast<int>(args.expert_index_TK.elements()),
                .is_reversed = args.order == RoutingOrder::reversed_within_expert};
  const int64_t tiles = std::max<int64_t>(1, blocks_for(a.slots, kTile));
  a.chunk_slots = static_cast<int>(kTile * blocks_for(tiles, kMostChunks));
  a.chunks = static_cast<int>(std::max<int64_t>(1, blocks_for(a.slots, a.chunk_slots)));
  const int columns = a.experts + 1;
  const StreamScratch counts(int64_t{4} * a.chunks * columns, stream);
  a.count_CE = counts.as<int32_t>();
  launch("routing_sort", routing_count_kernel,
         {.blocks = a.chunks, .threads = kScanThreads, .shared_bytes = int64_t{4} * columns},
         stream, a);
  launch(
      "routing_sort", routing_place_kernel,
      {.blocks = a.chunks, .threads = kScanThreads, .shared_bytes = RoutingShared::bytes(columns)},
      stream, a);
}

}  // namespace cambium::cuda
