cat >kernels/window_attention.h <<'H'
// Causal attention over a sliding window, with a learned sink per head (gpt-oss, arXiv 2508.10925).
//
//   o = sum_j exp(s_j) v_j / (exp(sink_h) + sum_j exp(s_j)) over the last `window` positions
#pragma once

#include "kernels/op.h"

namespace cambium {

struct WindowAttentionArgs {
  In<float> q_THQ;
  In<float> k_TGQ;
  In<float> v_TGQ;
  In<float> sink_H;
  Out<float> o_THQ;
  int64_t sequence_length = 0, window = 0;
  float scale = 1;
};

inline void check_args(const WindowAttentionArgs& a) {
  const int64_t T = a.q_THQ[0], H = a.q_THQ[1], Q = a.q_THQ[2];
  check_shape("window_attention", "k_TGQ", a.k_TGQ, Shape(T, a.k_TGQ[1], Q));
  check_shape("window_attention", "v_TGQ", a.v_TGQ, Shape(T, a.k_TGQ[1], Q));
  check_shape("window_attention", "sink_H", a.sink_H, Shape(H));
  check_shape("window_attention", "o_THQ", a.o_THQ, Shape(T, H, Q));
  CHECK_EQ(T % a.sequence_length, 0);
  CHECK_GE(a.window, 1);
}

namespace reference {
void window_attention(const WindowAttentionArgs& args, Workers& workers);
}

}  // namespace cambium
H
cat >reference/window_attention.cc <<'H'
#include "kernels/window_attention.h"

#include <algorithm>
#include <vector>

#include "src/base/fmath.h"

namespace cambium::reference {

void window_attention(const WindowAttentionArgs& a, Workers& workers) {
  check_args(a);
  const int64_t T = a.q_THQ[0], H = a.q_THQ[1], Q = a.q_THQ[2], G = a.k_TGQ[1];
  workers.parallel_for(T, [&](int64_t t, Scratch&) {
    const int64_t start = t - t % a.sequence_length;
    const int64_t first = std::max(start, t - a.window + 1);
    std::vector<float> score(static_cast<size_t>(t - first + 1));
    for (int64_t h = 0; h < H; ++h) {
      const int64_t g = h * G / H;
      const float* q = a.q_THQ.pointer() + t * a.q_THQ.row_stride + h * Q;
      const float sink = a.sink_H.pointer()[h];
      float most = sink;
      for (int64_t j = first; j <= t; ++j) {
        const float* k = a.k_TGQ.pointer() + j * a.k_TGQ.row_stride + g * Q;
        float dot = 0;
        for (int64_t i = 0; i < Q; ++i) dot += q[i] * k[i];
        score[j - first] = a.scale * dot;
        most = std::max(most, score[j - first]);
      }
      float total = fmath::exp(sink - most);
      float* o = a.o_THQ.pointer() + t * a.o_THQ.row_stride + h * Q;
      std::fill(o, o + Q, 0.0f);
      for (int64_t j = first; j <= t; ++j) {
        const float* v = a.v_TGQ.pointer() + j * a.v_TGQ.row_stride + g * Q;
        const float p = fmath::exp(score[j - first] - most);
        total += p;
        for (int64_t i = 0; i < Q; ++i) o[i] += p * v[i];
      }
      for (int64_t i = 0; i < Q; ++i) o[i] /= total;
    }
  });
}

}  // namespace cambium::reference
H
