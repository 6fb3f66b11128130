// Cases and fp64 oracle of cross_entropy.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cross_entropy.h"
#include "tests/ops/op_test.h"

namespace cambium::test {

struct CrossEntropyCase {
  int64_t T = 0;
  int64_t V = 0;
};

inline const std::vector<CrossEntropyCase> kCrossEntropyCases = {
    {1, 1}, {9, 5}, {7, 31}, {16, 32}, {33, 33}, {5, 1024}, {64, 1000}, {3, 4099}};

struct CrossEntropyExpected {
  std::vector<double> loss, d_logits;
};

inline CrossEntropyExpected cross_entropy_oracle(const std::vector<double>& logits,
                                                 const std::vector<double>& target, int64_t V) {
  const int64_t T = static_cast<int64_t>(target.size());
  CrossEntropyExpected expected{std::vector<double>(T, 0.0), std::vector<double>(T * V, 0.0)};
  for (int64_t t = 0; t < T; ++t) {
    if (target[t] < 0) continue;
    const double* x = logits.data() + t * V;
    const double largest = *std::max_element(x, x + V);
    double total = 0.0;
    for (int64_t v = 0; v < V; ++v) total += std::exp(x[v] - largest);
    const int64_t at = static_cast<int64_t>(target[t]);
    expected.loss[t] = std::log(total) + largest - x[at];
    for (int64_t v = 0; v < V; ++v) {
      expected.d_logits[t * V + v] = std::exp(x[v] - largest) / total - (v == at ? 1.0 : 0.0);
    }
  }
  return expected;
}

}  // namespace cambium::test
