// Parity of the router: oracle, ties, bias, NaN, forced choices, D1, D2, finite differences; CUDA
// against the reference.
#include "tests/ops/router_topk_cases.h"

#include "tests/ops/cuda_test.h"

namespace cambium::test {
namespace {

// exp is within an ulp or two, the sums of E positive terms add the rest.
double router_bound(int64_t E) { return tolerance(8, E); }

struct RouterTensors {
  TestTensor logits_TE, bias_E, probs_TE, index_TK, weight_TK, forced_TK;
  RouterTensors(const RouterTopkCase& c, uint64_t seed)
      : logits_TE(Shape(c.T, c.E), DType::f32, c.E + 3),
        bias_E(Shape(c.E)),
        probs_TE(Shape(c.T, c.E), DType::f32, c.E + 1),
        index_TK(Shape(c.T, c.K), DType::i32, c.K + 1),
        weight_TK(Shape(c.T, c.K), DType::f32, c.K + 2),
        forced_TK(Shape(c.T, c.K), DType::i32, c.K + 5) {
    TestRandom random(seed);
    logits_TE.fill_normal(random);
    bias_E.fill_normal(random, 0.1);
    forced_TK.assign(forced_choice(random, c));
  }
  RouterTopkArgs forced(TopkNormalize normalize) {
    RouterTopkArgs a = args(normalize, false);
    a.forced_index_TK = forced_TK.in<int32_t>();
    return a;
  }
  RouterTopkArgs args(TopkNormalize normalize, bool has_bias) {
    return {logits_TE.in<float>(),  has_bias ? bias_E.in<float>() : In<float>(),
            probs_TE.out<float>(),  index_TK.out<int32_t>(),
            weight_TK.out<float>(), normalize,
            In<int32_t>()};
  }
};

TEST(RouterTopk, AgreesWithOracle) {
  for (const RouterTopkCase& c : kRouterTopkCases) {
    SCOPED_TRACE(testing::Message() << c.T << " tokens, " << c.K << " of " << c.E);
    RouterTensors r(c, c.E);
    for (const TopkNormalize normalize : kNormalizations) {
      for (const bool has_bias : {false, true}) {
        run_op(router_topk, r.args(normalize, has_bias));
        const std::vector<double> probs = softmax_oracle(r.logits_TE.values(), c.E);
        EXPECT_TRUE(within(r.probs_TE, probs, router_bound(c.E)));
        std::vector<double> scores = r.probs_TE.values();
        for (int64_t i = 0; i < c.T * c.E && has_bias; ++i) {
          scores[i] = static_cast<float>(scores[i]) + static_cast<float>(r.bias_E.at(i % c.E));
          scores[i] = static_cast<float>(scores[i]);  // ranked in fp32
        }
        EXPECT_TRUE(bits_equal(r.index_TK, topk_oracle(scores, c.E, c.K)));
        EXPECT_TRUE(within(r.weight_TK,
                           weight_oracle(probs, r.index_TK.values(), c.E, c.K, normalize),
                           router_bound(c.E)));
      }
    }
  }
}

TEST(RouterTopk, TiesGoToTheLowerIndex) {
  RouterTensors r({3, 40, 5}, 2);
  r.logits_TE.fill(1);
  for (const int64_t e : {7, 33}) r.logits_TE.set(40 + e, 2);
  for (int64_t e = 0; e < 40; ++e) r.logits_TE.set(80 + e, static_cast<double>(e % 4));
  run_op(router_topk, r.args(TopkNormalize::over_top_k, false));
  EXPECT_TRUE(
      bits_equal(r.index_TK, std::vector<double>{0, 1, 2, 3, 4, 7, 33, 0, 1, 2, 3, 7, 11, 15, 19}));
}

// The bias chooses, it never weighs: expert 3 is chosen by its bias alone.
TEST(RouterTopk, BiasChoosesAndDoesNotWeigh) {
  RouterTensors r({1, 4, 2}, 3);
  r.logits_TE.fill(0);
  r.bias_E.assign(std::vector<double>{0, -1, 0, 5});
  run_op(router_topk, r.args(TopkNormalize::none, true));
  EXPECT_TRUE(bits_equal(r.index_TK, std::vector<double>{3, 0}));
  EXPECT_TRUE(bits_equal(r.weight_TK, std::vector<double>{0.25, 0.25}));
}

TEST(RouterTopk, LargeLogitsAndNanKeepValidIndices) {
  RouterTensors r({3, 8, 3}, 4);
  r.logits_TE.fill(-1000);
  r.logits_TE.set(5, 1000);
  r.logits_TE.set(8 + 2, std::numeric_limits<double>::quiet_NaN());
  r.logits_TE.set(16 + 2, std::numeric_limits<double>::infinity());
  run_op(router_topk, r.args(TopkNormalize::over_top_k, false));
  EXPECT_TRUE(bits_equal(r.index_TK, std::vector<double>{5, 0, 1, 0, 1, 2, 0, 1, 2}));
  EXPECT_EQ(r.weight_TK.at(0), 1);
  EXPECT_TRUE(std::isnan(r.weight_TK.at(3)));  // what is not a number stays visible
}

TEST(RouterTopk, ForcedExpertsAreTakenAndWeighed) {
  for (const RouterTopkCase& c : kRouterTopkCases) {
    SCOPED_TRACE(testing::Message() << c.T << " tokens, " << c.K << " of " << c.E);
    for (const TopkNormalize normalize : kNormalizations) {
      RouterTensors r(c, c.E);
      run_op(router_topk, r.forced(normalize));
      const std::vector<double> probs = softmax_oracle(r.logits_TE.values(), c.E);
      EXPECT_TRUE(within(r.probs_TE, probs, router_bound(c.E)));
      EXPECT_TRUE(bits_equal(r.index_TK, r.forced_TK.values()));
      EXPECT_TRUE(within(r.weight_TK,
                         weight_oracle(probs, r.forced_TK.values(), c.E, c.K, normalize),
                         router_bound(c.E)));
    }
  }
}

// Forcing what was chosen changes no bit: what replay and recomputation rest on.
TEST(RouterTopk, ForcingTheOwnChoiceKeepsTheBits) {
  for (const RouterTopkCase& c : kRouterTopkCases) {
    for (const TopkNormalize normalize : kNormalizations) {
      RouterTensors chosen(c, 21), again(c, 21);
      run_op(router_topk, chosen.args(normalize, true));
      again.forced_TK.assign(chosen.index_TK.values());
      run_op(router_topk, again.forced(normalize));
      EXPECT_TRUE(bits_equal(again.index_TK, chosen.index_TK.values()));
      EXPECT_TRUE(bits_equal(again.probs_TE, chosen.probs_TE.values()));
      EXPECT_TRUE(bits_equal(again.weight_TK, chosen.weight_TK.values()));
    }
  }
}

TEST(RouterTopk, ForcedExpertOutsideTheLayerIsCaught) {
  RouterTensors r({4, 8, 2}, 22);
  r.forced_TK.set(3, 8);
  EXPECT_THROW(run_op(router_topk, r.forced(TopkNormalize::none)), Error);
}

std::vector<std::vector<std::byte>> router_rows(const RouterTensors& from,
                                                const std::vector<int64_t>& tokens, int threads) {
  const int64_t E = from.logits_TE.shape()[1], K = from.index_TK.shape()[1];
  RouterTensors r({std::ssize(tokens), E, K}, 5);
  r.bias_E = from.bias_E;
  for (int64_t i = 0; i < std::ssize(tokens) * E; ++i) {
    r.logits_TE.set(i, from.logits_TE.at(tokens[i / E] * E + i % E));
  }
  run_op(router_topk, r.args(TopkNormalize::over_top_k, true), threads);
  std::vector<std::vector<std::byte>> bits_of_rows;
  for (const TestTensor* tensor : {&r.probs_TE, &r.index_TK, &r.weight_TK}) {
    append_row_bits(*tensor, bits_of_rows);
  }
  return bits_of_rows;
}

TEST(RouterTopk, BitsDependOnTheTokenAlone) {
  const RouterTopkCase c{600, 61, 6};
  const RouterTensors whole(c, 6);
  expect_rows_independent(
      c.T, [&](const std::vector<int64_t>& tokens) { return router_rows(whole, tokens, 2); });
  std::vector<int64_t> all(c.T);
  for (int64_t t = 0; t < c.T; ++t) all[t] = t;
  expect_thread_independent([&](int threads) {
    std::vector<std::byte> bits;
    for (const auto& row : router_rows(whole, all, threads)) {
      bits.insert(bits.end(), row.begin(), row.end());
    }
    return bits;
  });
}

// The backward's tensors for one case, after a forward that fills probabilities and choices.
struct RouterBackwardTensors {
  RouterTensors forward;
  TestTensor d_weight_TK, d_probs_TE, d_logits_in_TE, d_logits_TE;
  RouterBackwardTensors(const RouterTopkCase& c, TopkNormalize normalize, uint64_t seed)
      : forward(c, seed),
        d_weight_TK(Shape(c.T, c.K), DType::f32, c.K + 1),
        d_probs_TE(Shape(c.T, c.E), DType::f32, c.E + 2),
        d_logits_in_TE(Shape(c.T, c.E), DType::f32, c.E + 4),
        d_logits_TE(Shape(c.T, c.E), DType::f32, c.E + 5) {
    TestRandom random(seed + 1);
    for (TestTensor* tensor : {&d_weight_TK, &d_probs_TE, &d_logits_in_TE}) {
      tensor->fill_normal(random);
    }
    run_op(router_topk, forward.args(normalize, false));
  }
  RouterTopkBackwardArgs args(TopkNormalize normalize, bool has_losses) {
    return {forward.probs_TE.in<float>(),
            forward.index_TK.in<int32_t>(),
            d_weight_TK.in<float>(),
            has_losses ? d_probs_TE.in<float>() : In<float>(),
            has_losses ? d_logits_in_TE.in<float>() : In<float>(),
            d_logits_TE.out<float>(),
            normalize};
  }
};

TEST(RouterTopk, BackwardAgreesWithOracle) {
  for (const RouterTopkCase& c : kRouterTopkCases) {
    for (const TopkNormalize normalize : kNormalizations) {
      RouterBackwardTensors r(c, normalize, c.E);
      for (const bool has_losses : {false, true}) {
        run_op(router_topk_backward, r.args(normalize, has_losses));
        const std::vector<double> none;
        const std::vector<double> expected = router_backward_oracle(
            r.forward.probs_TE.values(), r.forward.index_TK.values(), r.d_weight_TK.values(),
            has_losses ? r.d_probs_TE.values() : none,
            has_losses ? r.d_logits_in_TE.values() : none, c.E, c.K, normalize);
        // With one expert of one, the normalised weight is constant and its gradient cancels to
        // rounding errors of d_weight: compare against that size.
        if (c.K == c.E && c.E == 1 && !has_losses) {
          EXPECT_NEAR(r.d_logits_TE.at(0), 0, 1e-6);
          continue;
        }
        EXPECT_TRUE(within(r.d_logits_TE, expected, router_bound(c.E)))
            << c.T << " tokens, " << c.K << " of " << c.E << ", losses " << has_losses;
      }
    }
  }
}

TEST(RouterTopk, BackwardAgreesWithFiniteDifferences) {
  const RouterTopkCase c{6, 11, 3};
  for (const TopkNormalize normalize : kNormalizations) {
    RouterBackwardTensors r(c, normalize, 8);
    RouterTopkBackwardArgs args = r.args(normalize, true);
    args.d_logits_in_TE = In<float>();
    run_op(router_topk_backward, args);
    auto loss = [&](const std::vector<double>& logits) {
      return router_loss_oracle(logits, r.forward.index_TK.values(), r.d_weight_TK.values(),
                                r.d_probs_TE.values(), c.E, c.K, normalize);
    };
    TestRandom random(9);
    EXPECT_LT(
        finite_difference_error(loss, r.forward.logits_TE.values(), r.d_logits_TE.values(), random),
        1e-5);
  }
}

// The gradient reaches the forced experts' probabilities, chosen or not.
TEST(RouterTopk, ForcedBackwardAgreesWithFiniteDifferences) {
  const RouterTopkCase c{6, 11, 3};
  for (const TopkNormalize normalize : kNormalizations) {
    RouterBackwardTensors r(c, normalize, 18);
    run_op(router_topk, r.forward.forced(normalize));
    RouterTopkBackwardArgs args = r.args(normalize, true);
    args.d_logits_in_TE = In<float>();
    run_op(router_topk_backward, args);
    TestRandom random(19);
    const auto error_against = [&](const std::vector<double>& index_TK) {
      return finite_difference_error(
          [&](const std::vector<double>& logits) {
            return router_loss_oracle(logits, index_TK, r.d_weight_TK.values(),
                                      r.d_probs_TE.values(), c.E, c.K, normalize);
          },
          r.forward.logits_TE.values(), r.d_logits_TE.values(), random);
    };
    EXPECT_LT(error_against(r.forward.forced_TK.values()), 1e-5);
    EXPECT_GT(error_against(topk_oracle(r.forward.probs_TE.values(), c.E, c.K)), 1e-3);
  }
}

TEST(RouterTopk, MustFailWrongNormalisationOrOrderIsDetected) {
  const RouterTopkCase c{16, 8, 2};
  RouterTensors r(c, 10);
  run_op(router_topk, r.args(TopkNormalize::none, false));
  const std::vector<double> probs = softmax_oracle(r.logits_TE.values(), c.E);
  EXPECT_FALSE(within(
      r.weight_TK, weight_oracle(probs, r.index_TK.values(), c.E, c.K, TopkNormalize::over_top_k),
      router_bound(c.E)));
  std::vector<double> swapped = r.index_TK.values();
  std::swap(swapped[4], swapped[5]);
  EXPECT_FALSE(bits_equal(r.index_TK, swapped));
}

// The GPU's exp differs in the last bits, so choices are compared where no two scores are close:
// logits are distinct multiples of 1/64, in another order for each token.
void spread_logits(RouterTensors& r, const RouterTopkCase& c) {
  TestRandom random(11);
  for (int64_t t = 0; t < c.T; ++t) {
    std::vector<int64_t> rank(static_cast<size_t>(c.E));
    for (int64_t e = 0; e < c.E; ++e) rank[e] = e;
    for (int64_t e = 0; e < c.E; ++e) std::swap(rank[e], rank[random.integer(e, c.E - 1)]);
    for (int64_t e = 0; e < c.E; ++e) r.logits_TE.set(t * c.E + e, rank[e] / 64.0);
  }
}

TEST(RouterTopk, CudaAgreesWithTheReference) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const RouterTopkCase& c : kRouterTopkCases) {
    SCOPED_TRACE(testing::Message() << c.T << " tokens, " << c.K << " of " << c.E);
    for (const TopkNormalize normalize : kNormalizations) {
      for (const bool has_bias : {false, true}) {
        RouterTensors reference(c, 12), gpu(c, 12);
        spread_logits(reference, c);
        spread_logits(gpu, c);
        for (RouterTensors* r : {&reference, &gpu}) {
          for (int64_t e = 0; e < c.E; ++e) r->bias_E.set(e, e % 2 == 0 ? 0 : 2);
        }
        run_op(router_topk, reference.args(normalize, has_bias));
        run_cuda_op(router_topk, gpu.args(normalize, has_bias));
        EXPECT_TRUE(bits_equal(gpu.index_TK, reference.index_TK));
        EXPECT_TRUE(within(gpu.probs_TE, reference.probs_TE.values(), router_bound(c.E)));
        EXPECT_TRUE(within(gpu.weight_TK, reference.weight_TK.values(), router_bound(c.E)));
      }
    }
  }
}

