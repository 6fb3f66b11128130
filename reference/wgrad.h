// Weight gradients d_w[N, K] = d_y^T x of one group of rows, straight into GradTarget's slots.
//
// A register tile of d_w walks all its rows: in mode `nodes` each leaf (the rows of one block) is
// a chain from zero in registers, finished leaves wait on a small stack of tiles in cache, merges
// add the stack's top from the left, and only finished nodes reach memory. With 8 rows a block this
// costs a store and an add per leaf beside 8 x 12 multiply-adds. How rows are packed and cut into
// chunks does not enter any chain, so nodes split over calls or ranks give the same bits.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "reference/tree_sum.h"
#include "src/base/workers.h"

namespace cambium::reference {

// One step of a tile's walk: rows [row_begin, row_end) from zero, then `merges` additions of the
// stack's top from the left, then push, or, at the end of a node, fold and store.
struct WgradStep {
  int64_t row_begin = 0;
  int64_t row_end = 0;
  int32_t merges = 0;
  int32_t node = -1;  // index of the node that ends here, else -1
};

struct WgradPlan {
  std::vector<WgradStep> steps;
  std::vector<NodeStore> nodes;
};

// The walk of all nodes of `target` for a group whose rows are cut into leaves: leaf i is block
// leaf_block[i], rows [leaf_row[i], leaf_row[i + 1]). `present` is the group's flag in slot 0,
// flags of consecutive slots `slot_step` apart; they are updated.
struct WgradLeaves {
  std::span<const int32_t> leaf_block;
  std::span<const int64_t> leaf_row;
};
WgradPlan plan_wgrad(const GradTarget& target, const WgradLeaves& leaves, int64_t slot_count,
                     uint8_t* present, int64_t slot_step);

// One group: an expert, or the only one of a linear layer.
struct WgradGroup {
  const float* d_y = nullptr;  // [rows, N]
  int64_t d_y_stride = 0;
  const float* x = nullptr;  // [rows, K]
  int64_t x_stride = 0;
  const int32_t* d_y_row = nullptr;  // optional: where in d_y a row lies
  const int32_t* x_row = nullptr;
  int64_t N = 0;
  int64_t K = 0;
  float* slots = nullptr;  // the group's [N, K] matrix in slot 0
  int64_t slot_stride = 0;
  GradMode mode = GradMode::accumulate;
  int64_t row_begin = 0;  // modes `accumulate`, `store`
  int64_t row_end = 0;
  WgradPlan plan;  // mode `nodes`

  int64_t row_count() const;  // rows that are multiplied
};

// Runs all groups in parallel; chunks are parts of one group's matrix, in proportion to its rows.
void wgrad_groups(std::span<const WgradGroup> groups, Workers& workers);

}  // namespace cambium::reference
