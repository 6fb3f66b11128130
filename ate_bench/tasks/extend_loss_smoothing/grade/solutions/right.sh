cat >kernels/smoothed_cross_entropy.h <<'H'
// Cross entropy with label smoothing (Szegedy et al., arXiv 1512.00567, section 7).
//
//   q_v = (1 - epsilon) onehot(target)_v + epsilon / V
//   loss_T = -sum_v q_v log softmax(logits)_v,  d_logits_TV = softmax(logits)_v - q_v
// A row whose target is -1 is ignored: loss 0, gradient row zero.
#pragma once

#include "kernels/op.h"

namespace cambium {

struct SmoothedCrossEntropyArgs {
  In<float> logits_TV;
  In<int32_t> target_T;
  Out<float> loss_T;
  Out<float> d_logits_TV;
  float epsilon = 0;
};

inline void check_args(const SmoothedCrossEntropyArgs& a) {
  const int64_t T = a.logits_TV[0], V = a.logits_TV[1];
  check_shape("smoothed_cross_entropy", "target_T", a.target_T, Shape(T));
  check_shape("smoothed_cross_entropy", "loss_T", a.loss_T, Shape(T));
  check_shape("smoothed_cross_entropy", "d_logits_TV", a.d_logits_TV, Shape(T, V));
}

namespace reference {
void smoothed_cross_entropy(const SmoothedCrossEntropyArgs& args, Workers& workers);
}

}  // namespace cambium
H
cat >reference/smoothed_cross_entropy.cc <<'H'
#include "kernels/smoothed_cross_entropy.h"

#include <algorithm>

#include "reference/chunks.h"
#include "src/base/fmath.h"

namespace cambium::reference {

void smoothed_cross_entropy(const SmoothedCrossEntropyArgs& a, Workers& workers) {
  check_args(a);
  const int64_t T = a.logits_TV[0], V = a.logits_TV[1];
  const float spread = a.epsilon / static_cast<float>(V);
  for_ranges(workers, T, items_per_chunk(V), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* logits = a.logits_TV.pointer() + t * a.logits_TV.row_stride;
      float* gradient = a.d_logits_TV.pointer() + t * a.d_logits_TV.row_stride;
      const int32_t target = a.target_T.pointer()[t];
      a.loss_T.pointer()[t] = 0;
      std::fill(gradient, gradient + V, 0.0f);
      if (target < 0) continue;
      const float most = *std::max_element(logits, logits + V);
      float total = 0, shifted_sum = 0;
      for (int64_t v = 0; v < V; ++v) {
        gradient[v] = fmath::exp(logits[v] - most);
        total += gradient[v];
        shifted_sum += logits[v] - most;
      }
      a.loss_T.pointer()[t] = fmath::log(total) -
                              (1.0f - a.epsilon) * (logits[target] - most) - spread * shifted_sum;
      for (int64_t v = 0; v < V; ++v) gradient[v] = gradient[v] / total - spread;
      gradient[target] -= 1.0f - a.epsilon;
    }
  });
}

}  // namespace cambium::reference
H
