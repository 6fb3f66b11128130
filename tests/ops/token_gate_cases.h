// Cases and fp64 oracle of token_gate.
#pragma once

#include <cmath>
#include <vector>

#include "kernels/token_gate.h"
#include "tests/ops/op_test.h"

namespace cambium::test {

struct TokenGateCase {
  int64_t T = 0;
  int64_t D = 0;
  int64_t F = 0;
  int64_t block_tokens = 0;
};

inline const std::vector<TokenGateCase> kTokenGateCases = {
    {1, 1, 1, 1}, {7, 8, 3, 3}, {31, 33, 65, 16}, {64, 32, 40, 32}, {40, 128, 256, 16},
};

struct TokenGateValues {
  std::vector<double> x, w, h, d_y, d_residual;  // d_residual: empty without one
};

struct TokenGateExpected {
  std::vector<double> gate, y, d_logit, d_h, d_x, d_w_leaf;
};

inline TokenGateExpected token_gate_oracle(const TokenGateValues& v, const TokenGateCase& c) {
  TokenGateExpected e;
  e.gate.resize(c.T), e.d_logit.resize(c.T);
  e.y.resize(c.T * c.F), e.d_h.resize(c.T * c.F), e.d_x.resize(c.T * c.D);
  e.d_w_leaf.assign((c.T + c.block_tokens - 1) / c.block_tokens * c.D, 0.0);
  for (int64_t t = 0; t < c.T; ++t) {
    double logit = 0.0, along = 0.0;
    for (int64_t i = 0; i < c.D; ++i) logit += v.x[t * c.D + i] * v.w[i];
    const double gate = 1.0 / (1.0 + std::exp(-logit));
    e.gate[t] = gate;
    for (int64_t i = 0; i < c.F; ++i) {
      e.y[t * c.F + i] = gate * v.h[t * c.F + i];
      e.d_h[t * c.F + i] = gate * v.d_y[t * c.F + i];
      along += v.d_y[t * c.F + i] * v.h[t * c.F + i];
    }
    e.d_logit[t] = gate * (1.0 - gate) * along;
    for (int64_t i = 0; i < c.D; ++i) {
      e.d_x[t * c.D + i] = e.d_logit[t] * v.w[i];
      if (!v.d_residual.empty()) e.d_x[t * c.D + i] += v.d_residual[t * c.D + i];
      e.d_w_leaf[t / c.block_tokens * c.D + i] += e.d_logit[t] * v.x[t * c.D + i];
    }
  }
  return e;
}

}  // namespace cambium::test
