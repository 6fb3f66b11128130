// Cases and fp64 oracle of rms_norm.
#pragma once

#include <cmath>
#include <vector>

#include "kernels/rms_norm.h"
#include "tests/ops/op_test.h"

namespace cambium::test {

enum class Residual { absent, present };

struct RmsNormCase {
  int64_t T = 0;
  int64_t D = 0;
  int64_t block_tokens = 0;
  Residual residual = Residual::absent;
};

inline const std::vector<RmsNormCase> kRmsNormCases = {
    {1, 1, 1, Residual::absent},      {7, 8, 3, Residual::present},
    {31, 33, 16, Residual::present},  {64, 31, 32, Residual::absent},
    {33, 100, 16, Residual::absent},  {17, 257, 8, Residual::present},
    {64, 128, 32, Residual::present}, {256, 128, 32, Residual::present},
};

struct RmsNormExpected {
  std::vector<double> sum, y, rstd;
};

inline RmsNormExpected rms_norm_oracle(const std::vector<double>& x,
                                       const std::vector<double>& residual,
                                       const std::vector<double>& gain, int64_t T, double epsilon) {
  const int64_t D = static_cast<int64_t>(gain.size());
  RmsNormExpected expected{x, std::vector<double>(x.size()), std::vector<double>(T)};
  for (int64_t t = 0; t < T; ++t) {
    double squares = 0.0;
    for (int64_t i = 0; i < D; ++i) {
      double& s = expected.sum[t * D + i];
      if (!residual.empty()) s += residual[t * D + i];
      squares += s * s;
    }
    expected.rstd[t] = 1.0 / std::sqrt(squares / static_cast<double>(D) + epsilon);
    for (int64_t i = 0; i < D; ++i) {
      expected.y[t * D + i] = gain[i] * expected.sum[t * D + i] * expected.rstd[t];
    }
  }
  return expected;
}

struct RmsNormGradients {
  std::vector<double> d_x, d_gain_leaf;
};

inline RmsNormGradients rms_norm_backward_oracle(const std::vector<double>& d_y,
                                                 const std::vector<double>& x,
                                                 const std::vector<double>& gain,
                                                 const std::vector<double>& d_residual,
                                                 const RmsNormCase& c, double epsilon) {
  const int64_t T = c.T, D = c.D, B = (T + c.block_tokens - 1) / c.block_tokens;
  RmsNormGradients expected{std::vector<double>(T * D), std::vector<double>(B * D, 0.0)};
  for (int64_t t = 0; t < T; ++t) {
    double squares = 0.0, along = 0.0;
    for (int64_t i = 0; i < D; ++i) squares += x[t * D + i] * x[t * D + i];
    const double rstd = 1.0 / std::sqrt(squares / static_cast<double>(D) + epsilon);
    for (int64_t i = 0; i < D; ++i) along += gain[i] * d_y[t * D + i] * x[t * D + i] * rstd;
    for (int64_t i = 0; i < D; ++i) {
      const double n = x[t * D + i] * rstd, mean = along / static_cast<double>(D);
      double& d_x = expected.d_x[t * D + i];
      d_x = rstd * (gain[i] * d_y[t * D + i] - n * mean);
      if (!d_residual.empty()) d_x += d_residual[t * D + i];
      expected.d_gain_leaf[t / c.block_tokens * D + i] += d_y[t * D + i] * n;
    }
  }
  return expected;
}

}  // namespace cambium::test
