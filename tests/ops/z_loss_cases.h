// Cases and oracle of the router's z-loss.
#pragma once

#include "kernels/z_loss.h"
#include "tests/ops/op_test.h"

namespace cambium::test {

struct ZLossCase {
  int64_t T, E;
};

inline const std::vector<ZLossCase> kZLossCases = {{0, 8},  {1, 1},   {3, 7},    {17, 8},
                                                   {33, 9}, {64, 64}, {1024, 8}, {100, 257}};

struct ZLossExpected {
  std::vector<double> loss_T, d_logits_TE;
};

inline ZLossExpected z_loss_oracle(const std::vector<double>& logits_TE, int64_t E,
                                   double loss_scale, double gradient_scale) {
  const auto T = static_cast<int64_t>(logits_TE.size()) / E;
  ZLossExpected expected{std::vector<double>(T), std::vector<double>(T * E)};
  for (int64_t t = 0; t < T; ++t) {
    const auto row = logits_TE.begin() + t * E;
    const double most = *std::max_element(row, row + E);
    double sum = 0;
    for (int64_t e = 0; e < E; ++e) sum += std::exp(row[e] - most);
    const double lse = most + std::log(sum);
    expected.loss_T[t] = loss_scale * lse * lse;
    for (int64_t e = 0; e < E; ++e) {
      expected.d_logits_TE[t * E + e] = gradient_scale * 2 * lse * std::exp(row[e] - lse);
    }
  }
  return expected;
}

}  // namespace cambium::test
