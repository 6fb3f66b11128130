// Cases and oracles of the linear layer.
#pragma once

#include "kernels/linear.h"
#include "tests/ops/op_test.h"

namespace cambium::test {

struct LinearCase {
  int64_t T, N, K;
};

// One, primes, around the 6 x 16 tile, beyond the depth block of 256, a router, production shapes.
inline const std::vector<LinearCase> kLinearCases = {
    {0, 8, 8},    {1, 1, 1},     {7, 13, 11},   {5, 15, 16},    {6, 16, 15},     {13, 17, 33},
    {31, 8, 128}, {1, 384, 128}, {33, 48, 257}, {96, 272, 600}, {128, 384, 128}, {200, 64, 1030},
};

// Plain loops in fp64: out[i][j] = sum_k a(i, k) * b(k, j), + added.
template <class A, class B>
std::vector<double> product_oracle(int64_t rows, int64_t columns, int64_t depth, A&& a, B&& b) {
  std::vector<double> out(static_cast<size_t>(rows * columns));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < depth; ++k) sum += a(i, k) * b(k, j);
      out[i * columns + j] = sum;
    }
  }
  return out;
}

// The promised chain: fused multiply-adds from `start` over ascending k, in fp32.
template <class A, class B>
float chain_oracle(int64_t depth, A&& a, B&& b, float start = 0) {
  float sum = start;
  for (int64_t k = 0; k < depth; ++k) {
    sum = __builtin_fmaf(static_cast<float>(a(k)), static_cast<float>(b(k)), sum);
  }
  return sum;
}

inline std::vector<double> linear_oracle(const TestTensor& x_TK, const TestTensor& w_NK) {
  const int64_t T = x_TK.shape()[0], K = x_TK.shape()[1], N = w_NK.shape()[0];
  const std::vector<double> x = x_TK.values(), w = w_NK.values();
  return product_oracle(
      T, N, K, [&](int64_t t, int64_t k) { return x[t * K + k]; },
      [&](int64_t k, int64_t n) { return w[n * K + k]; });
}

inline std::vector<double> linear_dgrad_oracle(const TestTensor& d_y_TN, const TestTensor& w_NK) {
  const int64_t T = d_y_TN.shape()[0], N = d_y_TN.shape()[1], K = w_NK.shape()[1];
  const std::vector<double> d_y = d_y_TN.values(), w = w_NK.values();
  return product_oracle(
      T, K, N, [&](int64_t t, int64_t n) { return d_y[t * N + n]; },
      [&](int64_t n, int64_t k) { return w[n * K + k]; });
}

inline std::vector<double> linear_wgrad_oracle(const TestTensor& d_y_TN, const TestTensor& x_TK) {
  const int64_t T = d_y_TN.shape()[0], N = d_y_TN.shape()[1], K = x_TK.shape()[1];
  const std::vector<double> d_y = d_y_TN.values(), x = x_TK.values();
  return product_oracle(
      N, K, T, [&](int64_t n, int64_t t) { return d_y[t * N + n]; },
      [&](int64_t t, int64_t k) { return x[t * K + k]; });
}

inline std::vector<double> add(std::vector<double> left, const std::vector<double>& right) {
  for (size_t i = 0; i < left.size(); ++i) left[i] += right[i];
  return left;
}

}  // namespace cambium::test