TEST(RouterTopk, CudaForcedExpertsFollowTheReference) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const RouterTopkCase& c : kRouterTopkCases) {
    SCOPED_TRACE(testing::Message() << c.T << " tokens, " << c.K << " of " << c.E);
    for (const TopkNormalize normalize : kNormalizations) {
      RouterTensors reference(c, 23), gpu(c, 23), chosen(c, 23);
      run_op(router_topk, reference.forced(normalize));
      run_cuda_op(router_topk, gpu.forced(normalize));
      EXPECT_TRUE(bits_equal(gpu.index_TK, reference.forced_TK.values()));
      EXPECT_TRUE(within(gpu.probs_TE, reference.probs_TE.values(), router_bound(c.E)));
      EXPECT_TRUE(within(gpu.weight_TK, reference.weight_TK.values(), router_bound(c.E)));
      // Forcing the own choice changes no bit on the GPU either.
      run_cuda_op(router_topk, chosen.args(normalize, false));
      gpu.forced_TK.assign(chosen.index_TK.values());
      run_cuda_op(router_topk, gpu.forced(normalize));
      EXPECT_TRUE(bits_equal(gpu.weight_TK, chosen.weight_TK.values()));
    }
  }
}

TEST(RouterTopk, CudaTiesAndNanFollowTheReference) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const RouterTopkCase& c : {RouterTopkCase{5, 40, 5}, {5, 8, 8}, {5, 1024, 32}}) {
    RouterTensors reference(c, 13), gpu(c, 13);
    for (RouterTensors* r : {&reference, &gpu}) {
      r->logits_TE.fill(0.5);
      for (int64_t e = 0; e < c.E; ++e) r->logits_TE.set(c.E + e, static_cast<double>(e % 4));
      r->logits_TE.set(2 * c.E + 3, std::numeric_limits<double>::quiet_NaN());
      for (int64_t e = 0; e < c.E; ++e) r->logits_TE.set(3 * c.E + e, e == 6 ? 800 : -800);
    }
    run_op(router_topk, reference.args(TopkNormalize::over_top_k, false));
    run_cuda_op(router_topk, gpu.args(TopkNormalize::over_top_k, false));
    EXPECT_TRUE(bits_equal(gpu.index_TK, reference.index_TK)) << c.E;
  }
}

