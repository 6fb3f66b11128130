// Leaf fold on the CPU: the canonical tree over rows, walked recursively for a range of columns.
#include "kernels/leaf_fold.h"

#include <algorithm>
#include <vector>

#include "reference/lane_math.h"
#include "reference/node_fold.h"

namespace cambium::reference {
namespace {

// The columns [begin, end) of all leaves.
struct LeafColumns {
  const float* leaf = nullptr;
  int64_t row_stride = 0;
  int64_t rows_per_block = 1;
  int64_t begin = 0;
  int64_t end = 0;
  int64_t count() const { return end - begin; }
};

// to = the tree sum of leaves [first, first + leaves); `to` has room for count() values for every
// level of the tree below.
void tree_sum_leaves(const LeafColumns& columns, int64_t first, int64_t leaves, float* to) {
  const int64_t count = columns.count();
  if (leaves == 1) {
    std::fill_n(to, count, 0.0f);
    for (int64_t r = 0; r < columns.rows_per_block; ++r) {
      const int64_t row = first * columns.rows_per_block + r;
      const float* from = columns.leaf + row * columns.row_stride + columns.begin;
      for (int64_t i = 0; i < count; ++i) to[i] += from[i];
    }
    return;
  }
  const int64_t split = canonical_split(leaves);
  tree_sum_leaves(columns, first, split, to);
  tree_sum_leaves(columns, first + split, leaves - split, to + count);
  for (int64_t i = 0; i < count; ++i) to[i] = to[i] + to[count + i];
}

constexpr int64_t kColumnChunk = 512;
constexpr int64_t kTreeLevels = 64;

}  // namespace

void leaf_fold(const LeafFoldArgs& args, Workers& workers) {
  const int64_t N = args.leaf_BN[1], B = args.leaf_BN[0] / args.rows_per_block;
  const bool is_nodes = args.target.mode == GradMode::nodes;
  const int64_t nodes = is_nodes ? args.target.node_table_NC[0] : 0;
  const NodeSlots slots{.data = args.d_w_SN.pointer(),
                        .slot_stride = args.d_w_SN.row_stride,
                        .group_elements = N,
                        .present = args.present_S.pointer(),
                        .present_stride = args.present_S.row_stride};
  const int64_t chunks = (N + kColumnChunk - 1) / kColumnChunk;
  // Presence is read by every chunk and changed by every node: one node at a time.
  for (int64_t index = 0; index < (is_nodes ? nodes : 1); ++index) {
    NodeRow node{.first_block = 0, .end_block = B, .destination = 0, .folds = {}};
    if (is_nodes) {
      node = node_row(args.target, index, args.d_w_SN[0]);
      node.first_block -= args.first_block;
      node.end_block -= args.first_block;
      CHECK(node.first_block >= 0 && node.end_block <= B);
    }
    if (is_nodes && node.end_block == node.first_block) continue;
    workers.parallel_for(chunks, [&](int64_t chunk, Scratch& scratch) {
      LeafColumns columns{.leaf = args.leaf_BN.pointer(),
                          .row_stride = args.leaf_BN.row_stride,
                          .rows_per_block = args.rows_per_block,
                          .begin = chunk * kColumnChunk,
                          .end = std::min(N, (chunk + 1) * kColumnChunk)};
      float* own = scratch.floats(0, kTreeLevels * columns.count());
      if (node.end_block == node.first_block) {
        std::fill_n(own, columns.count(), 0.0f);
      } else {
        tree_sum_leaves(columns, node.first_block, node.end_block - node.first_block, own);
      }
      if (is_nodes) {
        fold_node(slots, node, 0, own - columns.begin, columns.begin, columns.end);
        return;
      }
      float* to = slots.data + columns.begin;
      const bool adds = args.target.mode == GradMode::accumulate;
      for (int64_t i = 0; i < columns.count(); ++i) to[i] = (adds ? to[i] : 0.0f) + own[i];
    });
    if (is_nodes) slots.is_present(node.destination, 0) = 1;
  }
}

}  // namespace cambium::reference
