// RMSNorm (arXiv 1910.07467), fused with the residual addition before it.
//
//   sum = x (+ residual), rounded to its storage type
//   rstd = 1 / sqrt(mean(sum^2) + epsilon)                          (fp32, per row)
//   y = gain * (sum * rstd)                                         (rounded in this order, as HF)
// Backward, with x the normed input (the sum), n = x * rstd and g = gain * d_y:
//   d_x = rstd * (g - n * mean(g n)) (+ d_residual, added last)
//   d_gain = sum over tokens of d_y * n, one row per block of tokens, tokens in position order
// Sums over D use 8 lanes in a fixed order; a row depends on nothing but itself (D2).
// Napkin: forward 8 T D bytes (12 more with residual and sum), backward 12 T D; memory bound.
#pragma once

#include "kernels/op.h"

namespace cambium {

struct RmsNormArgs {
  In<Real> x_TD;
  In<Real> residual_TD = {};  // optional
  In<Real> gain_D;
  Out<Real> sum_TD = {};  // optional; x + residual; may be the same memory as x_TD or residual_TD
  Out<Real> y_TD;         // may be the same memory as x_TD or residual_TD where sum_TD is not
  Out<float> rstd_T;
  float epsilon = 1e-6f;
};

struct RmsNormBackwardArgs {
  In<Real> d_y_TD;
  In<Real> x_TD;  // what the forward pass normed: sum_TD, or x_TD without a residual
  In<Real> gain_D;
  In<float> rstd_T;
  In<Real> d_residual_TD = {};  // optional: added to d_x_TD
  Out<Real> d_x_TD;             // may be the same memory as d_y_TD or d_residual_TD
  Out<float> d_gain_leaf_BD;    // B = ceil(T / block_tokens) blocks, the last may be short
  int64_t block_tokens = 0;
};

inline void check_args(const RmsNormArgs& a) {
  const int64_t T = a.x_TD[0], D = a.x_TD[1];
  if (!a.residual_TD.empty()) check_shape("rms_norm", "residual_TD", a.residual_TD, Shape(T, D));
  if (!a.sum_TD.empty()) check_shape("rms_norm", "sum_TD", a.sum_TD, Shape(T, D));
  check_shape("rms_norm", "gain_D", a.gain_D, Shape(D));
  check_shape("rms_norm", "y_TD", a.y_TD, Shape(T, D));
  check_shape("rms_norm", "rstd_T", a.rstd_T, Shape(T));
  CHECK_GE(D, 1);
  CHECK_GE(a.epsilon, 0.0f);
}

inline void check_args(const RmsNormBackwardArgs& a) {
  const int64_t T = a.d_y_TD[0], D = a.d_y_TD[1];
  check_shape("rms_norm_backward", "x_TD", a.x_TD, Shape(T, D));
  check_shape("rms_norm_backward", "gain_D", a.gain_D, Shape(D));
  check_shape("rms_norm_backward", "rstd_T", a.rstd_T, Shape(T));
  if (!a.d_residual_TD.empty()) {
    check_shape("rms_norm_backward", "d_residual_TD", a.d_residual_TD, Shape(T, D));
  }
  check_shape("rms_norm_backward", "d_x_TD", a.d_x_TD, Shape(T, D));
  CHECK_GE(a.block_tokens, 1);
  const int64_t B = (T + a.block_tokens - 1) / a.block_tokens;
  check_shape("rms_norm_backward", "d_gain_leaf_BD", a.d_gain_leaf_BD, Shape(B, D));
}

inline Cost cost(const RmsNormArgs& a) {
  const int64_t T = a.x_TD[0], D = a.x_TD[1], width = dtype_bytes(a.x_TD.dtype);
  const int64_t added = (a.residual_TD.empty() ? 0 : 1) + (a.sum_TD.empty() ? 0 : 1);
  const int64_t flops = (a.residual_TD.empty() ? 4 : 5) * T * D;
  return {"rms_norm", {T, D}, flops, width * ((2 + added) * T * D + D) + 4 * T, 0};
}

inline Cost cost(const RmsNormBackwardArgs& a) {
  const int64_t T = a.d_y_TD[0], D = a.d_y_TD[1], width = dtype_bytes(a.d_y_TD.dtype);
  const int64_t added = a.d_residual_TD.empty() ? 0 : 1;
  const int64_t bytes = width * ((3 + added) * T * D + D) + 4 * a.d_gain_leaf_BD.elements() + 4 * T;
  return {"rms_norm_backward", {T, D}, (9 + added) * T * D, bytes, 0};
}

template <class Visitor>
void visit_views(const RmsNormArgs& a, Visitor&& visit) {
  visit("x_TD", a.x_TD);
  visit("residual_TD", a.residual_TD);
  visit("gain_D", a.gain_D);
  visit("sum_TD", a.sum_TD);
  visit("y_TD", a.y_TD);
  visit("rstd_T", a.rstd_T);
}

template <class Visitor>
void visit_views(const RmsNormBackwardArgs& a, Visitor&& visit) {
  visit("d_y_TD", a.d_y_TD);
  visit("x_TD", a.x_TD);
  visit("gain_D", a.gain_D);
  visit("rstd_T", a.rstd_T);
  visit("d_residual_TD", a.d_residual_TD);
  visit("d_x_TD", a.d_x_TD);
  visit("d_gain_leaf_BD", a.d_gain_leaf_BD);
}

namespace reference {
void rms_norm(const RmsNormArgs& args, Workers& workers);
void rms_norm_backward(const RmsNormBackwardArgs& args, Workers& workers);
}  // namespace reference
namespace cuda {
void rms_norm(const RmsNormArgs& args, Stream& stream);
void rms_norm_backward(const RmsNormBackwardArgs& args, Stream& stream);
}  // namespace cuda

inline void rms_norm(const RmsNormArgs& args, OpCall call) {
  execute(args, call, reference::rms_norm, kHasCuda ? cuda::rms_norm : nullptr);
}
inline void rms_norm_backward(const RmsNormBackwardArgs& args, OpCall call) {
  execute(args, call, reference::rms_norm_backward, kHasCuda ? cuda::rms_norm_backward : nullptr);
}

}  // namespace cambium
