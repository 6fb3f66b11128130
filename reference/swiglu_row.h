// SwiGLU of one row (kernels/swiglu.h): shared by the op and by the grouped GEMM's epilogues.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "src/base/fmath.h"

namespace cambium::reference {

inline float sigmoid(float x) { return 1.0f / (1.0f + fmath::exp(-x)); }

inline void swiglu_row(const float* gate, const float* up, float* h, int64_t count) {
  for (int64_t i = 0; i < count; ++i) h[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

// Reads each d_h[i] before it writes element i: d_gate may be the memory of d_h.
inline void swiglu_backward_row(const float* gate, const float* up, const float* d_h, float* d_gate,
                                float* d_up, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const float s = sigmoid(gate[i]);
    const float gradient = d_h[i];
    d_up[i] = gradient * (gate[i] * s);
    d_gate[i] = gradient * up[i] * (s * (1.0f + gate[i] * (1.0f - s)));
  }
}

// <a, b> in eight interleaved chains, combined pairwise; the tail follows in order.
inline float row_dot(const float* a, const float* b, int64_t count) {
  __m256 sum = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    sum = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), sum);
  }
  alignas(32) float lane[8];
  _mm256_store_ps(lane, sum);
  float total =
      ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
  for (; i < count; ++i) total = __builtin_fmaf(a[i], b[i], total);
  return total;
}

}  // namespace cambium::reference
