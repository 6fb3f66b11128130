// Cases and oracles of the gathers behind permute.
#pragma once

#include "kernels/permute.h"
#include "tests/ops/op_test.h"

namespace cambium::test {

struct GatherCase {
  int64_t T, M, D;
};

inline const std::vector<GatherCase> kGatherCases = {
    {0, 0, 8}, {0, 5, 8}, {1, 1, 1}, {7, 13, 3}, {64, 128, 128}, {63, 500, 130}, {1024, 2048, 128}};

// Indices in [-1, T); repeated ones and -1 occur.
inline TestTensor make_gather_index(const GatherCase& c, uint64_t seed) {
  TestRandom random(seed);
  TestTensor index_M(Shape(c.M), DType::i32);
  index_M.fill_integers(random, -1, c.T - 1);
  return index_M;
}

inline std::vector<double> gather_oracle(const TestTensor& x_TD, const TestTensor& index_M,
                                         int64_t D) {
  std::vector<double> y_MD(static_cast<size_t>(index_M.elements() * D), 0.0);
  for (int64_t m = 0; m < index_M.elements(); ++m) {
    const auto t = static_cast<int64_t>(index_M.at(m));
    for (int64_t d = 0; d < D && t >= 0; ++d) y_MD[m * D + d] = x_TD.at(t * D + d);
  }
  return y_MD;
}

}  // namespace cambium::test
