// Dispatch plan on the GPU: one kernel, a block a destination rank, nothing shared between blocks.
//
// Block p reads all choices twice, a thread a token. First it counts the entries and rows of the
// ranks below p and of p, which gives its first entry and row; then it walks the tokens in order
// and places its own by block-wide prefix sums, so that positions are ranks, never atomics (D1).
#include "kernels/dispatch_plan.h"

#include "kernels/block_scan.cuh"

namespace cambium::cuda {

namespace {

struct DispatchPlan {
  Rows<const int32_t> expert_index_TK;
  Rows<const float> weight_TK;
  Rows<int32_t> send_count_P2;
  int32_t* send_token_M;
  Rows<int32_t> send_expert_MK;
  Rows<float> send_weight_MK;
  Rows<int32_t> return_row_TK, token_part_TP;
  int T_count, K, ranks, experts_per_rank, M;
};

// What all tokens send to ranks below this block's, to this block's, and anywhere.
struct PlanCounts {
  int below_entries = 0, below_rows = 0, own_entries = 0, own_rows = 0, all_entries = 0;
};

// Adds one token's sends; its destinations are bits, 64 ranks at a time, so each counts once.
__device__ __forceinline__ void count_token(const DispatchPlan& a, int64_t t, PlanCounts& counts) {
  const int p = static_cast<int>(blockIdx.x);
  const int32_t* index = a.expert_index_TK.row(t);
  for (int first = 0; first < a.ranks; first += 64) {
    uint64_t ranks = 0;
    for (int k = 0; k < a.K; ++k) {
      device_check(index[k] >= 0 && index[k] < a.ranks * a.experts_per_rank);
      const int rank = index[k] / a.experts_per_rank;
      if (rank < first || rank >= first + 64) continue;
      ranks |= uint64_t{1} << (rank - first);
      counts.below_rows += rank < p ? 1 : 0;
      counts.own_rows += rank == p ? 1 : 0;
    }
    const int below = min(max(p - first, 0), 64);  // ranks of this word below p
    const uint64_t below_mask = below == 64 ? ~uint64_t{0} : (uint64_t{1} << below) - 1;
    counts.below_entries += __popcll(ranks & below_mask);
    counts.own_entries += below < 64 && p >= first ? static_cast<int>(ranks >> below & 1) : 0;
    counts.all_entries += __popcll(ranks);
  }
}

// Writes the token's entry, of which `rows` choices come here; `row` is the first one's number.
__device__ __forceinline__ void place_token(const DispatchPlan& a, int64_t t, int rows, int entry,
                                            int row) {
  const int p = static_cast<int>(blockIdx.x);
  a.token_part_TP.row(t)[p] = rows > 0 ? entry : -1;
  if (rows == 0) return;
  const int32_t* index = a.expert_index_TK.row(t);
  a.send_token_M[entry] = static_cast<int32_t>(t);
  for (int k = 0; k < a.K; ++k) {
    const bool is_here = index[k] / a.experts_per_rank == p;
    a.send_expert_MK.row(entry)[k] = is_here ? index[k] % a.experts_per_rank : -1;
    a.send_weight_MK.row(entry)[k] = is_here ? a.weight_TK.row(t)[k] : 0.0f;
    if (is_here) a.return_row_TK.row(t)[k] = row++;
  }
}

__device__ __forceinline__ void clear_entries(const DispatchPlan& a, int used) {
  const int step = static_cast<int>(gridDim.x) * kScanThreads;
  const int first = used + static_cast<int>(blockIdx.x) * kScanThreads + threadIdx.x;
  for (int entry = first; entry < a.M; entry += step) {
    a.send_token_M[entry] = -1;
    for (int k = 0; k < a.K; ++k) {
      a.send_expert_MK.row(entry)[k] = -1;
      a.send_weight_MK.row(entry)[k] = 0.0f;
    }
  }
}

__global__ void __launch_bounds__(kScanThreads) dispatch_plan_kernel(const DispatchPlan a) {
  const int p = static_cast<int>(blockIdx.x);
  PlanCounts counts;
  for (int t = threadIdx.x; t < a.T_count; t += kScanThreads) count_token(a, t, counts);
  int entry = block_total(counts.below_entries), row = block_total(counts.below_rows);
  const int entries = block_total(counts.own_entries), rows = block_total(counts.own_rows);
  const int used = block_total(counts.all_entries);
  if (threadIdx.x == 0) {
    a.send_count_P2.row(p)[0] = entries;
    a.send_count_P2.row(p)[1] = rows;
  }
  for (int first = 0; first < a.T_count; first += kScanThreads) {
    const int t = first + threadIdx.x;
    int own = 0;
    for (int k = 0; k < a.K && t < a.T_count; ++k) {
      own += a.expert_index_TK.row(t)[k] / a.experts_per_rank == p ? 1 : 0;
    }
    int tile_entries, tile_rows;
    const int entries_before = block_prefix(own > 0 ? 1 : 0, tile_entries);
    const int rows_before = block_prefix(own, tile_rows);
    if (t < a.T_count) place_token(a, t, own, entry + entries_before, row + rows_before);
    entry += tile_entries;
    row += tile_rows;
  }
  clear_entries(a, used);
}

}  // namespace

void dispatch_plan(const DispatchPlanArgs& args, Stream& stream) {
  CHECK_LT(args.send_token_M[0], int64_t{INT_MAX});
  const DispatchPlan a{.expert_index_TK = rows_of<const int32_t>(args.expert_index_TK),
                       .weight_TK = rows_of<const float>(args.weight_TK),
                       .send_count_P2 = rows_of<int32_t>(args.send_count_P2),
                       .send_token_M = args.send_token_M.pointer(),
                       .send_expert_MK = rows_of<int32_t>(args.send_expert_MK),
                       .send_weight_MK = rows_of<float>(args.send_weight_MK),
                       .return_row_TK = rows_of<int32_t>(args.return_row_TK),
                       .token_part_TP = rows_of<int32_t>(args.token_part_TP),
                       .T_count = static_cast<int>(args.expert_index_TK[0]),
                       .K = static_cast<int>(args.expert_index_TK[1]),
                       .ranks = static_cast<int>(args.ranks),
                       .experts_per_rank = static_cast<int>(args.experts_per_rank),
                       .M = static_cast<int>(args.send_token_M[0])};
  launch("dispatch_plan", dispatch_plan_kernel, {.blocks = args.ranks, .threads = kScanThreads},
         stream, a);
}

}  // namespace cambium::cuda
