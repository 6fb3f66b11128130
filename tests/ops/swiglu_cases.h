// Cases and oracles of SwiGLU.
#pragma once

#include "kernels/swiglu.h"
#include "tests/ops/op_test.h"

namespace cambium::test {

struct SwigluCase {
  int64_t R, F;
};

inline const std::vector<SwigluCase> kSwigluCases = {{0, 8},  {1, 1},   {3, 7},    {5, 8},
                                                     {17, 9}, {64, 96}, {200, 256}};

inline double sigmoid_oracle(double x) { return 1 / (1 + std::exp(-x)); }

// gate_up [R, 2F] -> h [R, F]
inline std::vector<double> swiglu_oracle(const std::vector<double>& gate_up, int64_t F) {
  std::vector<double> h(gate_up.size() / 2);
  for (size_t i = 0; i < h.size(); ++i) {
    const size_t at = i / F * 2 * F + i % F;
    h[i] = gate_up[at] * sigmoid_oracle(gate_up[at]) * gate_up[at + F];
  }
  return h;
}

// d_h [R, F] -> d_gate_up [R, 2F]
inline std::vector<double> swiglu_backward_oracle(const std::vector<double>& gate_up,
                                                  const std::vector<double>& d_h, int64_t F) {
  std::vector<double> d_gate_up(gate_up.size());
  for (size_t i = 0; i < d_h.size(); ++i) {
    const size_t at = i / F * 2 * F + i % F;
    const double gate = gate_up[at], s = sigmoid_oracle(gate);
    d_gate_up[at] = d_h[i] * gate_up[at + F] * s * (1 + gate * (1 - s));
    d_gate_up[at + F] = d_h[i] * gate * s;
  }
  return d_gate_up;
}

}  // namespace cambium::test
