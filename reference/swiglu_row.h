// SwiGLU of one row (kernels/swiglu.h): shared by the op and by the grouped GEMM's epilogues.
// The formulas are written once for a float and for groups of lanes; rows walk in groups of 32 and
// finish one by one.
#pragma once

#include <cstdint>

#include "reference/lane_group.h"

namespace cambium::reference {

[[gnu::always_inline]] inline float sigmoid(float x) { return 1.0f / (1.0f + fmath::exp(-x)); }
[[gnu::always_inline]] inline LaneFloats sigmoid(const LaneFloats& x) {
  return 1.0f / (1.0f + exp_lanes(-x));
}

// What the backward needs of an element, or of a group of them.
template <class Float>
struct SwigluPoint {
  Float silu;        // gate * s(gate)
  Float derivative;  // of silu: s * (1 + gate * (1 - s))
};

template <class Float>
[[gnu::always_inline]] inline SwigluPoint<Float> swiglu_point(const Float& gate) {
  const Float s = sigmoid(gate);
  return {gate * s, s * (1.0f + gate * (1.0f - s))};
}

inline void swiglu_row(const float* gate, const float* up, float* h, int64_t count) {
  int64_t i = 0;
  for (; i + kGroupLanes <= count; i += kGroupLanes) {
    const LaneFloats g = load_group(gate + i);
    store_group(h + i, g * sigmoid(g) * load_group(up + i));
  }
  for (; i < count; ++i) h[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

// d_gate may be the memory of d_h.
inline void swiglu_backward_row(const float* gate, const float* up, const float* d_h, float* d_gate,
                                float* d_up, int64_t count) {
  int64_t i = 0;
  for (; i + kGroupLanes <= count; i += kGroupLanes) {
    const SwigluPoint point = swiglu_point(load_group(gate + i));
    const LaneFloats gradient = load_group(d_h + i);
    const LaneFloats d_silu = gradient * load_group(up + i);
    store_group(d_up + i, gradient * point.silu);
    store_group(d_gate + i, d_silu * point.derivative);
  }
  for (; i < count; ++i) {
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
inline float down_dgrad_row(const DownDgradRow& r, int64_t count) {
  LaneFloats sum = {};
  int64_t i = 0;
  for (; i + kGroupLanes <= count; i += kGroupLanes) {
    const SwigluPoint point = swiglu_point(load_group(r.gate + i));
    const LaneFloats up = load_group(r.up + i), g = load_group(r.d_gate + i);
    const LaneFloats h = point.silu * up, gradient = r.weight * g;
    sum = GroupOps::fused(g, h, sum);
    store_group(r.weighted_h + i, r.weight * h);
    store_group(r.d_up + i, gradient * point.silu);
    store_group(r.d_gate + i, gradient * up * point.derivative);
  }
  float lane[kGroupLanes];
  store_group(lane, sum);
  for (int64_t l = 0; i < count; ++i, ++l) {
    const SwigluPoint point = swiglu_point(r.gate[i]);
    const float h = point.silu * r.up[i], g = r.d_gate[i], gradient = r.weight * g;
    lane[l] = __builtin_fmaf(g, h, lane[l]);
    r.weighted_h[i] = r.weight * h;
    r.d_up[i] = gradient * point.silu;
    r.d_gate[i] = gradient * r.up[i] * point.derivative;
  }
  for (int64_t width = kGroupLanes / 2; width > 0; width /= 2) {
    for (int64_t l = 0; l < width; ++l) lane[l] = lane[l] + lane[l + width];
  }
  return lane[0];
}

}  // namespace cambium::reference
