// Parity of the expert histogram and the selection bias: exact.
#include "tests/ops/cuda_test.h"
#include "tests/ops/expert_load_cases.h"

namespace cambium::test {
namespace {

TEST(ExpertLoad, HistogramCountsEveryChoiceAndAccumulates) {
  for (const RoutingCase& c : kExpertLoadCases) {
    TestTensor first = make_routing(c, 3), second = make_local_routing(c, 4);
    TestTensor count_E(Shape(c.E), DType::i32);
    count_E.fill(0);
    run_op(expert_histogram, {first.in<int32_t>(), count_E.inout<int32_t>()});
    std::vector<double> expected = histogram_oracle(first, c.E);
    EXPECT_TRUE(bits_equal(count_E, expected)) << c.T << " tokens, " << c.E << " experts";
    run_op(expert_histogram, {second.in<int32_t>(), count_E.inout<int32_t>()});
    for (int64_t e = 0; e < c.E; ++e) expected[e] += histogram_oracle(second, c.E)[e];
    EXPECT_TRUE(bits_equal(count_E, expected));
  }
}

TEST(ExpertLoad, HistogramDoesNotDependOnThreads) {
  TestTensor index_TK = make_local_routing({9000, 64, 6, Spread::random}, 5);
  expect_thread_independent([&](int threads) {
    TestTensor count_E(Shape(64), DType::i32);
    count_E.fill(0);
    run_op(expert_histogram, {index_TK.in<int32_t>(), count_E.inout<int32_t>()}, threads);
    return count_E.bits();
  });
}

TEST(ExpertLoad, BiasMovesTowardsTheMean) {
  TestTensor count_E(Shape(4), DType::i32), bias_E(Shape(4));
  count_E.assign(std::vector<double>{3, 5, 4, 4});
  bias_E.assign(std::vector<double>{0, 1, -2, 0.5});
  run_op(router_bias_update, {count_E.in<int32_t>(), bias_E.inout<float>(), 0.25f});
  EXPECT_TRUE(bits_equal(bias_E, std::vector<double>{0.25, 0.75, -2, 0.5}));
}

// The mean of 7, 7, 8 is not representable; the signs are exact all the same.
TEST(ExpertLoad, BiasSignsAreExactForAnyCount) {
  TestTensor count_E(Shape(3), DType::i32), bias_E(Shape(3));
  count_E.assign(std::vector<double>{1000000007, 1000000007, 1000000008});
  bias_E.fill(0);
  run_op(router_bias_update, {count_E.in<int32_t>(), bias_E.inout<float>(), 1.0f});
  EXPECT_TRUE(bits_equal(bias_E, std::vector<double>{1, 1, -1}));
}

// Repeated updates even out a router whose choices follow the bias.
TEST(ExpertLoad, BiasBalancesASkewedRouter) {
  TestTensor bias_E(Shape(4)), count_E(Shape(4), DType::i32);
  bias_E.fill(0);
  auto load = [&] {
    TestRandom random(9);
    std::vector<double> counts(4, 0.0);
    for (int64_t t = 0; t < 2000; ++t) {
      int64_t best = 0;
      double best_score = -1e9;
      for (int64_t e = 0; e < 4; ++e) {
        const double score = random.uniform() + 0.3 * static_cast<double>(e) + bias_E.at(e);
        if (score > best_score) best_score = score, best = e;
      }
      counts[best] += 1;
    }
    return counts;
  };
  const std::vector<double> before = load();
  for (int step = 0; step < 100; ++step) {
    count_E.assign(load());
    run_op(router_bias_update, {count_E.in<int32_t>(), bias_E.inout<float>(), 0.01f});
  }
  const std::vector<double> after = load();
  EXPECT_GT(*std::max_element(before.begin(), before.end()), 900);
  EXPECT_LT(*std::max_element(after.begin(), after.end()), 560);
}

TEST(ExpertLoad, MustFailOutOfRangeExpertIsRefused) {
  TestTensor index_TK(Shape(2, 1), DType::i32), count_E(Shape(4), DType::i32);
  index_TK.assign(std::vector<double>{0, 4});
  count_E.fill(0);
  EXPECT_THROW(run_op(expert_histogram, {index_TK.in<int32_t>(), count_E.inout<int32_t>()}), Error);
}

TEST(ExpertLoad, CudaGivesTheReferencesBits) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const RoutingCase& c : kExpertLoadCases) {
    TestTensor index_TK = make_local_routing(c, 4), count_E(Shape(c.E), DType::i32);
    TestRandom random(c.E);
    count_E.fill_integers(random, 0, 1000000000);
    expect_cuda_agrees(expert_histogram, {index_TK.in<int32_t>(), count_E.inout<int32_t>()});
    TestTensor bias_E = make_tensor(Shape(c.E), random, InputFamily::normals);
    expect_cuda_agrees(router_bias_update, {count_E.in<int32_t>(), bias_E.inout<float>(), 0.25f});
  }
}

}  // namespace
}  // namespace cambium::test
