cat >kernels/lion.h <<'H'
// Lion (Chen et al., arXiv 2302.06675, algorithm 2), with decoupled weight decay:
//
//   g = grad * grad_scale
//   p = p - lr * (sign(beta1 m + (1 - beta1) g) + weight_decay p)        sign(0) = 0
//   m = beta2 m + (1 - beta2) g
// Napkin: 12 bytes read and 8 written an element, about 9 FLOPs; memory bound.
#pragma once

#include "kernels/op.h"

namespace cambium {

struct LionArgs {
  InOut<float> param;  // [n]
  InOut<float> momentum;
  In<float> grad;
  float lr = 0, beta1 = 0, beta2 = 0, weight_decay = 0, grad_scale = 1;
};

inline void check_args(const LionArgs& a) {
  check_shape("lion", "momentum", a.momentum, Shape(a.param[0]));
  check_shape("lion", "grad", a.grad, Shape(a.param[0]));
}

namespace reference {
void lion(const LionArgs& args, Workers& workers);
}

}  // namespace cambium
H
cat >reference/lion.cc <<'H'
#include "kernels/lion.h"

#include "reference/chunks.h"

namespace cambium::reference {

void lion(const LionArgs& a, Workers& workers) {
  check_args(a);
  for_ranges(workers, a.param[0], items_per_chunk(1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float& p = a.param.pointer()[i];
      float& m = a.momentum.pointer()[i];
      const float g = a.grad.pointer()[i] * a.grad_scale;
      const float c = a.beta1 * m + (1.0f - a.beta1) * g;
      const float sign = static_cast<float>((c > 0) - (c < 0));
      p -= a.lr * (sign + a.weight_decay * p);
      m = a.beta2 * m + (1.0f - a.beta2) * g;
    }
  });
}

}  // namespace cambium::reference
H
