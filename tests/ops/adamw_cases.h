// Cases and oracle of AdamW.
#pragma once

#include "kernels/adamw.h"
#include "tests/ops/op_test.h"

namespace cambium::test {

inline const std::vector<int64_t> kAdamwCases = {0, 1, 7, 8, 9, 1000, 32768, 32769, 100003};

struct AdamwSettings {
  double lr = 3e-3, beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, weight_decay = 0.1;
};

struct AdamwState {
  std::vector<double> param, m, v;
};

// One step of Algorithm 2 of the paper, in fp64. `step` counts from 1.
inline void adamw_oracle(const AdamwSettings& s, int64_t step, const std::vector<double>& grad,
                         AdamwState& state) {
  const double correction1 = 1 - std::pow(s.beta1, static_cast<double>(step));
  const double correction2 = 1 - std::pow(s.beta2, static_cast<double>(step));
  for (size_t i = 0; i < grad.size(); ++i) {
    state.m[i] = s.beta1 * state.m[i] + (1 - s.beta1) * grad[i];
    state.v[i] = s.beta2 * state.v[i] + (1 - s.beta2) * grad[i] * grad[i];
    const double m_hat = state.m[i] / correction1, v_hat = state.v[i] / correction2;
    state.param[i] -=
        s.lr * (m_hat / (std::sqrt(v_hat) + s.epsilon)) + s.lr * s.weight_decay * state.param[i];
  }
}

struct AdamwTensors {
  TestTensor param, m, v, grad, blocks, scale;
  AdamwTensors(int64_t N, uint64_t seed, DType moments = DType::f32)
      : param(Shape(N)),
        m(Shape(N), moments),
        v(Shape(N), moments),
        grad(Shape(N)),
        blocks(whole_tensor_blocks(N)),
        scale(Shape(1)) {
    TestRandom random(seed);
    param.fill_normal(random, 0.02);
    grad.fill_normal(random);
    m.fill(0);
    v.fill(0);
    scale.fill(1);
  }
};

inline AdamwArgs adamw_args(AdamwTensors& t, const AdamwSettings& s, int64_t step) {
  return {.param_N = t.param.inout<float>(),
          .m_N = t.m.inout<Real>(),
          .v_N = t.v.inout<Real>(),
          .grad_N = t.grad.in<float>(),
          .table = {t.blocks.in<int32_t>(), t.param.elements()},
          .scale_1 = t.scale.in<float>(),
          .step = step,
          .lr = s.lr,
          .beta1 = s.beta1,
          .beta2 = s.beta2,
          .epsilon = s.epsilon,
          .weight_decay = s.weight_decay,
          .bias_correction1 = 1 - std::pow(s.beta1, static_cast<double>(step)),
          .bias_correction2 = 1 - std::pow(s.beta2, static_cast<double>(step))};
}

}  // namespace cambium::test
