// Combine (unpermute): each token's rows summed in k order, then the residual added last.
//
//   out_TD[t] = residual_TD[t] + ((r_0 + r_1) + r_2 + ...),   r_k = y_RD[row_index_TK[t, k]]
//
// Absent rows (-1) are skipped, never added as zero; a token without rows gets the residual alone,
// or zeros. The experts' weights are already in the rows (applied expert-side). With
// row_index = slot_row_TK this is unpermute and the backward of permute; with return_row_TK the
// exact combine of stage 5; with token_part_TP (K = ranks) the fast one and the backward of
// dispatch. Napkin: 4 T D (K + 2) bytes, T D K FLOPs; memory bound.
#pragma once

#include "kernels/op.h"

namespace cambium {

struct CombineRowsArgs {
  In<Real> y_RD;
  In<int32_t> row_index_TK;
  In<Real> residual_TD;  // optional
  Out<Real> out_TD;      // may be residual_TD's memory; fp32 sums, rounded once where it is bf16
};

inline void check_args(const CombineRowsArgs& a) {
  const int64_t T = a.row_index_TK[0], K = a.row_index_TK[1], D = a.out_TD[1];
  check_shape("combine_rows", "y_RD", a.y_RD, Shape(a.y_RD[0], D));
  check_shape("combine_rows", "row_index_TK", a.row_index_TK, Shape(T, K));
  if (!a.residual_TD.empty()) {
    check_shape("combine_rows", "residual_TD", a.residual_TD, Shape(T, D));
  }
  check_shape("combine_rows", "out_TD", a.out_TD, Shape(T, D));
}

inline Cost cost(const CombineRowsArgs& a) {
  const int64_t T = a.row_index_TK[0], K = a.row_index_TK[1], D = a.out_TD[1];
  const int64_t row_bytes = D * dtype_bytes(a.out_TD.dtype);
  return {"combine_rows", {T, D, K}, T * D * K, T * (K + 2) * row_bytes + 4 * T * K, 0};
}

template <class Visitor>
void visit_views(const CombineRowsArgs& a, Visitor&& visit) {
  visit("y_RD", a.y_RD);
  visit("row_index_TK", a.row_index_TK);
  visit("residual_TD", a.residual_TD);
  visit("out_TD", a.out_TD);
}

namespace reference {
void combine_rows(const CombineRowsArgs& args, Workers& workers);
}
namespace cuda {
void combine_rows(const CombineRowsArgs& args, Stream& stream);
}  // namespace cuda

inline void combine_rows(const CombineRowsArgs& args, OpCall call) {
  execute(args, call, reference::combine_rows, kHasCuda ? cuda::combine_rows : nullptr);
}

}  // namespace cambium
