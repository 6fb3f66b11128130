#include "kernels/routing_sort.h"

#include <vector>

#include "reference/chunks.h"

namespace cambium::reference {

namespace {

constexpr int64_t kSortElements = 8192;  // (token, k) pairs per chunk

// What a chunk of tokens knows before it places its rows: the first row it may use of each expert,
// and how many rows come before it in (token, k) order.
struct SortChunks {
  int64_t tokens_per_chunk = 0;
  int64_t chunks = 0;
  std::vector<int32_t> next_row_Ce;     // after the scan; counts before it
  std::vector<int32_t> ordered_base_C;  // the same
};

void count_chunk(const RoutingSortArgs& a, int64_t begin, int64_t end, SortChunks& sort) {
  const int64_t K = a.expert_index_TK[1], chunk = begin / sort.tokens_per_chunk;
  int32_t* count_e = sort.next_row_Ce.data() + chunk * a.experts;
  int32_t rows = 0;
  for (int64_t t = begin; t < end; ++t) {
    const int32_t* index = a.expert_index_TK.pointer() + t * a.expert_index_TK.row_stride;
    for (int64_t k = 0; k < K; ++k) {
      if (index[k] == -1) continue;
      CHECK(index[k] >= 0 && index[k] < a.experts);
      ++count_e[index[k]];
      ++rows;
    }
  }
  sort.ordered_base_C[chunk] = rows;
}

// Counts become first rows: experts ascending, chunks ascending within. Returns the row count.
int32_t scan_counts(const RoutingSortArgs& a, SortChunks& sort) {
  int32_t* offset_e1 = a.expert_offset_e1.pointer();
  int32_t row = 0, ordered = 0;
  for (int64_t e = 0; e < a.experts; ++e) {
    offset_e1[e] = row;
    for (int64_t chunk = 0; chunk < sort.chunks; ++chunk) {
      int32_t& next_row = sort.next_row_Ce[chunk * a.experts + e];
      const int32_t count = next_row;
      next_row = row;
      row += count;
    }
  }
  offset_e1[a.experts] = row;
  for (int32_t& base : sort.ordered_base_C) {
    const int32_t count = base;
    base = ordered;
    ordered += count;
  }
  CHECK_EQ(ordered, row);
  return row;
}

void place_chunk(const RoutingSortArgs& a, int64_t begin, int64_t end, SortChunks& sort) {
  const int64_t K = a.expert_index_TK[1], chunk = begin / sort.tokens_per_chunk;
  const int32_t* offset_e1 = a.expert_offset_e1.pointer();
  int32_t* next_row_e = sort.next_row_Ce.data() + chunk * a.experts;
  int32_t ordered = sort.ordered_base_C[chunk];
  for (int64_t t = begin; t < end; ++t) {
    const int32_t* index = a.expert_index_TK.pointer() + t * a.expert_index_TK.row_stride;
    int32_t* slot_row = a.slot_row_TK.pointer() + t * a.slot_row_TK.row_stride;
    for (int64_t k = 0; k < K; ++k) {
      const int32_t e = index[k];
      if (e == -1) {
        slot_row[k] = -1;
        continue;
      }
      int32_t row = next_row_e[e]++;
      // The one site of the injected fault `routing_order`.
      if (a.order == RoutingOrder::reversed_within_expert)
        row = offset_e1[e] + offset_e1[e + 1] - 1 - row;
      a.row_token_R.pointer()[row] = static_cast<int32_t>(t);
      a.row_slot_R.pointer()[row] = static_cast<int32_t>(t * K + k);
      a.ordered_row_R.pointer()[ordered++] = row;
      slot_row[k] = row;
    }
  }
}

}  // namespace

void routing_sort(const RoutingSortArgs& a, Workers& workers) {
  const int64_t T = a.expert_index_TK[0], K = a.expert_index_TK[1], R = a.row_token_R[0];
  SortChunks sort;
  sort.tokens_per_chunk = items_per_chunk(K, kSortElements);
  sort.chunks = chunk_count(T, sort.tokens_per_chunk);
  sort.next_row_Ce.assign(static_cast<size_t>(sort.chunks * a.experts), 0);
  sort.ordered_base_C.assign(static_cast<size_t>(sort.chunks), 0);
  for_ranges(workers, T, sort.tokens_per_chunk,
             [&](int64_t begin, int64_t end) { count_chunk(a, begin, end, sort); });
  const int32_t rows = scan_counts(a, sort);
  CHECK_LE(rows, R);
  for_ranges(workers, T, sort.tokens_per_chunk,
             [&](int64_t begin, int64_t end) { place_chunk(a, begin, end, sort); });
  for (const Out<int32_t>& list_R : {a.row_token_R, a.row_slot_R, a.ordered_row_R}) {
    std::fill(list_R.pointer() + rows, list_R.pointer() + R, -1);
  }
}

}  // namespace cambium::reference
