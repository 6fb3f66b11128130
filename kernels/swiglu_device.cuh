// SwiGLU of one element on the GPU (kernels/swiglu.h), for the op and for the epilogues of the
// grouped GEMM: one formula, so that h recomputed from a stored gate_up has the same bits. Also the
// widening and rounding of stored elements.
#pragma once

#include <cuda_bf16.h>

namespace cambium::cuda {

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// `value` as it reads back from storage of type Element.
template <class Element>
__device__ __forceinline__ float round_to(float value) {
  return widen(Element(value));
}

// Two instructions of the special-function unit and two others; relative error below 2^-21. NOTE:
// __expf and __fdividef give the same bits in three times as many: they keep results that are not
// normal, which 1 + power does not see.
__device__ __forceinline__ float sigmoid(float x) {
  constexpr float kLog2E = 1.4426950408889634f;
  float power, result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-x * kLog2E));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.0f + power));
  return result;
}

__device__ __forceinline__ float swiglu_value(float gate, float up) {
  return gate * sigmoid(gate) * up;
}

// One element of the down dgrad: g = (d_y W_down) of the element.
struct DownDgradPoint {
  float h = 0;  // silu(gate) * up
  float weighted_h = 0;
  float d_gate = 0;
  float d_up = 0;
};

__device__ __forceinline__ DownDgradPoint down_dgrad_point(float gate, float up, float weight,
                                                           float g) {
  const float s = sigmoid(gate), silu = gate * s, gradient = weight * g;
  DownDgradPoint point;
  point.h = silu * up;
  point.weighted_h = weight * point.h;
  point.d_up = gradient * silu;
  point.d_gate = gradient * up * (s * (1.0f + gate * (1.0f - s)));
  return point;
}

}  // namespace cambium::cuda
