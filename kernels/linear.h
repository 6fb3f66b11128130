// Linear layer: y = x W^T (+ residual), its input gradient, its weight gradient, and a bias.
//
//   forward  y_TN  = x_TK  w_NK^T (+ residual_TN)
//   dgrad    d_x_TK = d_y_TN w_NK (+ residual_TK)
//   bias     y_TN += bias_N for every token; its gradient is a leaf_fold of d_y_TN
//   wgrad    d_w_NK (+)= d_y_TN^T x_TK, as `target` says (kernels/grad_target.h)
//
// Every element of y and d_x is one chain of fused multiply-adds from zero over the contracted
// index in ascending order, the residual added last: it depends on its own row only (D2). In wgrad
// the chain runs over the tokens of a block, and blocks are summed by the canonical tree (D3).
// Napkin: 2 T N K FLOPs each; the weight is packed once per 256 rows at most.
#pragma once

#include "kernels/grad_target.h"
#include "kernels/op.h"

namespace cambium {

struct LinearArgs {
  In<Real> x_TK;
  In<Real> w_NK;
  In<Real> residual_TN;  // optional; may be the same memory as y_TN
  Out<Real> y_TN;
};

struct AddBiasArgs {
  In<Real> bias_N;
  InOut<Real> y_TN;
};

struct LinearDgradArgs {
  In<Real> d_y_TN;
  In<Real> w_NK;
  In<Real> residual_TK;  // optional; may be the same memory as d_x_TK
  Out<Real> d_x_TK;
};

struct LinearWgradArgs {
  In<Real> d_y_TN;
  In<Real> x_TK;
  InOut<float>
      d_w_SNK;  // S slots; row_stride is the slot stride; `nodes` alone uses more than slot 0
  InOut<uint8_t> present_S;  // mode `nodes` only
  GradTarget target;
  int64_t first_block = 0;   // canonical number of the block that row 0 begins; mode `nodes` only
  int64_t block_tokens = 0;  // rows per block, T is a multiple; mode `nodes` only
};

inline void check_args(const LinearArgs& a) {
  const int64_t T = a.x_TK[0], K = a.x_TK[1], N = a.w_NK[0];
  check_shape("linear", "w_NK", a.w_NK, Shape(N, K));
  check_shape("linear", "y_TN", a.y_TN, Shape(T, N));
  if (!a.residual_TN.empty()) check_shape("linear", "residual_TN", a.residual_TN, Shape(T, N));
}

inline void check_args(const AddBiasArgs& a) {
  check_shape("add_bias", "y_TN", a.y_TN, Shape(a.y_TN[0], a.bias_N[0]));
  CHECK_EQ(static_cast<int>(a.y_TN.dtype), static_cast<int>(a.bias_N.dtype));
}

inline void check_args(const LinearDgradArgs& a) {
  const int64_t T = a.d_y_TN[0], N = a.d_y_TN[1], K = a.w_NK[1];
  check_shape("linear_dgrad", "w_NK", a.w_NK, Shape(N, K));
  check_shape("linear_dgrad", "d_x_TK", a.d_x_TK, Shape(T, K));
  if (!a.residual_TK.empty()) {
    check_shape("linear_dgrad", "residual_TK", a.residual_TK, Shape(T, K));
  }
}

inline void check_args(const LinearWgradArgs& a) {
  const int64_t T = a.d_y_TN[0], N = a.d_y_TN[1], K = a.x_TK[1], S = a.d_w_SNK[0];
  check_shape("linear_wgrad", "x_TK", a.x_TK, Shape(T, K));
  check_shape("linear_wgrad", "d_w_SNK", a.d_w_SNK, Shape(S, N, K));
  check_grad_target("linear_wgrad", a.target, a.d_w_SNK, a.present_S, 0);
  if (a.target.mode == GradMode::nodes) {
    CHECK_GE(a.block_tokens, 1);
    CHECK_EQ(T % a.block_tokens, 0);
    CHECK_LE(a.first_block + T / a.block_tokens, a.target.total_blocks);
  }
}

inline Cost cost(const LinearArgs& a) {
  const int64_t T = a.x_TK[0], K = a.x_TK[1], N = a.w_NK[0];
  const int64_t width = dtype_bytes(a.x_TK.dtype);
  const int64_t added = a.residual_TN.empty() ? 0 : T * N;
  return {"linear", {T, N, K}, 2 * T * N * K + added, width * (T * K + N * K + T * N + added), 0};
}

inline Cost cost(const AddBiasArgs& a) {
  const int64_t T = a.y_TN[0], N = a.y_TN[1];
  return {"add_bias", {T, N}, T * N, 2 * dtype_bytes(a.y_TN.dtype) * T * N, 0};
}

inline Cost cost(const LinearDgradArgs& a) {
  const int64_t T = a.d_y_TN[0], N = a.d_y_TN[1], K = a.w_NK[1];
  const int64_t width = dtype_bytes(a.d_y_TN.dtype);
  const int64_t added = a.residual_TK.empty() ? 0 : T * K;
  return {
      "linear_dgrad", {T, N, K}, 2 * T * N * K + added, width * (T * N + N * K + T * K + added), 0};
}

// The additions of the canonical tree are not counted: FLOPs do not depend on the layout.
inline Cost cost(const LinearWgradArgs& a) {
  const int64_t T = a.d_y_TN[0], N = a.d_y_TN[1], K = a.x_TK[1];
  const int64_t width = dtype_bytes(a.d_y_TN.dtype);
  return {"linear_wgrad",
          {T, N, K},
          2 * T * N * K,
          width * T * (N + K) + grad_bytes(a.target, N * K),
          0};
}

template <class Visitor>
void visit_views(const LinearArgs& a, Visitor&& visit) {
  visit("x_TK", a.x_TK);
  visit("w_NK", a.w_NK);
  visit("residual_TN", a.residual_TN);
  visit("y_TN", a.y_TN);
}

template <class Visitor>
void visit_views(const AddBiasArgs& a, Visitor&& visit) {
  visit("bias_N", a.bias_N);
  visit("y_TN", a.y_TN);
}

template <class Visitor>
void visit_views(const LinearDgradArgs& a, Visitor&& visit) {
  visit("d_y_TN", a.d_y_TN);
  visit("w_NK", a.w_NK);
  visit("residual_TK", a.residual_TK);
  visit("d_x_TK", a.d_x_TK);
}

template <class Visitor>
void visit_views(const LinearWgradArgs& a, Visitor&& visit) {
  visit("d_y_TN", a.d_y_TN);
  visit("x_TK", a.x_TK);
  visit("d_w_SNK", a.d_w_SNK);
  visit("present_S", a.present_S);
  visit_views(a.target, visit);
}

namespace reference {
void linear(const LinearArgs& args, Workers& workers);
void add_bias(const AddBiasArgs& args, Workers& workers);
void linear_dgrad(const LinearDgradArgs& args, Workers& workers);
void linear_wgrad(const LinearWgradArgs& args, Workers& workers);
}  // namespace reference

namespace cuda {
void linear(const LinearArgs& args, Stream& stream);
void add_bias(const AddBiasArgs& args, Stream& stream);
void linear_dgrad(const LinearDgradArgs& args, Stream& stream);
void linear_wgrad(const LinearWgradArgs& args, Stream& stream);
}  // namespace cuda

inline void linear(const LinearArgs& args, OpCall call) {
  execute(args, call, reference::linear, kHasCuda ? cuda::linear : nullptr);
}
inline void add_bias(const AddBiasArgs& args, OpCall call) {
  execute(args, call, reference::add_bias, kHasCuda ? cuda::add_bias : nullptr);
}
inline void linear_dgrad(const LinearDgradArgs& args, OpCall call) {
  execute(args, call, reference::linear_dgrad, kHasCuda ? cuda::linear_dgrad : nullptr);
}
inline void linear_wgrad(const LinearWgradArgs& args, OpCall call) {
  execute(args, call, reference::linear_wgrad, kHasCuda ? cuda::linear_wgrad : nullptr);
}

}  // namespace cambium
