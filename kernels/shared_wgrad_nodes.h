// Weight gradients d_w[N, K] = d_y^T x of groups of rows on the GPU, for any shape and both modes
// of kernels/grad_target.h: what exact mode runs, and what shapes that the tensor cores' kernel
// cannot take fall back to. Shared by linear_wgrad (one group) and grouped_wgrad (an expert a
// group).
//
// Every element is the chain of fused multiply-adds of the CPU reference, rows ascending, and
// leaves meet in the canonical tree in registers: the bits are those of the reference, and a
// block's contribution depends on its own rows alone (D3).
#pragma once

#include "kernels/grad_target.h"

namespace cambium::cuda {

struct WgradNodesArgs {
  In<Real> d_y_RN;  // dtype of x_RK
  In<Real> x_RK;
  In<int32_t> d_y_token_R;  // optional: row r reads d_y_RN[d_y_token_R[r]]
  In<int32_t> x_token_R;    // optional
  int64_t rows = 0;
  int64_t groups = 1;
  In<int32_t> group_offset_g1;  // group g has rows [offset[g], offset[g + 1]); absent: all rows
  In<int32_t> row_block_R;      // block of each row, ascending in a group; `nodes` only
  int64_t first_block = 0;      // without row_block_R: row r is of block
  int64_t block_tokens = 1;     //   first_block + r / block_tokens
  float* slots = nullptr;       // group 0's [N, K] matrix in slot 0
  int64_t slot_stride = 0;      // elements
  int64_t group_stride = 0;
  uint8_t* present = nullptr;  // group 0's flag in slot 0; groups are next to each other
  int64_t present_stride = 0;  // between slots
  GradTarget target;
};

void wgrad_nodes(const WgradNodesArgs& args, Stream& stream);

}  // namespace cambium::cuda
