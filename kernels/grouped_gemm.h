// Grouped GEMM: the products of the experts' rows with the experts' weights, SwiGLU fused.
//
// Rows R are sorted by local expert; those of expert x are [expert_offset_e1[x],
// expert_offset_e1[x + 1]). R is exact and known to the host, the offsets live on the device.
//   up          gate_up = x W_up^T;  h = silu(gate) * up                        N = 2F
//   down        y = weight * (h W_down^T)
//   down dgrad  g = d_y W_down;  d_weight = <g, h>;  d_h = weight * g;  then SwiGLU backward
//   up dgrad    d_x = d_gate_up W_up
//   wgrad       d_w[x] (+)= d_y[x]^T x[x], as `target` says (kernels/grad_target.h)
// Rows gathered on load: where a token index is given, row r of that operand is row token[r] of the
// view, so that no permuted copy exists: x of up and of its wgrad, d_y of the down dgrad and of the
// down wgrad. Tokens are in [0, rows of the view); the same token may appear in several rows.
// h is recomputed from gate_up in the down dgrad, which also writes weight * h: the down wgrad is
// d_y^T (weight * h). Outputs share no memory with inputs. Chains of fused multiply-adds as in
// kernels/linear.h, so a row's result depends on that row only (D2). Empty experts, R = 0 and all
// rows on one expert are ordinary. Napkin: 2 R N D + 2 R F D FLOPs forward; at R/e = 256, D = 128
// it is compute bound on any CPU.
#pragma once

#include "kernels/grad_target.h"
#include "kernels/op.h"
#include "kernels/swiglu.h"

