#include ".ate/hidden_test.inc"
#include "kernels/attention.h"

using namespace cambium;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;
constexpr int64_t S = 48, Q = 8, kBlock = 16;

struct Case {
  int64_t B, H, G;
  float scale, cap;
  Floats q, k, v, d_o;
  std::vector<int32_t> start;  // row that begins a token's document
  int64_t rows() const { return B * S; }
};
static Case make(int64_t B, int64_t H, int64_t G, float scale, float cap) {
  Case c = {B, H, G, scale, cap};
  c.q = hidden::random(B * S * H * Q, 2.0), c.k = hidden::random(B * S * G * Q, 2.0);
  c.v = hidden::random(B * S * G * Q), c.d_o = hidden::random(B * S * H * Q);
  for (int64_t t = 0; t < B * S; ++t)
    c.start.push_back(int32_t(t - t % S + (t % S >= 21 && t / S == 0 ? 21 : 0)));
  return c;
}
struct Result {
  Floats o, d_q, d_k, d_v;
};
static Result call(Case& c, int threads) {
  const int64_t T = c.rows();
  Result r = {Floats(c.q.size(), NAN), Floats(c.q.size(), NAN), Floats(c.k.size(), NAN),
              Floats(c.v.size(), NAN)};
  Floats lse(T * c.H, NAN), delta(T * c.H, NAN);
  Workers workers(threads);
  AttentionArgs a;
  a.q_THQ = In<float>(c.q.data(), Shape(T, c.H, Q));
  a.k_TGQ = In<float>(c.k.data(), Shape(T, c.G, Q));
  a.v_TGQ = In<float>(c.v.data(), Shape(T, c.G, Q));
  a.document_start_T = In<int32_t>(c.start.data(), Shape(T));
  a.o_THQ = Out<float>(r.o.data(), Shape(T, c.H, Q));
  a.lse_TH = Out<float>(lse.data(), Shape(T, c.H));
  a.sequence_length = S, a.block_tokens = kBlock, a.scale = c.scale, a.logit_cap = c.cap;
  reference::attention(a, workers);
  AttentionBackwardArgs b;
  b.q_THQ = a.q_THQ, b.k_TGQ = a.k_TGQ, b.v_TGQ = a.v_TGQ;
  b.document_start_T = a.document_start_T;
  b.o_THQ = In<float>(r.o.data(), Shape(T, c.H, Q));
  b.d_o_THQ = In<float>(c.d_o.data(), Shape(T, c.H, Q));
  b.lse_TH = In<float>(lse.data(), Shape(T, c.H));
  b.d_q_THQ = Out<float>(r.d_q.data(), Shape(T, c.H, Q));
  b.d_k_TGQ = Out<float>(r.d_k.data(), Shape(T, c.G, Q));
  b.d_v_TGQ = Out<float>(r.d_v.data(), Shape(T, c.G, Q));
  b.delta_TH = Out<float>(delta.data(), Shape(T, c.H));
  b.sequence_length = S, b.block_tokens = kBlock, b.scale = c.scale, b.logit_cap = c.cap;
  reference::attention_backward(b, workers);
  return r;
}
struct Plain {
  Doubles o, d_q, d_k, d_v;
};
static Plain plain(const Case& c) {
  Plain r = {Doubles(c.q.size()), Doubles(c.q.size()), Doubles(c.k.size()), Doubles(c.v.size())};
  for (int64_t t = 0; t < c.rows(); ++t)
    for (int64_t h = 0; h < c.H; ++h) {
      const int64_t row = (t * c.H + h) * Q, g = h * c.G / c.H, first = c.start[t];
      Doubles s, inner, d_p;
      double most = -INFINITY, total = 0, mean = 0;
      for (int64_t j = first; j <= t; ++j) {
        double dot = 0;
        for (int64_t i = 0; i < Q; ++i) dot += double(c.q[row + i]) * c.k[(j * c.G + g) * Q + i];
        dot *= c.scale;
        s.push_back(c.cap > 0 ? c.cap * std::tanh(dot / c.cap) : dot);
        inner.push_back(c.cap > 0 ? 1 - s.back() / c.cap * s.back() / c.cap : 1);
        most = std::fmax(most, s.back());
      }
      for (double& score : s) score = std::exp(score - most), total += score;
      for (int64_t j = first; j <= t; ++j) {
        const double p = s[j - first] /= total;
        d_p.push_back(0);
        for (int64_t i = 0; i < Q; ++i) {
          r.o[row + i] += p * c.v[(j * c.G + g) * Q + i];
          d_p.back() += double(c.d_o[row + i]) * c.v[(j * c.G + g) * Q + i];
          r.d_v[(j * c.G + g) * Q + i] += p * c.d_o[row + i];
        }
        mean += p * d_p.back();
      }
      for (int64_t j = first; j <= t; ++j) {
        const double d = s[j - first] * (d_p[j - first] - mean) * inner[j - first] * c.scale;
        for (int64_t i = 0; i < Q; ++i) {
          r.d_q[row + i] += d * c.k[(j * c.G + g) * Q + i];
          r.d_k[(j * c.G + g) * Q + i] += d * c.q[row + i];
        }
      }
    }
  return r;
}
struct Errors {
  double forward, backward;
};
static Errors errors(Case c) {
  const Result got = call(c, 2);
  const Plain want = plain(c);
  return {hidden::error(got.o, want.o),
          std::fmax(hidden::error(got.d_q, want.d_q), std::fmax(hidden::error(got.d_k, want.d_k),
                                                               hidden::error(got.d_v, want.d_v)))};
}

int main() {
  const Errors capped = errors(make(2, 6, 2, 0.5f, 1.5f));
  hidden::within("forward", capped.forward, 1e-5);
  hidden::within("backward", capped.backward, 1e-4);
  const Errors large = errors(make(1, 2, 1, 30.0f, 50.0f));
  hidden::within("large_scores", std::fmax(large.forward, large.backward / 10), 1e-3);
  const Errors off = errors(make(2, 4, 4, 0.5f, 0.0f));
  hidden::within("uncapped", std::fmax(off.forward, off.backward / 10), 1e-5);
  Case whole = make(3, 4, 2, 0.5f, 1.0f);
  const Result all = call(whole, 1);
  bool same = call(whole, 3).d_k == all.d_k;
  for (int64_t b = 0; b < 3; ++b) {
    Case one = {1, 4, 2, 0.5f, 1.0f};
    const auto part = [b](const Floats& from) {
      const size_t size = from.size() / 3;
      return Floats(from.begin() + b * size, from.begin() + (b + 1) * size);
    };
    one.q = part(whole.q), one.k = part(whole.k), one.v = part(whole.v), one.d_o = part(whole.d_o);
    for (int64_t t = 0; t < S; ++t) one.start.push_back(int32_t(whole.start[b * S + t] - b * S));
    const Result r = call(one, 2);
    same = same && r.o == part(all.o) && r.d_q == part(all.d_q) && r.d_k == part(all.d_k);
  }
  hidden::verdict("rows", same, 0);
}
