// Cases and fp64 oracle of qk_norm_rope.
#pragma once

#include <cmath>
#include <vector>

#include "kernels/qk_norm_rope.h"
#include "tests/ops/op_test.h"

namespace cambium::test {

struct QkNormRopeCase {
  int64_t T = 0;
  int64_t H = 0;
  int64_t G = 0;
  int64_t Q = 0;
  int64_t block_tokens = 0;
  QkNormKind kind = QkNormKind::none;
};

inline const std::vector<QkNormRopeCase> kQkNormRopeCases = {
    {1, 1, 1, 2, 1, QkNormKind::none},         {1, 1, 1, 2, 1, QkNormKind::per_head},
    {7, 3, 1, 16, 4, QkNormKind::per_head},    {31, 4, 2, 32, 16, QkNormKind::none},
    {31, 4, 2, 32, 16, QkNormKind::per_head},  {33, 4, 4, 16, 32, QkNormKind::full_width},
    {17, 2, 1, 20, 8, QkNormKind::full_width}, {64, 4, 2, 64, 16, QkNormKind::none},
    {256, 4, 2, 32, 32, QkNormKind::per_head},
};

// One of the two tensors: `heads` heads. x, d_out [T, heads, Q]; gain as the kind wants it.
struct HeadOracle {
  const QkNormRopeCase& c;
  int64_t heads = 0;
  const std::vector<double>& cos;  // a row per token, Q / 2 columns
  const std::vector<double>& sin;
  double epsilon = 0.0;

  int64_t groups() const {
    if (c.kind == QkNormKind::none) return 0;
    return c.kind == QkNormKind::per_head ? heads : 1;
  }
  int64_t width() const { return heads * c.Q; }
  int64_t group_width() const { return width() / groups(); }

  std::vector<double> rstd(const std::vector<double>& x) const {
    std::vector<double> result;
    for (int64_t i = 0; i < c.T * groups(); ++i) {
      double squares = 0.0;
      for (int64_t j = 0; j < group_width(); ++j) squares += std::pow(x[i * group_width() + j], 2);
      result.push_back(1.0 / std::sqrt(squares / static_cast<double>(group_width()) + epsilon));
    }
    return result;
  }
  std::vector<double> forward(const std::vector<double>& x, const std::vector<double>& gain) const {
    std::vector<double> n = x, out(x.size());
    if (groups() > 0) {
      const std::vector<double> scale = rstd(x);
      for (size_t i = 0; i < n.size(); ++i) {
        n[i] *= scale[i / group_width()] * gain[i % group_width()];
      }
    }
    const int64_t half = c.Q / 2;
    for (int64_t head = 0; head < c.T * heads; ++head) {
      for (int64_t i = 0; i < half; ++i) {
        const double co = cos[head / heads * half + i], si = sin[head / heads * half + i];
        const double first = n[head * c.Q + i], second = n[head * c.Q + half + i];
        out[head * c.Q + i] = first * co - second * si;
        out[head * c.Q + half + i] = second * co + first * si;
      }
    }
    return out;
  }
  struct Gradients {
    std::vector<double> d_x, d_gain_leaf;
  };
  Gradients backward(const std::vector<double>& d_out, const std::vector<double>& x,
                     const std::vector<double>& gain) const {
    std::vector<double> d_n(d_out.size());
    const int64_t half = c.Q / 2;
    for (int64_t head = 0; head < c.T * heads; ++head) {
      for (int64_t i = 0; i < half; ++i) {
        const double co = cos[head / heads * half + i], si = sin[head / heads * half + i];
        const double first = d_out[head * c.Q + i], second = d_out[head * c.Q + half + i];
        d_n[head * c.Q + i] = first * co + second * si;
        d_n[head * c.Q + half + i] = second * co - first * si;
      }
    }
    if (groups() == 0) return {d_n, {}};
    const int64_t W = group_width(), B = (c.T + c.block_tokens - 1) / c.block_tokens;
    Gradients result{std::vector<double>(x.size()), std::vector<double>(B * W, 0.0)};
    const std::vector<double> scale = rstd(x);
    for (int64_t group = 0; group < c.T * groups(); ++group) {
      double along = 0.0;
      for (int64_t i = 0; i < W; ++i) along += gain[i] * d_n[group * W + i] * x[group * W + i];
      const double mean = along * scale[group] / static_cast<double>(W);
      const int64_t block = group / groups() / c.block_tokens;
      for (int64_t i = 0; i < W; ++i) {
        const int64_t at = group * W + i;
        const double n = x[at] * scale[group];
        result.d_gain_leaf[block * W + i] += d_n[at] * n;
        result.d_x[at] = scale[group] * (gain[i] * d_n[at] - n * mean);
      }
    }
    return result;
  }
};

}  // namespace cambium::test
