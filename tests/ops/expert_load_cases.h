// Cases and oracles of the expert histogram and the selection bias.
#pragma once

#include "kernels/expert_load.h"
#include "tests/ops/op_test.h"
#include "tests/ops/routing_test.h"

namespace cambium::test {

inline const std::vector<RoutingCase> kExpertLoadCases = {
    {0, 4, 1, Spread::random},    {1, 1, 1, Spread::random}, {7, 13, 3, Spread::random},
    {40, 8, 2, Spread::one},      {31, 8, 2, Spread::lower}, {1024, 8, 2, Spread::random},
    {9000, 64, 6, Spread::random}};

inline std::vector<double> histogram_oracle(const TestTensor& index_TK, int64_t E) {
  std::vector<double> count_E(static_cast<size_t>(E), 0.0);
  for (const double e : index_TK.values()) {
    if (e >= 0) count_E[static_cast<size_t>(e)] += 1;
  }
  return count_E;
}

}  // namespace cambium::test
