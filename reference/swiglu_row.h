// SwiGLU of one row (kernels/swiglu.h): shared by the op and by the grouped GEMM's epilogues.
#pragma once

#include <cstdint>

#include "src/base/fmath.h"

namespace cambium::reference {

inline float sigmoid(float x) { return 1.0f / (1.0f + fmath::exp(-x)); }

// What the backward needs of one element.
struct SwigluPoint {
  float silu = 0;        // gate * s(gate)
  float derivative = 0;  // of silu: s * (1 + gate * (1 - s))
};

inline SwigluPoint swiglu_point(float gate) {
  const float s = sigmoid(gate);
  return {gate * s, s * (1.0f + gate * (1.0f - s))};
}

// NOTE: ivdep promises that no element depends on an earlier one, which holds when an output is an
// input's own memory, element for element.
inline void swiglu_row(const float* gate, const float* up, float* h, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) h[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

// d_gate may be the memory of d_h.
inline void swiglu_backward_row(const float* gate, const float* up, const float* d_h, float* d_gate,
                                float* d_up, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const SwigluPoint point = swiglu_point(gate[i]);
    const float gradient = d_h[i];
    d_up[i] = gradient * point.silu;
    d_gate[i] = gradient * up[i] * point.derivative;
  }
}

// One row of the down dgrad: g = d_y W_down in `d_gate` on entry.
//   weighted_h = weight * h, gradients of weight * h as in swiglu_backward_row; returns <g, h>.
struct DownDgradRow {
  const float* gate = nullptr;
  const float* up = nullptr;
  float weight = 1;
  float* d_gate = nullptr;
  float* d_up = nullptr;
  float* weighted_h = nullptr;
};

// Lane l of the dot product sums elements l, l + 32, ...; lanes are then added pairwise.
inline float down_dgrad_row(const DownDgradRow& row, int64_t count) {
  constexpr int64_t kLanes = 32;
  float lane[kLanes] = {};
  const DownDgradRow r = row;
  for (int64_t begin = 0; begin < count; begin += kLanes) {
    const int64_t lanes = count - begin < kLanes ? count - begin : kLanes;
#pragma GCC ivdep
    for (int64_t l = 0; l < lanes; ++l) {
      const int64_t i = begin + l;
      const SwigluPoint point = swiglu_point(r.gate[i]);
      const float h = point.silu * r.up[i], g = r.d_gate[i], gradient = r.weight * g;
      lane[l] = __builtin_fmaf(g, h, lane[l]);
      r.weighted_h[i] = r.weight * h;
      r.d_up[i] = gradient * point.silu;
      r.d_gate[i] = gradient * r.up[i] * point.derivative;
    }
  }
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t l = 0; l < width; ++l) lane[l] = lane[l] + lane[l + width];
  }
  return lane[0];
}

}  // namespace cambium::reference
