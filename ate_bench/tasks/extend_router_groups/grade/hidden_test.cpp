#include ".ate/hidden_test.inc"
#include "kernels/group_topk.h"

using namespace cambium;
using Floats = std::vector<float>;
constexpr int64_t E = 48, K = 6, G = 8, kKept = 3, N = E / G;

struct Routing {
  std::vector<int32_t> index;
  Floats weight, score;
};
static Routing call(const Floats& z, const Floats& bias) {
  const auto T = static_cast<int64_t>(z.size()) / E;
  Routing r = {std::vector<int32_t>(T * K, -7), Floats(T * K, NAN), Floats(T * E, NAN)};
  GroupTopkArgs a;
  a.logits_TE = In<float>(z.data(), Shape(T, E));
  if (!bias.empty()) a.bias_E = In<float>(bias.data(), Shape(E));
  a.score_TE = Out<float>(r.score.data(), Shape(T, E));
  a.expert_index_TK = Out<int32_t>(r.index.data(), Shape(T, K));
  a.weight_TK = Out<float>(r.weight.data(), Shape(T, K));
  a.groups = G, a.kept_groups = kKept, a.scaling = 2.5f;
  Workers workers(2);
  reference::group_topk(a, workers);
  return r;
}
static int64_t largest(const std::vector<double>& values) {  // the first of equals
  int64_t best = 0;
  for (size_t i = 1; i < values.size(); ++i) if (values[i] > values[best]) best = int64_t(i);
  return best;
}
static Routing plain(const Floats& z, const Floats& bias) {
  Routing r;
  for (size_t t = 0; t < z.size() / E; ++t) {
    std::vector<double> score(E), choice(E), mark(G), allowed(E, -INFINITY);
    for (int64_t e = 0; e < E; ++e) {
      score[e] = 1 / (1 + std::exp(-double(z[t * E + e])));
      choice[e] = score[e] + bias[e];
    }
    for (int64_t g = 0; g < G; ++g) {
      std::vector<double> own(choice.begin() + g * N, choice.begin() + (g + 1) * N);
      const int64_t first = largest(own);
      mark[g] = own[first];
      own[first] = -INFINITY;
      mark[g] += own[largest(own)];
    }
    for (int64_t k = 0; k < kKept; ++k) {
      const int64_t g = largest(mark);
      mark[g] = -INFINITY;
      for (int64_t e = g * N; e < (g + 1) * N; ++e) allowed[e] = choice[e];
    }
    double total = 0;
    for (int64_t k = 0; k < K; ++k) {
      const int64_t e = largest(allowed);
      allowed[e] = -INFINITY;
      r.index.push_back(int32_t(e));
      total += score[e];
    }
    for (int64_t k = 0; k < K; ++k)
      r.weight.push_back(float(2.5 * score[r.index[t * K + k]] / total));
  }
  return r;
}
// The gradient of sum(weight * d_weight) against differences of plain(), whose choice stays.
static double gradient_error() {
  const int64_t T = 40;
  const Floats z = hidden::random(T * E, 2.0), none(E, 0.0f), d_weight = hidden::random(T * K);
  const Routing at = call(z, none);
  Floats d_logits(T * E, NAN);
  GroupTopkBackwardArgs a;
  a.score_TE = In<float>(at.score.data(), Shape(T, E));
  a.expert_index_TK = In<int32_t>(at.index.data(), Shape(T, K));
  a.d_weight_TK = In<float>(d_weight.data(), Shape(T, K));
  a.d_logits_TE = Out<float>(d_logits.data(), Shape(T, E));
  a.scaling = 2.5f;
  Workers workers(2);
  reference::group_topk_backward(a, workers);
  const auto value = [&](int64_t t, int64_t e, double step) {
    double total = 0, sum = 0;
    std::vector<double> score(K);
    for (int64_t k = 0; k < K; ++k) {
      const int64_t of = at.index[t * K + k];
      score[k] = 1 / (1 + std::exp(-(double(z[t * E + of]) + (of == e ? step : 0))));
      total += score[k];
    }
    for (int64_t k = 0; k < K; ++k) sum += 2.5 * score[k] / total * d_weight[t * K + k];
    return sum;
  };
  std::vector<double> want(T * E);
  for (int64_t i = 0; i < T * E; ++i)
    want[i] = (value(i / E, i % E, 1e-4) - value(i / E, i % E, -1e-4)) / 2e-4;
  return hidden::error(d_logits, want);
}
static double differing(const Routing& a, const Routing& b) {
  size_t count = 0;
  for (size_t i = 0; i < b.index.size(); ++i) count += a.index[i] != b.index[i];
  return double(count);
}

int main() {
  const Floats z = hidden::random(700 * E, 2.0), none(E, 0.0f);
  const Routing got = call(z, {}), want = plain(z, none);
  // fp32 may swap neighbours whose scores differ by rounding: four places of 4200 at most.
  hidden::within("selection", differing(got, want), 4);
  hidden::within("weights", hidden::error(got.weight, want.weight), 1e-3);
  const Floats bias = hidden::random(E, 0.4);
  const Routing biased = call(z, bias), biased_want = plain(z, bias);
  const bool good = differing(biased, biased_want) <= 4 &&
                    hidden::error(biased.weight, biased_want.weight) <= 1e-3;
  hidden::verdict("bias", good, differing(biased, biased_want));
  Floats flat(E, 0.0f);
  flat[40] = 1.0f;
  hidden::within("ties", differing(call(flat, none), plain(flat, none)), 0);
  bool same = true;
  for (int64_t t = 0; t < 50; ++t) {
    const Routing one = call(Floats(&z[t * E], &z[t * E] + E), none);
    for (int64_t k = 0; k < K; ++k) same = same && one.weight[k] == got.weight[t * K + k];
  }
  hidden::verdict("rows", same, 0);
  hidden::within("gradient", gradient_error(), 1e-4);
}
