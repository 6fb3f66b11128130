// Router z-loss (ST-MoE, arXiv 2202.08906, equation 5): keeps the router's logits small.
//
//   lse_t = log sum_e exp(logits_te)
//   loss_T = loss_scale * lse^2
//   d_logits_TE = gradient_scale * 2 * lse * softmax(logits)
//
// Napkin: 4 T E bytes read and written each, 6 T E FLOPs; memory bound.
#pragma once

#include "kernels/op.h"

namespace cambium {

struct ZLossArgs {
  In<float> logits_TE;
  float loss_scale = 0;
  float gradient_scale = 0;
  Out<float> loss_T;
  Out<float> d_logits_TE;  // goes to RouterTopkBackwardArgs::d_logits_in_TE
};

inline void check_args(const ZLossArgs& a) {
  const int64_t T = a.logits_TE[0], E = a.logits_TE[1];
  check_shape("z_loss", "logits_TE", a.logits_TE, Shape(T, E));
  check_shape("z_loss", "loss_T", a.loss_T, Shape(T));
  check_shape("z_loss", "d_logits_TE", a.d_logits_TE, Shape(T, E));
}

inline Cost cost(const ZLossArgs& a) {
  const int64_t T = a.logits_TE[0], E = a.logits_TE[1];
  return {"z_loss", {T, E}, 6 * T * E, 8 * T * E + 4 * T, 0};
}

template <class Visitor>
void visit_views(const ZLossArgs& a, Visitor&& visit) {
  visit("logits_TE", a.logits_TE);
  visit("loss_T", a.loss_T);
  visit("d_logits_TE", a.d_logits_TE);
}

namespace reference {
void z_loss(const ZLossArgs& args, Workers& workers);
}
namespace cuda {
void z_loss(const ZLossArgs& args, Stream& stream);
}  // namespace cuda

inline void z_loss(const ZLossArgs& args, OpCall call) {
  execute(args, call, reference::z_loss, kHasCuda ? cuda::z_loss : nullptr);
}

}  // namespace cambium
