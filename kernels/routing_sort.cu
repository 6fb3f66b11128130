// Routing sort on the GPU: one kernel, a block an expert, nothing shared between blocks.
//
// Block e reads all choices twice. First it counts how many go to experts below e and to e, which
// gives its first row; then it walks them in order and places its own by block-wide prefix sums, so
// that positions are ranks, never atomics (D1). Choices come from the L2 cache.
// Napkin: at T K = 131,072 and 128 experts 1 MB of L2 reads a block, about 20 us.
#include "kernels/routing_sort.h"

#include "kernels/block_scan.cuh"

namespace cambium::cuda {

namespace {

constexpr int kPerThread = 4;                     // consecutive choices
constexpr int kTile = kScanThreads * kPerThread;  // 4,096: both counts of a tile fit 16 bits

struct RoutingSort {
  Rows<const int32_t> expert_index_TK;
  int32_t* expert_offset_e1;
  int32_t *row_token_R, *row_slot_R, *ordered_row_R;
  Rows<int32_t> slot_row_TK;
  int experts, K, R;
  int slots;     // T K
  bool is_flat;  // rows follow each other, 16-byte aligned
  bool is_reversed;
};

// The choices of this thread in the tile that starts at `first`; -1 past the end.
__device__ __forceinline__ void load_choices(const RoutingSort& a, int first,
                                             int (&expert)[kPerThread]) {
  const int begin = first + threadIdx.x * kPerThread;
  if (a.is_flat && begin + kPerThread <= a.slots) {
    const int4 four = *reinterpret_cast<const int4*>(a.expert_index_TK.data + begin);
    expert[0] = four.x, expert[1] = four.y, expert[2] = four.z, expert[3] = four.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int slot = begin + i;
    expert[i] = slot < a.slots ? a.expert_index_TK.row(slot / a.K)[slot % a.K] : -1;
  }
}

// Writes this thread's choices of the expert; `mine` and `present` count the rows of the expert and
// of all experts before them.
__device__ __forceinline__ void place_choices(const RoutingSort& a, int first, int begin, int count,
                                              const int (&expert)[kPerThread], int mine,
                                              int present) {
  const int e = static_cast<int>(blockIdx.x);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int slot = first + threadIdx.x * kPerThread + i;
    if (expert[i] == e) {
      // The one site of the injected fault `routing_order`.
      const int row = begin + (a.is_reversed ? count - 1 - mine : mine);
      a.row_token_R[row] = slot / a.K;
      a.row_slot_R[row] = slot;
      a.ordered_row_R[present] = row;
      a.slot_row_TK.row(slot / a.K)[slot % a.K] = row;
      ++mine;
    }
    if (expert[i] == -1 && e == 0 && slot < a.slots) {
      a.slot_row_TK.row(slot / a.K)[slot % a.K] = -1;
    }
    present += expert[i] >= 0 ? 1 : 0;
  }
}

__global__ void __launch_bounds__(kScanThreads) routing_sort_kernel(const RoutingSort a) {
  const int e = static_cast<int>(blockIdx.x);
  int below = 0, equal = 0, all = 0, expert[kPerThread], next[kPerThread];
#pragma unroll 4
  for (int first = 0; first < a.slots; first += kTile) {
    load_choices(a, first, expert);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      device_check(expert[i] >= -1 && expert[i] < a.experts);
      below += expert[i] >= 0 && expert[i] < e ? 1 : 0;
      equal += expert[i] == e ? 1 : 0;
      all += expert[i] >= 0 ? 1 : 0;
    }
  }
  const int begin = block_total(below), count = block_total(equal), rows = block_total(all);
  device_check(rows <= a.R);
  if (threadIdx.x == 0) {
    a.expert_offset_e1[e] = begin;
    if (e == a.experts - 1) a.expert_offset_e1[a.experts] = rows;
  }
  int mine = 0, present = 0;  // before the tile
  load_choices(a, 0, next);
  for (int first = 0; first < a.slots; first += kTile) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) expert[i] = next[i];
    load_choices(a, first + kTile, next);  // on its way while this tile is ranked
    int own = 0, there = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      own += expert[i] == e ? 1 : 0;
      there += expert[i] >= 0 ? 1 : 0;
    }
    int total;
    const int before = block_prefix(own | there << 16, total);
    place_choices(a, first, begin, count, expert, mine + (before & 0xffff),
                  present + (before >> 16));
    mine += total & 0xffff;
    present += total >> 16;
  }
  const int64_t step = int64_t{gridDim.x} * kScanThreads;
  for (int64_t r = rows + int64_t{blockIdx.x} * kScanThreads + threadIdx.x; r < a.R; r += step) {
    a.row_token_R[r] = a.row_slot_R[r] = a.ordered_row_R[r] = -1;
  }
}

}  // namespace

void routing_sort(const RoutingSortArgs& args, Stream& stream) {
  CHECK_LT(args.row_token_R[0], int64_t{INT_MAX});
  const RoutingSort a{.expert_index_TK = rows_of<const int32_t>(args.expert_index_TK),
                      .expert_offset_e1 = args.expert_offset_e1.pointer(),
                      .row_token_R = args.row_token_R.pointer(),
                      .row_slot_R = args.row_slot_R.pointer(),
                      .ordered_row_R = args.ordered_row_R.pointer(),
                      .slot_row_TK = rows_of<int32_t>(args.slot_row_TK),
                      .experts = static_cast<int>(args.experts),
                      .K = static_cast<int>(args.expert_index_TK[1]),
                      .R = static_cast<int>(args.row_token_R[0]),
                      .slots = static_cast<int>(args.expert_index_TK.elements()),
                      .is_flat = args.expert_index_TK.is_contiguous() &&
                                 reinterpret_cast<uintptr_t>(args.expert_index_TK.data) % 16 == 0,
                      .is_reversed = args.order == RoutingOrder::reversed_within_expert};
  launch("routing_sort", routing_sort_kernel, {.blocks = args.experts, .threads = kScanThreads},
         stream, a);
}

}  // namespace cambium::cuda
