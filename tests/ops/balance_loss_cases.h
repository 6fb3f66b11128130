// Cases and oracle of the load-balance loss.
#pragma once

#include "kernels/balance_loss.h"
#include "tests/ops/op_test.h"
#include "tests/ops/routing_test.h"

namespace cambium::test {

struct BalanceLossCase {
  RoutingCase routing;
  int64_t sequence_length, block_tokens;
};

inline const std::vector<BalanceLossCase> kBalanceLossCases = {
    {{0, 4, 2, Spread::random}, 8, 4},     {{1, 1, 1, Spread::random}, 1, 1},
    {{12, 7, 3, Spread::random}, 4, 2},    {{64, 8, 2, Spread::one}, 32, 32},
    {{96, 8, 2, Spread::lower}, 32, 16},   {{1024, 8, 2, Spread::random}, 128, 32},
    {{256, 65, 6, Spread::random}, 64, 16}};

struct BalanceLossExpected {
  std::vector<double> loss_leaf_B, d_probs_TE;
};

inline BalanceLossExpected balance_loss_oracle(const std::vector<double>& probs_TE,
                                               const TestTensor& index_TK,
                                               const std::vector<double>& given_E,
                                               const BalanceLossArgs& a) {
  const int64_t T = a.probs_TE[0], E = a.probs_TE[1], K = index_TK.shape()[1];
  const int64_t S = a.sequence_length;
  BalanceLossExpected expected{std::vector<double>(T / a.block_tokens, 0.0),
                               std::vector<double>(T * E, 0.0)};
  for (int64_t sequence = 0; sequence < T / S; ++sequence) {
    for (int64_t e = 0; e < E; ++e) {
      double count = 0, counted = 0;
      for (int64_t t = 0; t < T; ++t) {
        const bool is_own = t / S == sequence;
        if (!is_own && a.source == CountSource::own_sequence) continue;
        counted += static_cast<double>(K);
        for (int64_t k = 0; k < K; ++k) count += index_TK.at(t * K + k) == static_cast<double>(e);
      }
      const double f = a.source == CountSource::given ? given_E[e] : count / counted;
      for (int64_t t = sequence * S; t < (sequence + 1) * S; ++t) {
        expected.loss_leaf_B[t / a.block_tokens] += a.loss_scale * static_cast<double>(E) * f *
                                                    probs_TE[t * E + e] / static_cast<double>(S);
        expected.d_probs_TE[t * E + e] =
            a.gradient_scale * static_cast<double>(E) * f / static_cast<double>(S);
      }
    }
  }
  return expected;
}

struct BalanceLossTensors {
  TestTensor probs_TE, index_TK, given_E, loss_leaf_B, d_probs_TE;
  BalanceLossArgs args;
  BalanceLossTensors(const BalanceLossCase& c, CountSource source, uint64_t seed)
      : probs_TE(Shape(c.routing.T, c.routing.E)),
        index_TK(make_routing(c.routing, seed)),
        given_E(Shape(1, c.routing.E)),
        loss_leaf_B(Shape(c.routing.T / c.block_tokens)),
        d_probs_TE(Shape(c.routing.T, c.routing.E)) {
    TestRandom random(seed);
    for (int64_t i = 0; i < probs_TE.elements(); ++i) probs_TE.set(i, random.uniform());
    for (int64_t i = 0; i < given_E.elements(); ++i) given_E.set(i, random.uniform());
    args = {.probs_TE = probs_TE.in<float>(),
            .expert_index_TK = index_TK.in<int32_t>(),
            .fraction_NE = source == CountSource::given ? given_E.in<float>() : In<float>(),
            .sequence_length = c.sequence_length,
            .positions = c.sequence_length,
            .block_tokens = c.block_tokens,
            .source = source,
            .loss_scale = 0.75f,
            .gradient_scale = 3.0f,
            .loss_leaf_B = loss_leaf_B.out<float>(),
            .d_probs_TE = d_probs_TE.out<float>()};
  }
};

}  // namespace cambium::test
