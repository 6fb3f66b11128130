// Parity of the dispatch plan: exact, deduplicated, the same for any thread count.
#include "tests/ops/cuda_test.h"
#include "tests/ops/dispatch_plan_cases.h"

namespace cambium::test {
namespace {

TestTensor make_weights(const RoutingCase& c) {
  TestRandom random(c.T + 17);
  return make_tensor(Shape(c.T, c.K), random, InputFamily::normals);
}

TEST(DispatchPlan, AgreesWithTheDefinition) {
  for (const DispatchPlanCase& c : kDispatchPlanCases) {
    SCOPED_TRACE(testing::Message() << c.routing.T << " tokens to " << c.ranks << " ranks");
    TestTensor index_TK = make_routing(c.routing, 3), weight_TK = make_weights(c.routing);
    const int64_t experts_per_rank = c.routing.E / c.ranks;
    const auto expected = dispatch_plan_oracle(index_TK, weight_TK, c.ranks, experts_per_rank);
    const auto out = run_dispatch_plan(index_TK, weight_TK, c.ranks, experts_per_rank);
    EXPECT_TRUE(bits_equal(out.count_P2, expected.count_P2));
    EXPECT_TRUE(bits_equal(out.token_M, expected.token_M));
    EXPECT_TRUE(bits_equal(out.expert_MK, expected.expert_MK));
    EXPECT_TRUE(bits_equal(out.weight_MK, expected.weight_MK));
    EXPECT_TRUE(bits_equal(out.return_row_TK, expected.return_row_TK));
    EXPECT_TRUE(bits_equal(out.part_TP, expected.part_TP));
  }
}

// Both choices of every token live on rank 1: one entry a token, two rows.
TEST(DispatchPlan, SendsATokenOncePerDestination) {
  TestTensor index_TK(Shape(5, 2), DType::i32), weight_TK(Shape(5, 2));
  for (int64_t t = 0; t < 5; ++t) index_TK.set(2 * t, 3), index_TK.set(2 * t + 1, 2);
  weight_TK.fill(0.5);
  const auto out = run_dispatch_plan(index_TK, weight_TK, 2, 2);
  EXPECT_TRUE(bits_equal(out.count_P2, std::vector<double>{0, 0, 5, 10}));
  EXPECT_EQ(out.expert_MK.at(0), 1);
  EXPECT_EQ(out.expert_MK.at(1), 0);
  EXPECT_EQ(out.token_M.at(4), 4);
  EXPECT_EQ(out.token_M.at(5), -1);
}

// Every expert may be chosen by every token of one rank: the capacity is reached, not exceeded.
TEST(DispatchPlan, FillsItsCapacity) {
  TestTensor index_TK(Shape(3, 4), DType::i32), weight_TK(Shape(3, 4));
  for (int64_t i = 0; i < 12; ++i) index_TK.set(i, static_cast<double>((i + i / 4) % 4));
  weight_TK.fill(0.25);
  const auto out = run_dispatch_plan(index_TK, weight_TK, 4, 1);
  EXPECT_TRUE(bits_equal(out.count_P2, std::vector<double>{3, 3, 3, 3, 3, 3, 3, 3}));
  EXPECT_TRUE(bits_equal(out.token_M, std::vector<double>{0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2}));
}

TEST(DispatchPlan, DoesNotDependOnThreads) {
  const RoutingCase c{7001, 64, 6, Spread::random};
  TestTensor index_TK = make_routing(c, 8), weight_TK = make_weights(c);
  expect_thread_independent([&](int threads) {
    const auto out = run_dispatch_plan(index_TK, weight_TK, 8, 8, threads);
    std::vector<std::byte> bits;
    for (const TestTensor* tensor : {&out.count_P2, &out.token_M, &out.expert_MK, &out.weight_MK,
                                     &out.return_row_TK, &out.part_TP}) {
      const std::vector<std::byte> part = tensor->bits();
      bits.insert(bits.end(), part.begin(), part.end());
    }
    return bits;
  });
}

TEST(DispatchPlan, MustFailWithoutDedupOrWithAWrongHome) {
  const RoutingCase c{64, 8, 4, Spread::random};
  TestTensor index_TK = make_routing(c, 9), weight_TK = make_weights(c);
  const auto expected = dispatch_plan_oracle(index_TK, weight_TK, 2, 4);
  const auto other = run_dispatch_plan(index_TK, weight_TK, 4, 2);
  EXPECT_FALSE(bits_equal(other.return_row_TK, expected.return_row_TK));
  EXPECT_LT(expected.count_P2[0], expected.count_P2[1]);  // dedup merged something
  index_TK.set(5, 8);                                     // beyond the last expert
  EXPECT_THROW(run_dispatch_plan(index_TK, weight_TK, 2, 4), Error);
}

TEST(DispatchPlan, CudaGivesTheReferencesBits) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const DispatchPlanCase& c : kDispatchPlanCases) {
    SCOPED_TRACE(testing::Message() << c.routing.T << " tokens to " << c.ranks << " ranks");
    const int64_t T = c.routing.T, K = c.routing.K, M = dispatch_capacity(T, K, c.ranks);
    TestTensor index_TK = make_routing(c.routing, 3), weight_TK = make_weights(c.routing);
    TestTensor count = make_index_output(Shape(c.ranks, 2)), token = make_index_output(Shape(M));
    TestTensor expert = make_index_output(Shape(M, K)), weight(Shape(M, K));
    TestTensor row = make_index_output(Shape(T, K)), part = make_index_output(Shape(T, c.ranks));
    expect_cuda_agrees(dispatch_plan, {.expert_index_TK = index_TK.in<int32_t>(),
                                       .weight_TK = weight_TK.in<float>(),
                                       .ranks = c.ranks,
                                       .experts_per_rank = c.routing.E / c.ranks,
                                       .send_count_P2 = count.out<int32_t>(),
                                       .send_token_M = token.out<int32_t>(),
                                       .send_expert_MK = expert.out<int32_t>(),
                                       .send_weight_MK = weight.out<float>(),
                                       .return_row_TK = row.out<int32_t>(),
                                       .token_part_TP = part.out<int32_t>()});
  }
}

}  // namespace
}  // namespace cambium::test
