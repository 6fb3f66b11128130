// The gate of a shared expert (Qwen2-MoE, arXiv 2407.10671): one number per token scales its rows.
//
//   gate = s(<x, w>), s(z) = 1 / (1 + e^-z)      (fp32, per token)
//   y = gate * h
// W_down (gate h) = gate (W_down h), so the gate stands before the down projection. Backward:
//   d_h = gate * d_y,   d_logit = gate (1 - gate) <d_y, h>
//   d_x = d_logit w (+ d_residual),   d_w = sum over tokens of d_logit x, one row per block of
//   tokens, tokens in position order
// y comes once more, for the down projection's weight gradient.
// Napkin: forward 2 T (D + 2 F) bytes in bf16, backward 2 T (3 D + 4 F); memory bound.
#pragma once

#include "kernels/op.h"

namespace cambium {

struct TokenGateArgs {
  In<Real> x_TD;
  In<Real> w_D;
  In<Real> h_TF;
  Out<float> gate_T;
  Out<Real> y_TF;  // may be the same memory as h_TF
};

struct TokenGateBackwardArgs {
  In<Real> x_TD;
  In<Real> w_D;
  In<Real> h_TF;
  In<float> gate_T;
  In<Real> d_y_TF;
  In<Real> d_residual_TD = {};  // optional: added to d_x_TD
  Out<float> d_logit_T;
  Out<Real> d_h_TF;        // may be the same memory as d_y_TF
  Out<Real> y_TF;          // may be the same memory as h_TF
  Out<Real> d_x_TD;        // may be the same memory as d_residual_TD
  Out<float> d_w_leaf_BD;  // B = ceil(T / block_tokens) blocks, the last may be short
  int64_t block_tokens = 0;
};

inline void check_args(const TokenGateArgs& a) {
  const int64_t T = a.x_TD[0], D = a.x_TD[1], F = a.h_TF[1];
  check_shape("token_gate", "w_D", a.w_D, Shape(D));
  check_shape("token_gate", "h_TF", a.h_TF, Shape(T, F));
  check_shape("token_gate", "gate_T", a.gate_T, Shape(T));
  check_shape("token_gate", "y_TF", a.y_TF, Shape(T, F));
}

inline void check_args(const TokenGateBackwardArgs& a) {
  const int64_t T = a.x_TD[0], D = a.x_TD[1], F = a.h_TF[1];
  check_shape("token_gate_backward", "w_D", a.w_D, Shape(D));
  check_shape("token_gate_backward", "h_TF", a.h_TF, Shape(T, F));
  check_shape("token_gate_backward", "gate_T", a.gate_T, Shape(T));
  check_shape("token_gate_backward", "d_y_TF", a.d_y_TF, Shape(T, F));
  if (!a.d_residual_TD.empty()) {
    check_shape("token_gate_backward", "d_residual_TD", a.d_residual_TD, Shape(T, D));
  }
  check_shape("token_gate_backward", "d_logit_T", a.d_logit_T, Shape(T));
  check_shape("token_gate_backward", "d_h_TF", a.d_h_TF, Shape(T, F));
  check_shape("token_gate_backward", "y_TF", a.y_TF, Shape(T, F));
  check_shape("token_gate_backward", "d_x_TD", a.d_x_TD, Shape(T, D));
  CHECK_GE(a.block_tokens, 1);
  const int64_t B = (T + a.block_tokens - 1) / a.block_tokens;
  check_shape("token_gate_backward", "d_w_leaf_BD", a.d_w_leaf_BD, Shape(B, D));
}

inline Cost cost(const TokenGateArgs& a) {
  const int64_t T = a.x_TD[0], D = a.x_TD[1], F = a.h_TF[1], width = dtype_bytes(a.x_TD.dtype);
  return {"token_gate", {T, D, F}, T * (2 * D + F), width * (T * (D + 2 * F) + D) + 4 * T, 0};
}

inline Cost cost(const TokenGateBackwardArgs& a) {
  const int64_t T = a.x_TD[0], D = a.x_TD[1], F = a.h_TF[1], width = dtype_bytes(a.x_TD.dtype);
  const int64_t added = a.d_residual_TD.empty() ? 0 : 1;
  const int64_t bytes =
      width * (T * ((3 + added) * D + 4 * F) + D) + 4 * a.d_w_leaf_BD.elements() + 12 * T;
  return {"token_gate_backward", {T, D, F}, T * ((3 + added) * D + 4 * F), bytes, 0};
}

template <class Visitor>
void visit_views(const TokenGateArgs& a, Visitor&& visit) {
  visit("x_TD", a.x_TD);
  visit("w_D", a.w_D);
  visit("h_TF", a.h_TF);
  visit("gate_T", a.gate_T);
  visit("y_TF", a.y_TF);
}

template <class Visitor>
void visit_views(const TokenGateBackwardArgs& a, Visitor&& visit) {
  visit("x_TD", a.x_TD);
  visit("w_D", a.w_D);
  visit("h_TF", a.h_TF);
  visit("gate_T", a.gate_T);
  visit("d_y_TF", a.d_y_TF);
  visit("d_residual_TD", a.d_residual_TD);
  visit("d_logit_T", a.d_logit_T);
  visit("d_h_TF", a.d_h_TF);
  visit("y_TF", a.y_TF);
  visit("d_x_TD", a.d_x_TD);
  visit("d_w_leaf_BD", a.d_w_leaf_BD);
}

namespace reference {
void token_gate(const TokenGateArgs& args, Workers& workers);
void token_gate_backward(const TokenGateBackwardArgs& args, Workers& workers);
}  // namespace reference
namespace cuda {
void token_gate(const TokenGateArgs& args, Stream& stream);
void token_gate_backward(const TokenGateBackwardArgs& args, Stream& stream);
}  // namespace cuda

inline void token_gate(const TokenGateArgs& args, OpCall call) {
  execute(args, call, reference::token_gate, kHasCuda ? cuda::token_gate : nullptr);
}
inline void token_gate_backward(const TokenGateBackwardArgs& args, OpCall call) {
  execute(args, call, reference::token_gate_backward,
          kHasCuda ? cuda::token_gate_backward : nullptr);
}

}  // namespace cambium
