// Embedding on the CPU: gathered rows, and a weight gradient that walks token ids.
#include "kernels/embedding.h"

#include <algorithm>
#include <vector>

#include "reference/lane_math.h"
#include "reference/node_fold.h"
#include "reference/rounding.h"

namespace cambium::reference {
namespace {

// The rows of each token id in position order: a stable counting sort.
struct RowsById {
  std::vector<int32_t> first_V;  // V + 1 offsets into row
  std::vector<int32_t> row;
};

RowsById sort_by_id(const int32_t* token_T, int64_t begin, int64_t end, int64_t V) {
  RowsById sorted;
  sorted.first_V.assign(static_cast<size_t>(V + 1), 0);
  sorted.row.resize(static_cast<size_t>(end - begin));
  for (int64_t t = begin; t < end; ++t) {
    CHECK(token_T[t] >= 0 && token_T[t] < V);
    ++sorted.first_V[token_T[t] + 1];
  }
  for (int64_t v = 0; v < V; ++v) sorted.first_V[v + 1] += sorted.first_V[v];
  std::vector<int32_t> next(sorted.first_V.begin(), sorted.first_V.end() - 1);
  for (int64_t t = begin; t < end; ++t) {
    sorted.row[next[token_T[t]]++] = static_cast<int32_t>(t);
  }
  return sorted;
}

// Rows [begin, end) of d_x that belong to one token id, ascending.
struct IdRows {
  const ReadF32& d_x;
  int64_t D = 0;
  int64_t block_tokens = 0;
};

// to = the tree sum, over blocks [first, first + blocks), of the sums of the rows of each block;
// blocks without a row are skipped. `to` has room for one more row per level of the tree below.
void tree_sum_rows(const IdRows& in, const int32_t* begin, const int32_t* end, int64_t first,
                   int64_t blocks, float* to) {
  if (*begin / in.block_tokens == *(end - 1) / in.block_tokens) {
    std::fill_n(to, in.D, 0.0f);
    for (const int32_t* row = begin; row < end; ++row) {
      const float* from = in.d_x.row(*row);
      for (int64_t i = 0; i < in.D; ++i) to[i] += from[i];
    }
    return;
  }
  const int64_t split = canonical_split(blocks);
  const int64_t middle_row = (first + split) * in.block_tokens;
  const int32_t* middle = std::lower_bound(begin, end, middle_row);
  if (middle == end) return tree_sum_rows(in, begin, end, first, split, to);
  if (middle == begin) {
    return tree_sum_rows(in, begin, end, first + split, blocks - split, to);
  }
  tree_sum_rows(in, begin, middle, first, split, to);
  tree_sum_rows(in, middle, end, first + split, blocks - split, to + in.D);
  for (int64_t i = 0; i < in.D; ++i) to[i] = to[i] + to[in.D + i];
}

constexpr int64_t kTreeLevels = 64;
constexpr int64_t kIdChunks = 32;

void wgrad_accumulate(const EmbeddingWgradArgs& args, Workers& workers) {
  const int64_t T = args.d_x_TD[0], D = args.d_x_TD[1], V = args.d_w_SVD[1];
  const ReadF32 d_x(args.d_x_TD);
  const RowsById sorted = sort_by_id(args.token_T.pointer(), 0, T, V);
  const int64_t ids = (V + kIdChunks - 1) / kIdChunks;
  workers.parallel_for((V + ids - 1) / ids, [&](int64_t chunk, Scratch&) {
    for (int64_t v = chunk * ids; v < std::min(V, (chunk + 1) * ids); ++v) {
      float* to = args.d_w_SVD.pointer() + v * D;
      if (args.target.mode == GradMode::store) std::fill_n(to, D, 0.0f);
      for (int32_t at = sorted.first_V[v]; at < sorted.first_V[v + 1]; ++at) {
        const float* from = d_x.row(sorted.row[at]);
        for (int64_t i = 0; i < D; ++i) to[i] += from[i];
      }
    }
  });
}

// One node; `node` holds local block numbers.
void wgrad_node(const EmbeddingWgradArgs& args, const NodeRow& node, const ReadF32& d_x,
                Workers& workers) {
  const int64_t D = args.d_x_TD[1], V = args.d_w_SVD[1];
  const NodeSlots slots{.data = args.d_w_SVD.pointer(),
                        .slot_stride = args.d_w_SVD.row_stride,
                        .group_elements = D,
                        .present = args.present_SV.pointer(),
                        .present_stride = args.present_SV.row_stride};
  const RowsById sorted = sort_by_id(args.token_T.pointer(), node.first_block * args.block_tokens,
                                     node.end_block * args.block_tokens, V);
  const IdRows rows{d_x, D, args.block_tokens};
  const int64_t ids = (V + kIdChunks - 1) / kIdChunks;
  workers.parallel_for((V + ids - 1) / ids, [&](int64_t chunk, Scratch& scratch) {
    float* sum = scratch.floats(0, kTreeLevels * D);
    for (int64_t v = chunk * ids; v < std::min(V, (chunk + 1) * ids); ++v) {
      const int32_t begin = sorted.first_V[v], end = sorted.first_V[v + 1];
      if (begin < end) {
        tree_sum_rows(rows, sorted.row.data() + begin, sorted.row.data() + end, node.first_block,
                      node.end_block - node.first_block, sum);
      }
      const bool is_present = fold_node(slots, node, v, begin < end ? sum : nullptr, 0, D);
      slots.is_present(node.destination, v) = is_present ? 1 : 0;
    }
  });
}

}  // namespace

void embedding(const EmbeddingArgs& args, Workers& workers) {
  const int64_t T = args.x_TD[0], D = args.x_TD[1], V = args.w_VD[0];
  const int64_t width = dtype_bytes(args.x_TD.dtype);
  const auto* from = static_cast<const char*>(args.w_VD.data);
  auto* to = static_cast<char*>(args.x_TD.data);
  const int64_t rows = rows_per_chunk(T, D);
  workers.parallel_for((T + rows - 1) / rows, [&](int64_t chunk, Scratch&) {
    for (int64_t t = chunk * rows; t < std::min(T, (chunk + 1) * rows); ++t) {
      const int64_t v = args.token_T.pointer()[t];
      CHECK(v >= 0 && v < V);
      const char* row = from + v * args.w_VD.row_stride * width;
      std::copy(row, row + D * width, to + t * args.x_TD.row_stride * width);
    }
  });
}

void embedding_wgrad(const EmbeddingWgradArgs& args, Workers& workers) {
  if (args.target.mode != GradMode::nodes) return wgrad_accumulate(args, workers);
  const int64_t blocks = args.d_x_TD[0] / args.block_tokens;
  const ReadF32 d_x(args.d_x_TD);
  // A later node reads what an earlier one stored: one node at a time.
  for (int64_t index = 0; index < args.target.node_table_NC[0]; ++index) {
    NodeRow node = node_row(args.target, index, args.d_w_SVD[0]);
    node.first_block -= args.first_block;
    node.end_block -= args.first_block;
    CHECK(node.first_block >= 0 && node.end_block <= blocks);
    wgrad_node(args, node, d_x, workers);
  }
}

}  // namespace cambium::reference
