// SwiGLU (Shazeer, arXiv 2002.05202): h = silu(gate) * up, silu(x) = x * s(x), s(x) = 1/(1+e^-x).
//
//   forward   h_RF = silu(gate_up_RN[:, :F]) * gate_up_RN[:, F:]          N = 2F
//   backward  d_gate = d_h * up * s(gate) * (1 + gate * (1 - s(gate))),   d_up = d_h * silu(gate)
//
// The same row kernel is the epilogue of the grouped GEMM (kernels/grouped_gemm.h): recomputing h
// from a stored gate_up gives the same bits. bf16: gate_up is rounded before h is computed.
// Napkin: 12 bytes (20 backward) and about 20 (30) FLOPs per element of h; memory bound.
#pragma once

#include "kernels/op.h"

namespace cambium {

struct SwigluArgs {
  In<Real> gate_up_RN;
  Out<Real> h_RF;
};

struct SwigluBackwardArgs {
  In<Real> gate_up_RN;
  In<Real> d_h_RF;
  Out<Real> d_gate_up_RN;
};

inline void check_args(const SwigluArgs& a) {
  const int64_t R = a.h_RF[0], F = a.h_RF[1];
  check_shape("swiglu", "gate_up_RN", a.gate_up_RN, Shape(R, 2 * F));
}

inline void check_args(const SwigluBackwardArgs& a) {
  const int64_t R = a.d_h_RF[0], F = a.d_h_RF[1];
  check_shape("swiglu_backward", "gate_up_RN", a.gate_up_RN, Shape(R, 2 * F));
  check_shape("swiglu_backward", "d_gate_up_RN", a.d_gate_up_RN, Shape(R, 2 * F));
}

constexpr int64_t kSwigluFlops = 20;          // per element of h, the exponential included
constexpr int64_t kSwigluBackwardFlops = 30;  // per element of h

inline Cost cost(const SwigluArgs& a) {
  const int64_t R = a.h_RF[0], F = a.h_RF[1], width = dtype_bytes(a.h_RF.dtype);
  return {"swiglu", {R, F}, kSwigluFlops * R * F, 3 * width * R * F, 0};
}

inline Cost cost(const SwigluBackwardArgs& a) {
  const int64_t R = a.d_h_RF[0], F = a.d_h_RF[1], width = dtype_bytes(a.d_h_RF.dtype);
  return {"swiglu_backward", {R, F}, kSwigluBackwardFlops * R * F, 5 * width * R * F, 0};
}

template <class Visitor>
void visit_views(const SwigluArgs& a, Visitor&& visit) {
  visit("gate_up_RN", a.gate_up_RN);
  visit("h_RF", a.h_RF);
}

template <class Visitor>
void visit_views(const SwigluBackwardArgs& a, Visitor&& visit) {
  visit("gate_up_RN", a.gate_up_RN);
  visit("d_h_RF", a.d_h_RF);
  visit("d_gate_up_RN", a.d_gate_up_RN);
}

namespace reference {
void swiglu(const SwigluArgs& args, Workers& workers);
void swiglu_backward(const SwigluBackwardArgs& args, Workers& workers);
}  // namespace reference
namespace cuda {
void swiglu(const SwigluArgs& args, Stream& stream);
void swiglu_backward(const SwigluBackwardArgs& args, Stream& stream);
}  // namespace cuda

inline void swiglu(const SwigluArgs& args, OpCall call) {
  execute(args, call, reference::swiglu, kHasCuda ? cuda::swiglu : nullptr);
}
inline void swiglu_backward(const SwigluBackwardArgs& args, OpCall call) {
  execute(args, call, reference::swiglu_backward, kHasCuda ? cuda::swiglu_backward : nullptr);
}

}  // namespace cambium
