// Cases and oracle of combine (unpermute).
#pragma once

#include "kernels/combine.h"
#include "tests/ops/op_test.h"

namespace cambium::test {

struct CombineCase {
  int64_t T, K, D, R;
};

inline const std::vector<CombineCase> kCombineCases = {
    {0, 2, 8, 0},    {1, 1, 1, 1},      {5, 3, 7, 4},        {17, 2, 63, 34},
    {33, 8, 64, 50}, {128, 2, 65, 256}, {1024, 2, 128, 2048}};

// Row numbers in [-1, R): each about as likely, so tokens with no row at all occur.
inline TestTensor make_combine_index(const CombineCase& c, uint64_t seed) {
  TestRandom random(seed);
  TestTensor row_index_TK(Shape(c.T, c.K), DType::i32);
  for (int64_t i = 0; i < c.T * c.K; ++i) {
    const bool is_absent = random.integer(0, 3) == 0;
    row_index_TK.set(i, is_absent ? -1.0 : static_cast<double>(random.integer(0, c.R - 1)));
  }
  return row_index_TK;
}

// `residual_TD` may be empty.
inline std::vector<double> combine_oracle(const TestTensor& y_RD, const TestTensor& row_index_TK,
                                          const std::vector<double>& residual_TD, int64_t D) {
  const int64_t T = row_index_TK.shape()[0], K = row_index_TK.shape()[1];
  std::vector<double> out_TD(static_cast<size_t>(T * D), 0.0);
  for (int64_t i = 0; i < T * D; ++i) {
    double sum = 0;
    for (int64_t k = 0; k < K; ++k) {
      const auto row = static_cast<int64_t>(row_index_TK.at(i / D * K + k));
      if (row >= 0) sum += y_RD.at(row * D + i % D);
    }
    out_TD[i] = residual_TD.empty() ? sum : residual_TD[i] + sum;
  }
  return out_TD;
}

}  // namespace cambium::test
