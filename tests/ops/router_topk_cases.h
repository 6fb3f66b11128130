// Cases and oracles of the router.
#pragma once

#include "kernels/router_topk.h"
#include "tests/ops/op_test.h"

namespace cambium::test {

struct RouterTopkCase {
  int64_t T, E, K;
};

inline const std::vector<RouterTopkCase> kRouterTopkCases = {
    {0, 8, 2},   {1, 1, 1},    {5, 2, 1},    {7, 3, 3},     {31, 8, 2},   {33, 31, 4},
    {64, 32, 8}, {65, 33, 32}, {1024, 8, 2}, {300, 128, 8}, {40, 257, 6}, {9, 1024, 32}};

constexpr TopkNormalize kNormalizations[] = {TopkNormalize::none, TopkNormalize::over_top_k};

struct RouterTopkExpected {
  std::vector<double> probs_TE, index_TK, weight_TK;
};

// `scores_TE` ranks the experts; pass the op's own probabilities (plus bias) as stored, so that the
// ranking is judged on the values that the op ranked.
inline std::vector<double> topk_oracle(const std::vector<double>& scores_TE, int64_t E, int64_t K) {
  std::vector<double> index_TK;
  for (size_t t = 0; t < scores_TE.size() / E; ++t) {
    std::vector<int64_t> order(static_cast<size_t>(E));
    for (int64_t e = 0; e < E; ++e) order[e] = e;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return scores_TE[t * E + a] > scores_TE[t * E + b];
    });
    for (int64_t k = 0; k < K; ++k) index_TK.push_back(static_cast<double>(order[k]));
  }
  return index_TK;
}

inline std::vector<double> softmax_oracle(const std::vector<double>& logits_TE, int64_t E) {
  std::vector<double> probs_TE(logits_TE.size());
  for (size_t t = 0; t < logits_TE.size() / E; ++t) {
    const auto row = logits_TE.begin() + t * E;
    const double most = *std::max_element(row, row + E);
    double sum = 0;
    for (int64_t e = 0; e < E; ++e) sum += std::exp(row[e] - most);
    for (int64_t e = 0; e < E; ++e) probs_TE[t * E + e] = std::exp(row[e] - most) / sum;
  }
  return probs_TE;
}

inline std::vector<double> weight_oracle(const std::vector<double>& probs_TE,
                                         const std::vector<double>& index_TK, int64_t E, int64_t K,
                                         TopkNormalize normalize) {
  std::vector<double> weight_TK(index_TK.size());
  for (size_t t = 0; t < index_TK.size() / K; ++t) {
    double sum = 0;
    for (int64_t k = 0; k < K; ++k) {
      weight_TK[t * K + k] = probs_TE[t * E + static_cast<int64_t>(index_TK[t * K + k])];
      sum += weight_TK[t * K + k];
    }
    for (int64_t k = 0; k < K && normalize == TopkNormalize::over_top_k; ++k) {
      weight_TK[t * K + k] /= sum;
    }
  }
  return weight_TK;
}

// K distinct experts for each token, of any probability: what a recorded choice may be.
inline std::vector<double> forced_choice(TestRandom& random, const RouterTopkCase& c) {
  std::vector<double> index_TK;
  for (int64_t t = 0; t < c.T; ++t) {
    std::vector<int64_t> order(static_cast<size_t>(c.E));
    for (int64_t e = 0; e < c.E; ++e) order[e] = e;
    for (int64_t k = 0; k < c.K; ++k) {
      std::swap(order[k], order[random.integer(k, c.E - 1)]);
      index_TK.push_back(static_cast<double>(order[k]));
    }
  }
  return index_TK;
}

// What the backward differentiates: <d_weight, weight> + <d_probs, probs>, the choice held fixed.
inline double router_loss_oracle(const std::vector<double>& logits_TE,
                                 const std::vector<double>& index_TK,
                                 const std::vector<double>& d_weight_TK,
                                 const std::vector<double>& d_probs_TE, int64_t E, int64_t K,
                                 TopkNormalize normalize) {
  const std::vector<double> probs_TE = softmax_oracle(logits_TE, E);
  const std::vector<double> weight_TK = weight_oracle(probs_TE, index_TK, E, K, normalize);
  double loss = 0;
  for (size_t i = 0; i < weight_TK.size(); ++i) loss += d_weight_TK[i] * weight_TK[i];
  for (size_t i = 0; i < d_probs_TE.size(); ++i) loss += d_probs_TE[i] * probs_TE[i];
  return loss;
}

// d_logits in fp64 from the probabilities; `d_probs_TE` and `d_logits_in_TE` may be empty.
inline std::vector<double> router_backward_oracle(const std::vector<double>& probs_TE,
                                                  const std::vector<double>& index_TK,
                                                  const std::vector<double>& d_weight_TK,
                                                  const std::vector<double>& d_probs_TE,
                                                  const std::vector<double>& d_logits_in_TE,
                                                  int64_t E, int64_t K, TopkNormalize normalize) {
  std::vector<double> d_logits_TE(probs_TE.size());
  for (size_t t = 0; t < probs_TE.size() / E; ++t) {
    const double* probs = probs_TE.data() + t * E;
    std::vector<double> g(static_cast<size_t>(E), 0.0);
    for (int64_t e = 0; e < E && !d_probs_TE.empty(); ++e) g[e] = d_probs_TE[t * E + e];
    double sum = 0, along = 0, mean = 0;
    for (int64_t k = 0; k < K; ++k) {
      const double p = probs[static_cast<int64_t>(index_TK[t * K + k])];
      sum += p;
      along += d_weight_TK[t * K + k] * p;
    }
    for (int64_t k = 0; k < K; ++k) {
      const double d = d_weight_TK[t * K + k];
      g[static_cast<size_t>(index_TK[t * K + k])] +=
          normalize == TopkNormalize::none ? d : (d - along / sum) / sum;
    }
    for (int64_t e = 0; e < E; ++e) mean += g[e] * probs[e];
    for (int64_t e = 0; e < E; ++e) {
      d_logits_TE[t * E + e] = probs[e] * (g[e] - mean);
      if (!d_logits_in_TE.empty()) d_logits_TE[t * E + e] += d_logits_in_TE[t * E + e];
    }
  }
  return d_logits_TE;
}

}  // namespace cambium::test
