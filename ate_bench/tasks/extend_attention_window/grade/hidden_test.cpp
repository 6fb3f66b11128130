#include ".ate/hidden_test.inc"
#include "kernels/window_attention.h"

using namespace cambium;
using Floats = std::vector<float>;
constexpr int64_t S = 37, Q = 8;

struct Case {
  int64_t B, H, G, window;
  float scale;
  Floats q, k, v, sink;
};
static Case make(int64_t B, int64_t H, int64_t G, int64_t window, float scale, double sink) {
  Case c = {B, H, G, window, scale, hidden::random(B * S * H * Q, 2.0),
            hidden::random(B * S * G * Q, 2.0), hidden::random(B * S * G * Q),
            hidden::random(H, 0.5)};
  for (float& value : c.sink) value += float(sink);
  return c;
}
static Floats call(const Case& c) {
  const int64_t T = c.B * S;
  Floats o(c.q.size(), NAN);
  WindowAttentionArgs a;
  a.q_THQ = In<float>(c.q.data(), Shape(T, c.H, Q));
  a.k_TGQ = In<float>(c.k.data(), Shape(T, c.G, Q));
  a.v_TGQ = In<float>(c.v.data(), Shape(T, c.G, Q));
  a.sink_H = In<float>(c.sink.data(), Shape(c.H));
  a.o_THQ = Out<float>(o.data(), Shape(T, c.H, Q));
  a.sequence_length = S, a.window = c.window, a.scale = c.scale;
  Workers workers(2);
  reference::window_attention(a, workers);
  return o;
}
static double error(const Case& c) {
  std::vector<double> want(c.q.size());
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t t = 0; t < S; ++t)
      for (int64_t h = 0; h < c.H; ++h) {
        const int64_t g = h * c.G / c.H, row = b * S + t;
        std::vector<double> s(S, -INFINITY);
        double most = c.sink[h], total = 0;
        for (int64_t j = 0; j <= t; ++j) {
          if (j + c.window <= t) continue;
          s[j] = 0;
          for (int64_t i = 0; i < Q; ++i)
            s[j] += double(c.scale) * c.q[(row * c.H + h) * Q + i] *
                    c.k[((b * S + j) * c.G + g) * Q + i];
          most = std::fmax(most, s[j]);
        }
        total = std::exp(c.sink[h] - most);
        for (int64_t j = 0; j <= t; ++j) total += std::exp(s[j] - most);
        for (int64_t j = 0; j <= t; ++j)
          for (int64_t i = 0; i < Q; ++i)
            want[(row * c.H + h) * Q + i] +=
                std::exp(s[j] - most) / total * c.v[((b * S + j) * c.G + g) * Q + i];
      }
  return hidden::error(call(c), want);
}

int main() {
  hidden::within("window", error(make(2, 2, 2, 5, 0.3f, -30)), 1e-5);
  hidden::within("sink", error(make(2, 2, 2, 64, 0.3f, 1)), 1e-5);
  hidden::within("groups", error(make(1, 6, 2, 9, 0.3f, 0)), 1e-5);
  hidden::within("large_scores", error(make(1, 2, 1, 9, 30.0f, 150)), 1e-3);
  const Case c = make(3, 4, 2, 7, 0.3f, 0);
  const Floats whole = call(c);
  bool same = true;
  for (int64_t b = 0; b < 3; ++b) {
    Case one = {1, 4, 2, 7, 0.3f, {}, {}, {}, c.sink};
    one.q.assign(&c.q[b * S * 4 * Q], &c.q[b * S * 4 * Q] + S * 4 * Q);
    one.k.assign(&c.k[b * S * 2 * Q], &c.k[b * S * 2 * Q] + S * 2 * Q);
    one.v.assign(&c.v[b * S * 2 * Q], &c.v[b * S * 2 * Q] + S * 2 * Q);
    const Floats o = call(one);
    for (size_t i = 0; i < o.size(); ++i) same = same && o[i] == whole[b * o.size() + i];
  }
  hidden::verdict("rows", same, 0);
}
