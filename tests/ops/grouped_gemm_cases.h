// Cases and oracles of the grouped GEMM.
#pragma once

#include <numeric>

#include "kernels/grouped_gemm.h"
#include "tests/ops/linear_cases.h"
#include "tests/ops/swiglu_cases.h"

namespace cambium::test {

struct GroupedCase {
  std::vector<int64_t> rows;  // of each expert
  int64_t D, F;
  int64_t R() const { return std::accumulate(rows.begin(), rows.end(), int64_t{0}); }
  int64_t experts() const { return static_cast<int64_t>(rows.size()); }
  int64_t expert_of(int64_t row) const {
    int64_t expert = 0;
    while (row >= rows[expert]) row -= rows[expert++];
    return expert;
  }
};

// No rows, one row, empty experts first, between and last, all rows on one expert, around the
// 6 x 16 tile, beyond the depth block, production shape.
inline const std::vector<GroupedCase> kGroupedCases = {
    {{0, 0, 0}, 8, 4},
    {{1}, 5, 3},
    {{0, 1, 0, 7}, 16, 8},
    {{0, 50, 0, 0}, 24, 13},
    {{5, 6, 7, 15, 0}, 17, 33},
    {{40, 3, 16}, 280, 270},
    {{32, 20, 45, 31}, 128, 256},
};

inline TestTensor offsets_tensor(const GroupedCase& c) {
  TestTensor offsets(Shape(c.experts() + 1), DType::i32);
  int64_t sum = 0;
  offsets.set(0, 0);
  for (int64_t x = 0; x < c.experts(); ++x) {
    offsets.set(x + 1, static_cast<double>(sum += c.rows[x]));
  }
  return offsets;
}

// out[r][n] = sum_k x[r][k] w[expert of r][n][k]
inline std::vector<double> grouped_forward_oracle(const GroupedCase& c,
                                                  const std::vector<double>& x,
                                                  const std::vector<double>& w, int64_t N,
                                                  int64_t K) {
  std::vector<double> out(static_cast<size_t>(c.R() * N), 0.0);
  for (int64_t r = 0; r < c.R(); ++r) {
    const double* matrix = w.data() + c.expert_of(r) * N * K;
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t k = 0; k < K; ++k) out[r * N + n] += x[r * K + k] * matrix[n * K + k];
    }
  }
  return out;
}

// out[r][k] = sum_n d_y[r][n] w[expert of r][n][k]
inline std::vector<double> grouped_dgrad_oracle(const GroupedCase& c,
                                                const std::vector<double>& d_y,
                                                const std::vector<double>& w, int64_t N,
                                                int64_t K) {
  std::vector<double> out(static_cast<size_t>(c.R() * K), 0.0);
  for (int64_t r = 0; r < c.R(); ++r) {
    const double* matrix = w.data() + c.expert_of(r) * N * K;
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t k = 0; k < K; ++k) out[r * K + k] += d_y[r * N + n] * matrix[n * K + k];
    }
  }
  return out;
}

// out[x][n][k] = sum over the rows r of expert x of d_y[r][n] x[r][k]
inline std::vector<double> grouped_wgrad_oracle(const GroupedCase& c,
                                                const std::vector<double>& d_y,
                                                const std::vector<double>& x, int64_t N,
                                                int64_t K) {
  std::vector<double> out(static_cast<size_t>(c.experts() * N * K), 0.0);
  for (int64_t r = 0; r < c.R(); ++r) {
    double* matrix = out.data() + c.expert_of(r) * N * K;
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t k = 0; k < K; ++k) matrix[n * K + k] += d_y[r * N + n] * x[r * K + k];
    }
  }
  return out;
}

// Everything that one expert layer computes, forward and backward, in fp64.
struct ExpertLayerOracle {
  std::vector<double> gate_up, h, y;
  std::vector<double> weighted_h, d_weight, d_gate_up, d_x;
};

struct ExpertLayerInputs {
  std::vector<double> x, w_up, w_down, weight, d_y;  // weight is empty when rows are unweighted
};

inline ExpertLayerOracle expert_layer_oracle(const GroupedCase& c, const ExpertLayerInputs& in) {
  ExpertLayerOracle out;
  const int64_t R = c.R(), D = c.D, F = c.F;
  auto weight = [&](int64_t row) { return in.weight.empty() ? 1.0 : in.weight[row]; };
  out.gate_up = grouped_forward_oracle(c, in.x, in.w_up, 2 * F, D);
  out.h = swiglu_oracle(out.gate_up, F);
  out.y = grouped_forward_oracle(c, out.h, in.w_down, D, F);
  std::vector<double> d_h = grouped_dgrad_oracle(c, in.d_y, in.w_down, D, F);
  out.weighted_h = out.h;
  out.d_weight.assign(static_cast<size_t>(R), 0.0);
  for (int64_t i = 0; i < R * D; ++i) out.y[i] *= weight(i / D);
  for (int64_t i = 0; i < R * F; ++i) {
    out.d_weight[i / F] += d_h[i] * out.h[i];
    out.weighted_h[i] *= weight(i / F);
    d_h[i] *= weight(i / F);
  }
  out.d_gate_up = swiglu_backward_oracle(out.gate_up, d_h, F);
  out.d_x = grouped_dgrad_oracle(c, out.d_gate_up, in.w_up, 2 * F, D);
  return out;
}

}  // namespace cambium::test
