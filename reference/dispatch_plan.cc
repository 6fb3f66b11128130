#include "kernels/dispatch_plan.h"

#include <vector>

#include "reference/chunks.h"

namespace cambium::reference {

namespace {

constexpr int64_t kPlanElements = 8192;  // (token, k) pairs per chunk

// Where an expert lives, by its global number: a division per expert, not per choice.
struct ExpertHome {
  int32_t rank = 0;
  int32_t local = 0;
};

struct PlanChunks {
  std::vector<ExpertHome> home_E;
  int64_t tokens_per_chunk = 0;
  int64_t chunks = 0;
  std::vector<int32_t> entry_CP;  // next entry per destination after the scan; counts before it
  std::vector<int32_t> row_CP;    // next returned row per destination, the same
};

PlanChunks make_chunks(const DispatchPlanArgs& a) {
  PlanChunks plan;
  plan.home_E.reserve(static_cast<size_t>(a.ranks * a.experts_per_rank));
  for (int32_t rank = 0; rank < a.ranks; ++rank) {
    for (int32_t local = 0; local < a.experts_per_rank; ++local)
      plan.home_E.push_back({rank, local});
  }
  plan.tokens_per_chunk = items_per_chunk(a.expert_index_TK[1], kPlanElements);
  plan.chunks = chunk_count(a.expert_index_TK[0], plan.tokens_per_chunk);
  plan.entry_CP.assign(static_cast<size_t>(plan.chunks * a.ranks), 0);
  plan.row_CP.assign(static_cast<size_t>(plan.chunks * a.ranks), 0);
  return plan;
}

// Counts entries and rows; token_part_TP marks the destinations of each token (0, else -1).
void count_chunk(const DispatchPlanArgs& a, int64_t begin, int64_t end, PlanChunks& plan) {
  const int64_t K = a.expert_index_TK[1], P = a.ranks, chunk = begin / plan.tokens_per_chunk;
  const auto experts = static_cast<int32_t>(plan.home_E.size());
  int32_t* entry_P = plan.entry_CP.data() + chunk * P;
  int32_t* row_P = plan.row_CP.data() + chunk * P;
  for (int64_t t = begin; t < end; ++t) {
    const int32_t* index = a.expert_index_TK.pointer() + t * a.expert_index_TK.row_stride;
    int32_t* part_P = a.token_part_TP.pointer() + t * a.token_part_TP.row_stride;
    std::fill_n(part_P, P, -1);
    for (int64_t k = 0; k < K; ++k) {
      CHECK(index[k] >= 0 && index[k] < experts);
      const int32_t rank = plan.home_E[index[k]].rank;
      entry_P[rank] += part_P[rank] == -1 ? 1 : 0;
      part_P[rank] = 0;
      ++row_P[rank];
    }
  }
}

// Counts become first positions: destinations ascending, chunks ascending within. Returns the
// number of entries.
int32_t scan_counts(const DispatchPlanArgs& a, PlanChunks& plan) {
  int32_t entry = 0, row = 0;
  for (int64_t rank = 0; rank < a.ranks; ++rank) {
    const int32_t first_entry = entry, first_row = row;
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      int32_t& next_entry = plan.entry_CP[chunk * a.ranks + rank];
      int32_t& next_row = plan.row_CP[chunk * a.ranks + rank];
      const int32_t entries = next_entry, rows = next_row;
      next_entry = entry;
      next_row = row;
      entry += entries;
      row += rows;
    }
    int32_t* send_count = a.send_count_P2.pointer() + rank * a.send_count_P2.row_stride;
    send_count[0] = entry - first_entry;
    send_count[1] = row - first_row;
  }
  CHECK_EQ(int64_t{row}, a.expert_index_TK.elements());
  CHECK_LE(int64_t{entry}, a.send_token_M[0]);
  return entry;
}

void clear_entry(const DispatchPlanArgs& a, int64_t entry) {
  const int64_t K = a.expert_index_TK[1];
  std::fill_n(a.send_expert_MK.pointer() + entry * a.send_expert_MK.row_stride, K, -1);
  std::fill_n(a.send_weight_MK.pointer() + entry * a.send_weight_MK.row_stride, K, 0.0f);
}

void place_chunk(const DispatchPlanArgs& a, int64_t begin, int64_t end, PlanChunks& plan) {
  const int64_t K = a.expert_index_TK[1], P = a.ranks, chunk = begin / plan.tokens_per_chunk;
  int32_t* entry_P = plan.entry_CP.data() + chunk * P;
  int32_t* row_P = plan.row_CP.data() + chunk * P;
  for (int64_t t = begin; t < end; ++t) {
    const int32_t* index = a.expert_index_TK.pointer() + t * a.expert_index_TK.row_stride;
    const float* weight = a.weight_TK.pointer() + t * a.weight_TK.row_stride;
    int32_t* part_P = a.token_part_TP.pointer() + t * a.token_part_TP.row_stride;
    int32_t* return_row = a.return_row_TK.pointer() + t * a.return_row_TK.row_stride;
    for (int64_t rank = 0; rank < P; ++rank) {
      if (part_P[rank] == -1) continue;
      part_P[rank] = entry_P[rank]++;
      a.send_token_M.pointer()[part_P[rank]] = static_cast<int32_t>(t);
      clear_entry(a, part_P[rank]);
    }
    for (int64_t k = 0; k < K; ++k) {
      const ExpertHome home = plan.home_E[index[k]];
      const int64_t entry = part_P[home.rank];
      a.send_expert_MK.pointer()[entry * a.send_expert_MK.row_stride + k] = home.local;
      a.send_weight_MK.pointer()[entry * a.send_weight_MK.row_stride + k] = weight[k];
      return_row[k] = row_P[home.rank]++;
    }
  }
}

}  // namespace

void dispatch_plan(const DispatchPlanArgs& a, Workers& workers) {
  const int64_t T = a.expert_index_TK[0], M = a.send_token_M[0];
  PlanChunks plan = make_chunks(a);
  for_ranges(workers, T, plan.tokens_per_chunk,
             [&](int64_t begin, int64_t end) { count_chunk(a, begin, end, plan); });
  const int32_t entries = scan_counts(a, plan);
  for_ranges(workers, T, plan.tokens_per_chunk,
             [&](int64_t begin, int64_t end) { place_chunk(a, begin, end, plan); });
  for (int64_t entry = entries; entry < M; ++entry) {
    a.send_token_M.pointer()[entry] = -1;
    clear_entry(a, entry);
  }
}

}  // namespace cambium::reference
