#include "kernels/adamw.h"

#include <cmath>

#include "reference/chunks.h"
#include "reference/rounding.h"

namespace cambium::reference {

namespace {

constexpr int64_t kAdamwElements = 8192;  // per chunk: 128 KiB of operands; an expert has several

// Coefficients rounded once from fp64.
struct AdamwCoefficients {
  float scale, decay, one_minus_beta1, beta2, one_minus_beta2, root_correction2, epsilon, step;
};

AdamwCoefficients coefficients(const AdamwArgs& a, float scale) {
  return {scale,
          static_cast<float>(1.0 - a.lr * a.weight_decay),
          static_cast<float>(1.0 - a.beta1),
          static_cast<float>(a.beta2),
          static_cast<float>(1.0 - a.beta2),
          static_cast<float>(std::sqrt(a.bias_correction2)),
          static_cast<float>(a.epsilon),
          static_cast<float>(a.lr / a.bias_correction1)};
}

void update_range(const AdamwCoefficients& c, int64_t count, const float* __restrict grad,
                  float* __restrict param, float* __restrict m, float* __restrict v) {
  for (int64_t i = 0; i < count; ++i) {
    const float g = grad[i] * c.scale;
    const float m_new = m[i] + c.one_minus_beta1 * (g - m[i]);
    const float v_new = v[i] * c.beta2 + c.one_minus_beta2 * g * g;
    const float denominator = std::sqrt(v_new) / c.root_correction2 + c.epsilon;
    param[i] = param[i] * c.decay - c.step * m_new / denominator;
    m[i] = m_new;
    v[i] = v_new;
  }
}

void copy_range(const AdamwArgs& a, int64_t begin, int64_t end) {
  const float* param = a.param_N.pointer();
  if (a.compute_N.dtype == DType::f32) {
    std::copy(param + begin, param + end, static_cast<float*>(a.compute_N.data) + begin);
    return;
  }
  auto* bits = static_cast<uint16_t*>(a.compute_N.data);
  for (int64_t i = begin; i < end; ++i) bits[i] = f32_to_bf16(param[i]);
}

}  // namespace

void adamw(const AdamwArgs& a, Workers& workers) {
  const float scale = a.scale_1.pointer()[0];
  if (scale != scale) return;  // NaN: no update
  const AdamwCoefficients c = coefficients(a, scale);
  for_ranges(workers, a.param_N[0], kAdamwElements, [&](int64_t begin, int64_t end) {
    update_range(c, end - begin, a.grad_N.pointer() + begin, a.param_N.pointer() + begin,
                 a.m_N.pointer() + begin, a.v_N.pointer() + begin);
    if (!a.compute_N.empty()) copy_range(a, begin, end);
  });
}

}  // namespace cambium::reference
