// Parity of the routing sort: exact, stable, the same for any thread count.
#include "tests/ops/cuda_test.h"
#include "tests/ops/routing_sort_cases.h"

namespace cambium::test {
namespace {

void expect_sorted(const RoutingSortOutputs& out, const RoutingSortExpected& expected) {
  EXPECT_TRUE(bits_equal(out.offset_e1, expected.offset_e1));
  EXPECT_TRUE(bits_equal(out.token_R, expected.token_R));
  EXPECT_TRUE(bits_equal(out.slot_R, expected.slot_R));
  EXPECT_TRUE(bits_equal(out.ordered_row_R, expected.ordered_row_R));
  EXPECT_TRUE(bits_equal(out.slot_row_TK, expected.slot_row_TK));
}

TEST(RoutingSort, AgreesWithALibrarySort) {
  for (const RoutingCase& c : kRoutingSortCases) {
    SCOPED_TRACE(testing::Message() << c.T << " tokens, " << c.E << " experts");
    TestTensor all = make_routing(c, 3), some = make_local_routing(c, 4);
    for (TestTensor* index_TK : {&all, &some}) {
      const RoutingSortExpected expected = routing_sort_oracle(*index_TK, c.E, c.T * c.K);
      expect_sorted(run_routing_sort(*index_TK, c.E, c.T * c.K, RoutingOrder::stable), expected);
    }
  }
}

TEST(RoutingSort, ExactRowCapacityIsEnough) {
  TestTensor index_TK = make_local_routing({50, 8, 2, Spread::random}, 6);
  const auto values = index_TK.values();
  const int64_t R = std::count_if(values.begin(), values.end(), [](double e) { return e >= 0; });
  ASSERT_LT(R, 100);
  expect_sorted(run_routing_sort(index_TK, 8, R, RoutingOrder::stable),
                routing_sort_oracle(index_TK, 8, R));
  EXPECT_THROW(run_routing_sort(index_TK, 8, R - 1, RoutingOrder::stable), Error);
}

TEST(RoutingSort, NoTokenHereLeavesEverythingEmpty) {
  TestTensor index_TK(Shape(5, 2), DType::i32);
  index_TK.fill(-1);
  const RoutingSortOutputs out = run_routing_sort(index_TK, 3, 10, RoutingOrder::stable);
  EXPECT_TRUE(bits_equal(out.offset_e1, std::vector<double>(4, 0.0)));
  EXPECT_TRUE(bits_equal(out.token_R, std::vector<double>(10, -1.0)));
  EXPECT_TRUE(bits_equal(out.slot_row_TK, std::vector<double>(10, -1.0)));
}

TEST(RoutingSort, DoesNotDependOnThreads) {
  TestTensor index_TK = make_local_routing({7001, 64, 6, Spread::random}, 8);
  expect_thread_independent([&](int threads) {
    const RoutingSortOutputs out =
        run_routing_sort(index_TK, 64, 7001 * 6, RoutingOrder::stable, threads);
    std::vector<std::byte> bits = out.slot_R.bits();
    const std::vector<std::byte> ordered = out.ordered_row_R.bits();
    bits.insert(bits.end(), ordered.begin(), ordered.end());
    return bits;
  });
}

// The injected fault changes the rows' order within an expert and nothing else: it is a valid
// permutation, so that only a comparison of bits can notice it.
TEST(RoutingSort, ReversedOrderIsAnotherValidPermutation) {
  TestTensor index_TK = make_local_routing({40, 4, 2, Spread::random}, 9);
  const auto stable = run_routing_sort(index_TK, 4, 80, RoutingOrder::stable);
  const auto reversed = run_routing_sort(index_TK, 4, 80, RoutingOrder::reversed_within_expert);
  EXPECT_TRUE(bits_equal(reversed.offset_e1, stable.offset_e1));
  for (int64_t e = 0; e < 4; ++e) {
    const auto first = static_cast<int64_t>(stable.offset_e1.at(e));
    const auto last = static_cast<int64_t>(stable.offset_e1.at(e + 1)) - 1;
    for (int64_t row = first; row <= last; ++row) {
      EXPECT_EQ(reversed.slot_R.at(row), stable.slot_R.at(first + last - row));
    }
  }
  for (int64_t slot = 0; slot < 80; ++slot) {
    const auto row = static_cast<int64_t>(reversed.slot_row_TK.at(slot));
    if (row < 0) continue;
    EXPECT_EQ(reversed.slot_R.at(row), static_cast<double>(slot));
  }
}

TEST(RoutingSort, MustFailUnstableOrderIsDetected) {
  TestTensor index_TK = make_routing({64, 8, 2, Spread::random}, 10);
  const RoutingSortExpected expected = routing_sort_oracle(index_TK, 8, 128);
  ASSERT_TRUE(
      bits_equal(run_routing_sort(index_TK, 8, 128, RoutingOrder::stable).slot_R, expected.slot_R));
  EXPECT_FALSE(
      bits_equal(run_routing_sort(index_TK, 8, 128, RoutingOrder::reversed_within_expert).slot_R,
                 expected.slot_R));
}

TEST(RoutingSort, CudaGivesTheReferencesBits) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const RoutingCase& c : kRoutingSortCases) {
    SCOPED_TRACE(testing::Message() << c.T << " tokens, " << c.E << " experts");
    TestTensor all = make_routing(c, 3), some = make_local_routing(c, 4);
    TestTensor none(all.shape(), DType::i32);
    none.fill(-1);
    for (TestTensor* index_TK : {&all, &some, &none}) {
      for (const RoutingOrder order :
           {RoutingOrder::stable, RoutingOrder::reversed_within_expert}) {
        const Shape R(c.T * c.K);
        TestTensor offset = make_index_output(Shape(c.E + 1)), token = make_index_output(R);
        TestTensor slot = make_index_output(R), ordered = make_index_output(R);
        TestTensor slot_row = make_index_output(all.shape());
        expect_cuda_agrees(routing_sort, {.expert_index_TK = index_TK->in<int32_t>(),
                                          .experts = c.E,
                                          .expert_offset_e1 = offset.out<int32_t>(),
                                          .row_token_R = token.out<int32_t>(),
                                          .row_slot_R = slot.out<int32_t>(),
                                          .ordered_row_R = ordered.out<int32_t>(),
                                          .slot_row_TK = slot_row.out<int32_t>(),
                                          .order = order});
      }
    }
  }
}

}  // namespace
}  // namespace cambium::test
