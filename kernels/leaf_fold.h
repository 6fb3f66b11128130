// Leaf fold: contributions of blocks, made by another op, summed by the canonical tree.
//
//   leaf of block b = sum of rows [b R, (b+1) R) of leaf_RN in order, R = rows_per_block
//   `accumulate`, `store`: slots[0] (+)= the canonical tree sum of all leaves
//   `nodes`: the nodes of `target` (kernels/grad_target.h); every block is present
// With R = 1 it finishes the gain gradients of rms_norm and qk_norm_rope; with R = block_tokens it
// sums per-token values (loss_T viewed as [T, 1]) in the same fixed tree.
// Napkin: 4 B R N bytes read, 8 N written a node; memory bound.
#pragma once

#include "kernels/grad_target.h"
#include "kernels/op.h"

namespace cambium {

struct LeafFoldArgs {
  In<float> leaf_BN;              // B * rows_per_block rows of N values; rows may be strided
  InOut<float> d_w_SN;            // S slots of N values; `nodes` alone uses more than slot 0
  InOut<uint8_t> present_S = {};  // mode `nodes` only
  GradTarget target = {};
  int64_t first_block = 0;     // canonical number of the first leaf; mode `nodes` only
  int64_t rows_per_block = 1;  // rows of leaf_BN that make one leaf
};

inline void check_args(const LeafFoldArgs& a) {
  const int64_t rows = a.leaf_BN[0], N = a.leaf_BN[1], S = a.d_w_SN[0];
  check_shape("leaf_fold", "leaf_BN", a.leaf_BN, Shape(rows, N));
  check_shape("leaf_fold", "d_w_SN", a.d_w_SN, Shape(S, N));
  check_grad_target("leaf_fold", a.target, a.d_w_SN, a.present_S, 0);
  CHECK_GE(a.rows_per_block, 1);
  CHECK_EQ(rows % a.rows_per_block, 0);
  if (a.target.mode == GradMode::nodes) {
    CHECK_LE(a.first_block + rows / a.rows_per_block, a.target.total_blocks);
  }
}

// The additions of the canonical tree are not counted: FLOPs do not depend on the layout.
inline Cost cost(const LeafFoldArgs& a) {
  const int64_t rows = a.leaf_BN[0], N = a.leaf_BN[1];
  return {"leaf_fold", {rows, N}, 0, 4 * rows * N + 8 * N, 0};
}

template <class Visitor>
void visit_views(const LeafFoldArgs& a, Visitor&& visit) {
  visit("leaf_BN", a.leaf_BN);
  visit("d_w_SN", a.d_w_SN);
  visit("present_S", a.present_S);
  visit_views(a.target, visit);
}

namespace reference {
void leaf_fold(const LeafFoldArgs& args, Workers& workers);
}  // namespace reference
namespace cuda {
void leaf_fold(const LeafFoldArgs& args, Stream& stream);
}  // namespace cuda

inline void leaf_fold(const LeafFoldArgs& args, OpCall call) {
  execute(args, call, reference::leaf_fold, kHasCuda ? cuda::leaf_fold : nullptr);
}

}  // namespace cambium
