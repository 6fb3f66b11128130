// AdamW with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), in PyTorch's order:
//
//   g = grad * scale_1                      (1/N and the clip factor: kernels/grad_norm.h)
//   p = p * (1 - lr * weight_decay)
//   m = m + (1 - beta1) * (g - m)
//   v = v * beta2 + (1 - beta2) * g * g
//   p = p - (lr / bias_correction1) * m / (sqrt(v) / sqrt(bias_correction2) + epsilon)
//
// A scale_1 that is NaN means "no update": clip_scale stores NaN when the norm is not finite, and
// param, m, v and the compute copy then keep every bit.
// Coefficients are formed in fp64 and rounded once to fp32, as PyTorch does; elements are fp32.
// Blocks of a flat buffer (kernels/block_table.h) share a call; those that do not decay take
// weight_decay = 0, and padding is left alone.
// Moments may be stored in bf16: widened, used unrounded in the step of p, and stored rounded up or
// down with the odds of the distance, by 16 bits each of adamw_dither(canonical block, element in
// it, step). To nearest, v beta2 with beta2 > 1 - 2^-9 would never shrink.
// Napkin: 28 N bytes (30 with the bf16 copy, 22 with bf16 moments too), 15 N FLOPs; memory bound.
#pragma once

#include "kernels/block_table.h"

namespace cambium {

struct AdamwArgs {
  InOut<float> param_N;
  InOut<Real> m_N;
  InOut<Real> v_N;  // stored as m_N is
  In<float> grad_N;
  BlockTable table;
  In<float> scale_1;    // on the device; NaN = no update
  Out<Real> compute_N;  // optional: the parameters in compute precision
  int64_t step = 1;     // from 1
  double lr = 0;
  double beta1 = 0;
  double beta2 = 0;
  double epsilon = 0;
  double weight_decay = 0;
  double bias_correction1 = 1;  // 1 - beta1^step
  double bias_correction2 = 1;  // 1 - beta2^step
};

inline void check_args(const AdamwArgs& a) {
  const int64_t N = a.param_N.elements();
  check_shape("adamw", "param_N", a.param_N, Shape(N));
  check_shape("adamw", "m_N", a.m_N, Shape(N));
  check_shape("adamw", "v_N", a.v_N, Shape(N));
  CHECK(a.m_N.dtype == a.v_N.dtype);
  check_shape("adamw", "grad_N", a.grad_N, Shape(N));
  check_block_table("adamw", a.table, N);
  check_shape("adamw", "scale_1", a.scale_1, Shape(1));
  if (!a.compute_N.empty()) check_shape("adamw", "compute_N", a.compute_N, Shape(N));
  CHECK_GT(a.bias_correction1, 0.0);
  CHECK_GT(a.bias_correction2, 0.0);
}

inline Cost cost(const AdamwArgs& a) {
  const int64_t N = a.table.elements, whole = a.param_N.elements();  // with padding
  const int64_t copy = a.compute_N.empty() ? 0 : dtype_bytes(a.compute_N.dtype);
  const int64_t moments = 4 * dtype_bytes(a.m_N.dtype);
  return {"adamw", {whole}, 15 * N, (12 + moments + copy) * whole, 0};
}

template <class Visitor>
void visit_views(const AdamwArgs& a, Visitor&& visit) {
  visit("param_N", a.param_N);
  visit("m_N", a.m_N);
  visit("v_N", a.v_N);
  visit("grad_N", a.grad_N);
  visit_views(a.table, visit);
  visit("scale_1", a.scale_1);
  visit("compute_N", a.compute_N);
}

namespace reference {
void adamw(const AdamwArgs& args, Workers& workers);
}
namespace cuda {
void adamw(const AdamwArgs& args, Stream& stream);
}  // namespace cuda

inline void adamw(const AdamwArgs& args, OpCall call) {
  execute(args, call, reference::adamw, kHasCuda ? cuda::adamw : nullptr);
}

}  // namespace cambium