namespace cambium {

struct GroupedUpArgs {
  In<Real> x_RD;
  In<Real> w_up_eND;  // F gate rows, then F up rows; row_stride is the expert stride
  In<int32_t> expert_offset_e1;
  Out<Real> gate_up_RN;
  Out<Real> h_RF;
  In<int32_t> row_token_R;  // optional: x_RD is [T, D], row r reads x_RD[row_token_R[r]]
};

struct GroupedDownArgs {
  In<Real> h_RF;
  In<Real> w_down_eDF;  // row_stride is the expert stride
  In<int32_t> expert_offset_e1;
  In<float> weight_R;  // optional: routing weight of each row
  Out<Real> y_RD;
};

struct GroupedDownDgradArgs {
  In<Real> d_y_RD;  // gradient of the weighted output
  In<Real> w_down_eDF;
  In<Real> gate_up_RN;
  In<int32_t> expert_offset_e1;
  In<float> weight_R;  // optional: absent means 1
  Out<Real> d_gate_up_RN;
  Out<float> d_weight_R;    // optional, absent when weight_R is
  Out<Real> weighted_h_RF;  // weight * h, the activation of the down wgrad
  In<int32_t> row_token_R;  // optional: d_y_RD is [T, D], row r reads d_y_RD[row_token_R[r]]
};

struct GroupedUpDgradArgs {
  In<Real> d_gate_up_RN;
  In<Real> w_up_eND;
  In<int32_t> expert_offset_e1;
  Out<Real> d_x_RD;
};

struct GroupedWgradArgs {
  In<Real> d_y_RN;
  In<Real> x_RK;
  In<int32_t> expert_offset_e1;
  In<int32_t> row_block_R;    // canonical block of each row, ascending in an expert; `nodes` only
  InOut<float> d_w_SeNK;      // row_stride is the slot stride; `nodes` alone uses more than slot 0
  InOut<uint8_t> present_Se;  // mode `nodes` only
  GradTarget target;
  int64_t expert_stride = 0;  // elements between experts of a slot, >= N * K
  In<int32_t> d_y_token_R;    // optional: d_y_RN is [T, N], row r reads d_y_RN[d_y_token_R[r]]
  In<int32_t> x_token_R;      // optional: x_RK is [T, K], row r reads x_RK[x_token_R[r]]
  int64_t rows() const { return d_y_token_R.empty() ? d_y_RN[0] : d_y_token_R[0]; }
};

// Rows of an operand that is read through `row_token_R`, or directly where that is absent.
inline void check_row_source(const char* op, const char* view_name, const RawView& view,
                             const In<int32_t>& row_token_R, int64_t R) {
  const int64_t rows = row_token_R.empty() ? R : view[0];
  check_shape(op, view_name, view, Shape(rows, view[1]));
  if (!row_token_R.empty()) check_shape(op, "row_token_R", row_token_R, Shape(R));
}

inline void check_args(const GroupedUpArgs& a) {
  const int64_t R = a.h_RF[0], D = a.x_RD[1], e = a.w_up_eND[0], F = a.h_RF[1];
  check_row_source("grouped_up", "x_RD", a.x_RD, a.row_token_R, R);
  check_shape("grouped_up", "w_up_eND", a.w_up_eND, Shape(e, 2 * F, D));
  check_shape("grouped_up", "expert_offset_e1", a.expert_offset_e1, Shape(e + 1));
  check_shape("grouped_up", "gate_up_RN", a.gate_up_RN, Shape(R, 2 * F));
  check_shape("grouped_up", "h_RF", a.h_RF, Shape(R, F));
}

inline void check_args(const GroupedDownArgs& a) {
  const int64_t R = a.h_RF[0], F = a.h_RF[1], e = a.w_down_eDF[0], D = a.y_RD[1];
  check_shape("grouped_down", "w_down_eDF", a.w_down_eDF, Shape(e, D, F));
  check_shape("grouped_down", "expert_offset_e1", a.expert_offset_e1, Shape(e + 1));
  check_shape("grouped_down", "y_RD", a.y_RD, Shape(R, D));
  if (!a.weight_R.empty()) check_shape("grouped_down", "weight_R", a.weight_R, Shape(R));
}

inline void check_args(const GroupedDownDgradArgs& a) {
  const int64_t R = a.gate_up_RN[0], D = a.d_y_RD[1], e = a.w_down_eDF[0], F = a.w_down_eDF[2];
  check_row_source("grouped_down_dgrad", "d_y_RD", a.d_y_RD, a.row_token_R, R);
  check_shape("grouped_down_dgrad", "w_down_eDF", a.w_down_eDF, Shape(e, D, F));
  check_shape("grouped_down_dgrad", "gate_up_RN", a.gate_up_RN, Shape(R, 2 * F));
  check_shape("grouped_down_dgrad", "expert_offset_e1", a.expert_offset_e1, Shape(e + 1));
  check_shape("grouped_down_dgrad", "d_gate_up_RN", a.d_gate_up_RN, Shape(R, 2 * F));
  check_shape("grouped_down_dgrad", "weighted_h_RF", a.weighted_h_RF, Shape(R, F));
  if (!a.weight_R.empty()) check_shape("grouped_down_dgrad", "weight_R", a.weight_R, Shape(R));
  if (!a.d_weight_R.empty()) {
    check_shape("grouped_down_dgrad", "d_weight_R", a.d_weight_R, Shape(R));
  }
}

inline void check_args(const GroupedUpDgradArgs& a) {
  const int64_t R = a.d_gate_up_RN[0], N = a.d_gate_up_RN[1], D = a.d_x_RD[1];
  const int64_t e = a.w_up_eND[0];
  check_shape("grouped_up_dgrad", "w_up_eND", a.w_up_eND, Shape(e, N, D));
  check_shape("grouped_up_dgrad", "expert_offset_e1", a.expert_offset_e1, Shape(e + 1));
  check_shape("grouped_up_dgrad", "d_x_RD", a.d_x_RD, Shape(R, D));
}

inline void check_args(const GroupedWgradArgs& a) {
  const int64_t R = a.rows(), N = a.d_y_RN[1], K = a.x_RK[1];
  const int64_t S = a.d_w_SeNK[0], e = a.d_w_SeNK[1];
  check_row_source("grouped_wgrad", "d_y_RN", a.d_y_RN, a.d_y_token_R, R);
  check_row_source("grouped_wgrad", "x_RK", a.x_RK, a.x_token_R, R);
  check_shape("grouped_wgrad", "expert_offset_e1", a.expert_offset_e1, Shape(e + 1));
  check_shape("grouped_wgrad", "d_w_SeNK", a.d_w_SeNK, Shape(S, e, N, K));
  CHECK_GE(a.expert_stride, N * K);
  check_grad_target("grouped_wgrad", a.target, a.d_w_SeNK, a.present_Se, e);
  if (a.target.mode == GradMode::nodes) {
    check_shape("grouped_wgrad", "row_block_R", a.row_block_R, Shape(R));
  }
}

inline Cost cost(const GroupedUpArgs& a) {
  const int64_t R = a.h_RF[0], D = a.x_RD[1], e = a.w_up_eND[0], F = a.h_RF[1];
  const int64_t width = dtype_bytes(a.x_RD.dtype);
  return {"grouped_up",
          {R, e, 2 * F, D},
          4 * R * F * D + kSwigluFlops * R * F,
          width * (R * D + 2 * e * F * D + 3 * R * F),
          0};
}

inline Cost cost(const GroupedDownArgs& a) {
  const int64_t R = a.h_RF[0], F = a.h_RF[1], e = a.w_down_eDF[0], D = a.y_RD[1];
  const int64_t width = dtype_bytes(a.h_RF.dtype);
  return {"grouped_down",
          {R, e, D, F},
          2 * R * F * D + R * D,
          width * (R * F + e * F * D + R * D) + 4 * R,
          0};
}

inline Cost cost(const GroupedDownDgradArgs& a) {
  const int64_t R = a.gate_up_RN[0], D = a.d_y_RD[1], e = a.w_down_eDF[0], F = a.w_down_eDF[2];
  const int64_t width = dtype_bytes(a.d_y_RD.dtype);
  const int64_t elementwise = (kSwigluFlops + kSwigluBackwardFlops + 4) * R * F;
  return {"grouped_down_dgrad",
          {R, e, D, F},
          2 * R * F * D + elementwise,
          width * (R * D + e * F * D + 5 * R * F) + 8 * R,
          0};
}

inline Cost cost(const GroupedUpDgradArgs& a) {
  const int64_t R = a.d_gate_up_RN[0], N = a.d_gate_up_RN[1], D = a.d_x_RD[1];
  const int64_t e = a.w_up_eND[0], width = dtype_bytes(a.d_gate_up_RN.dtype);
  return {"grouped_up_dgrad", {R, e, N, D}, 2 * R * N * D, width * (R * N + e * N * D + R * D), 0};
}

// The additions of the canonical tree are not counted: FLOPs do not depend on the layout.
inline Cost cost(const GroupedWgradArgs& a) {
  const int64_t R = a.rows(), N = a.d_y_RN[1], K = a.x_RK[1], e = a.d_w_SeNK[1];
  const int64_t width = dtype_bytes(a.d_y_RN.dtype);
  return {"grouped_wgrad",
          {R, e, N, K},
          2 * R * N * K,
          width * R * (N + K) + grad_bytes(a.target, e * N * K),
          0};
}

template <class Visitor>
void visit_views(const GroupedUpArgs& a, Visitor&& visit) {
  visit("x_RD", a.x_RD);
  visit("w_up_eND", a.w_up_eND);
  visit("expert_offset_e1", a.expert_offset_e1);
  visit("gate_up_RN", a.gate_up_RN);
  visit("h_RF", a.h_RF);
  visit("row_token_R", a.row_token_R);
}

template <class Visitor>
void visit_views(const GroupedDownArgs& a, Visitor&& visit) {
  visit("h_RF", a.h_RF);
  visit("w_down_eDF", a.w_down_eDF);
  visit("expert_offset_e1", a.expert_offset_e1);
  visit("weight_R", a.weight_R);
  visit("y_RD", a.y_RD);
}

template <class Visitor>
void visit_views(const GroupedDownDgradArgs& a, Visitor&& visit) {
  visit("d_y_RD", a.d_y_RD);
  visit("w_down_eDF", a.w_down_eDF);
  visit("gate_up_RN", a.gate_up_RN);
  visit("expert_offset_e1", a.expert_offset_e1);
  visit("weight_R", a.weight_R);
  visit("d_gate_up_RN", a.d_gate_up_RN);
  visit("d_weight_R", a.d_weight_R);
  visit("weighted_h_RF", a.weighted_h_RF);
  visit("row_token_R", a.row_token_R);
}

template <class Visitor>
void visit_views(const GroupedUpDgradArgs& a, Visitor&& visit) {
  visit("d_gate_up_RN", a.d_gate_up_RN);
  visit("w_up_eND", a.w_up_eND);
  visit("expert_offset_e1", a.expert_offset_e1);
  visit("d_x_RD", a.d_x_RD);
}

template <class Visitor>
void visit_views(const GroupedWgradArgs& a, Visitor&& visit) {
  visit("d_y_RN", a.d_y_RN);
  visit("x_RK", a.x_RK);
  visit("expert_offset_e1", a.expert_offset_e1);
  visit("row_block_R", a.row_block_R);
  visit("d_w_SeNK", a.d_w_SeNK);
  visit("present_Se", a.present_Se);
  visit("d_y_token_R", a.d_y_token_R);
  visit("x_token_R", a.x_token_R);
  visit_views(a.target, visit);
}

namespace reference {
void grouped_up(const GroupedUpArgs& args, Workers& workers);
void grouped_down(const GroupedDownArgs& args, Workers& workers);
void grouped_down_dgrad(const GroupedDownDgradArgs& args, Workers& workers);
void grouped_up_dgrad(const GroupedUpDgradArgs& args, Workers& workers);
void grouped_wgrad(const GroupedWgradArgs& args, Workers& workers);
}  // namespace reference

namespace cuda {
void grouped_up(const GroupedUpArgs& args, Stream& stream);
void grouped_down(const GroupedDownArgs& args, Stream& stream);
void grouped_down_dgrad(const GroupedDownDgradArgs& args, Stream& stream);
void grouped_up_dgrad(const GroupedUpDgradArgs& args, Stream& stream);
void grouped_wgrad(const GroupedWgradArgs& args, Stream& stream);
}  // namespace cuda

inline void grouped_up(const GroupedUpArgs& args, OpCall call) {
  execute(args, call, reference::grouped_up, kHasCuda ? cuda::grouped_up : nullptr);
}
inline void grouped_down(const GroupedDownArgs& args, OpCall call) {
  execute(args, call, reference::grouped_down, kHasCuda ? cuda::grouped_down : nullptr);
}
inline void grouped_down_dgrad(const GroupedDownDgradArgs& args, OpCall call) {
  execute(args, call, reference::grouped_down_dgrad, kHasCuda ? cuda::grouped_down_dgrad : nullptr);
}
inline void grouped_up_dgrad(const GroupedUpDgradArgs& args, OpCall call) {
  execute(args, call, reference::grouped_up_dgrad, kHasCuda ? cuda::grouped_up_dgrad : nullptr);
}
inline void grouped_wgrad(const GroupedWgradArgs& args, OpCall call) {
  execute(args, call, reference::grouped_wgrad, kHasCuda ? cuda::grouped_wgrad : nullptr);
}

}  // namespace cambium