TEST(RouterTopk, CudaBackwardAgreesWithTheReference) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const RouterTopkCase& c : kRouterTopkCases) {
    for (const TopkNormalize normalize : kNormalizations) {
      for (const bool has_losses : {false, true}) {
        RouterBackwardTensors reference(c, normalize, 14), gpu(c, normalize, 14);
        run_op(router_topk_backward, reference.args(normalize, has_losses));
        run_cuda_op(router_topk_backward, gpu.args(normalize, has_losses));
        // Where everything cancels both hold rounding errors of gradients of size one.
        if (c.E == 1 && !has_losses) {
          EXPECT_NEAR(gpu.d_logits_TE.at(0), 0, 1e-6);
          continue;
        }
        EXPECT_TRUE(within(gpu.d_logits_TE, reference.d_logits_TE.values(), router_bound(c.E)))
            << c.T << " tokens, " << c.K << " of " << c.E;
      }
    }
  }
}

// D2 on the GPU: a token's bits do not depend on its neighbours.
TEST(RouterTopk, CudaBitsDependOnTheTokenAlone) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  const RouterTopkCase c{70, 61, 6};
  RouterTensors whole(c, 15);
  expect_rows_independent(c.T, [&](const std::vector<int64_t>& tokens) {
    RouterTensors r({std::ssize(tokens), c.E, c.K}, 16);
    for (int64_t i = 0; i < std::ssize(tokens) * c.E; ++i) {
      r.logits_TE.set(i, whole.logits_TE.at(tokens[i / c.E] * c.E + i % c.E));
    }
    run_cuda_op(router_topk, r.args(TopkNormalize::over_top_k, false));
    std::vector<std::vector<std::byte>> bits_of_rows;
    for (const TestTensor* tensor : {&r.probs_TE, &r.index_TK, &r.weight_TK}) {
      append_row_bits(*tensor, bits_of_rows);
    }
    return bits_of_rows;
  });
}

}  // namespace
}  // namespace cambium::test
