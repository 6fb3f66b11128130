// Cross entropy of a softmax over the vocabulary, and its gradient in the same pass.
//
//   loss_T = log(sum_v exp(logits - max)) + max - logits[target]        (fp32)
//   d_logits_TV = exp(logits - max) / sum - onehot(target)              (unscaled)
// A row whose target is -1 is ignored: loss 0, gradient row zero. The sum over V uses 8 lanes in a
// fixed order; a row depends on nothing but itself (D2). Gradients are sums over tokens; the
// optimizer divides by the number of targets once.
// Napkin: 4 T V bytes read, 4 T V written with the gradient; one exp per logit, about 5 T V FLOPs.
#pragma once

#include "kernels/op.h"

namespace cambium {

constexpr int32_t kIgnoredTarget = -1;

struct CrossEntropyArgs {
  In<Real> logits_TV;
  In<int32_t> target_T;        // in [0, V), or kIgnoredTarget
  Out<float> loss_T;           // 0 where ignored
  Out<Real> d_logits_TV = {};  // optional; may be the same memory as logits_TV
};

inline void check_args(const CrossEntropyArgs& a) {
  const int64_t T = a.logits_TV[0], V = a.logits_TV[1];
  check_shape("cross_entropy", "target_T", a.target_T, Shape(T));
  check_shape("cross_entropy", "loss_T", a.loss_T, Shape(T));
  if (!a.d_logits_TV.empty()) {
    check_shape("cross_entropy", "d_logits_TV", a.d_logits_TV, Shape(T, V));
  }
  CHECK_GE(V, 1);
}

inline Cost cost(const CrossEntropyArgs& a) {
  const int64_t T = a.logits_TV[0], V = a.logits_TV[1], width = dtype_bytes(a.logits_TV.dtype);
  const int64_t passes = a.d_logits_TV.empty() ? 1 : 2;
  return {"cross_entropy", {T, V}, (3 + passes) * T * V, passes * width * T * V + 8 * T, 0};
}

template <class Visitor>
void visit_views(const CrossEntropyArgs& a, Visitor&& visit) {
  visit("logits_TV", a.logits_TV);
  visit("target_T", a.target_T);
  visit("loss_T", a.loss_T);
  visit("d_logits_TV", a.d_logits_TV);
}

namespace reference {
void cross_entropy(const CrossEntropyArgs& args, Workers& workers);
}  // namespace reference
namespace cuda {
void cross_entropy(const CrossEntropyArgs& args, Stream& stream);
}  // namespace cuda

inline void cross_entropy(const CrossEntropyArgs& args, OpCall call) {
  execute(args, call, reference::cross_entropy, kHasCuda ? cuda::cross_entropy : nullptr);
}

}  // namespace cambium
