// Permute: rows and scalars picked by index. Serves the dispatch packing (send_token_M), the
// permute into expert-grouped rows (row_token_R), and the backward of combine/unpermute.
//
//   gather_rows:        y_MD[m] = x_TD[index_M[m]]       a row of zeros where the index is -1
//   gather_scalars:     y_M[m]  = x_N[index_M[m]]        0 where the index is -1
//   gather_row_blocks:  row_block_R[r] = token_block_T[row_token_R[r]]   -1 where the token is -1
//
// The sum that gathers rows back into tokens is kernels/combine.h.
// Napkin: 8 M D bytes; memory bound.
#pragma once

#include "kernels/op.h"

namespace cambium {

struct GatherRowsArgs {
  In<Real> x_TD;
  In<int32_t> index_M;
  Out<Real> y_MD;  // dtype of x_TD
};

struct GatherScalarsArgs {
  In<float> x_N;        // contiguous, any rank
  In<int32_t> index_M;  // contiguous, any rank: row_slot_R, return_row_TK, ...
  Out<float> y_M;       // contiguous, as many elements as index_M
};

struct GatherRowBlocksArgs {
  In<int32_t> token_block_T;
  In<int32_t> row_token_R;
  Out<int32_t> row_block_R;
};

inline void check_args(const GatherRowsArgs& a) {
  const int64_t M = a.index_M[0], D = a.x_TD[1];
  check_shape("gather_rows", "x_TD", a.x_TD, Shape(a.x_TD[0], D));
  check_shape("gather_rows", "index_M", a.index_M, Shape(M));
  check_shape("gather_rows", "y_MD", a.y_MD, Shape(M, D));
  CHECK(a.x_TD.dtype == a.y_MD.dtype);
}

inline void check_args(const GatherScalarsArgs& a) {
  CHECK(a.x_N.is_contiguous() && a.index_M.is_contiguous() && a.y_M.is_contiguous());
  CHECK_EQ(a.y_M.elements(), a.index_M.elements());
}

inline void check_args(const GatherRowBlocksArgs& a) {
  check_shape("gather_row_blocks", "token_block_T", a.token_block_T, Shape(a.token_block_T[0]));
  check_shape("gather_row_blocks", "row_block_R", a.row_block_R, Shape(a.row_token_R[0]));
}

inline Cost cost(const GatherRowsArgs& a) {
  const int64_t M = a.index_M[0], D = a.x_TD[1];
  return {"gather_rows", {M, D}, 0, 2 * M * D * dtype_bytes(a.x_TD.dtype) + 4 * M, 0};
}

inline Cost cost(const GatherScalarsArgs& a) {
  const int64_t M = a.index_M.elements();
  return {"gather_scalars", {M}, 0, 12 * M, 0};
}

inline Cost cost(const GatherRowBlocksArgs& a) {
  const int64_t R = a.row_token_R[0];
  return {"gather_row_blocks", {R}, 0, 12 * R, 0};
}

template <class Visitor>
void visit_views(const GatherRowsArgs& a, Visitor&& visit) {
  visit("x_TD", a.x_TD);
  visit("index_M", a.index_M);
  visit("y_MD", a.y_MD);
}

template <class Visitor>
void visit_views(const GatherScalarsArgs& a, Visitor&& visit) {
  visit("x_N", a.x_N);
  visit("index_M", a.index_M);
  visit("y_M", a.y_M);
}

template <class Visitor>
void visit_views(const GatherRowBlocksArgs& a, Visitor&& visit) {
  visit("token_block_T", a.token_block_T);
  visit("row_token_R", a.row_token_R);
  visit("row_block_R", a.row_block_R);
}

namespace reference {
void gather_rows(const GatherRowsArgs& args, Workers& workers);
void gather_scalars(const GatherScalarsArgs& args, Workers& workers);
void gather_row_blocks(const GatherRowBlocksArgs& args, Workers& workers);
}  // namespace reference
namespace cuda {
void gather_rows(const GatherRowsArgs& args, Stream& stream);
void gather_scalars(const GatherScalarsArgs& args, Stream& stream);
void gather_row_blocks(const GatherRowBlocksArgs& args, Stream& stream);
// gather_rows where an index of -1 is an error, as it is for token ids.
void gather_present_rows(const GatherRowsArgs& args, Stream& stream);
}  // namespace cuda

inline void gather_rows(const GatherRowsArgs& args, OpCall call) {
  execute(args, call, reference::gather_rows, kHasCuda ? cuda::gather_rows : nullptr);
}
inline void gather_scalars(const GatherScalarsArgs& args, OpCall call) {
  execute(args, call, reference::gather_scalars, kHasCuda ? cuda::gather_scalars : nullptr);
}
inline void gather_row_blocks(const GatherRowBlocksArgs& args, OpCall call) {
  execute(args, call, reference::gather_row_blocks, kHasCuda ? cuda::gather_row_blocks : nullptr);
}

}  // namespace cambium
