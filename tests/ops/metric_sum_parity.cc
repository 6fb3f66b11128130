// Parity of metric_sum and count_fraction with fp64 loops.
#include "kernels/metric_sum.h"
#include "tests/ops/cuda_test.h"
#include "tests/ops/metric_sum_cases.h"
#include "tests/ops/op_test.h"

namespace cambium::test {

namespace {

constexpr int64_t kColumns = 3;

// The oracle: what column 1 holds after the call, the other columns untouched.
std::vector<double> expected_table(const TestTensor& value, const TestTensor& table,
                                   const MetricSumCase& c) {
  std::vector<double> want = table.values();
  for (int64_t i = 0; i < c.blocks * c.per_block; ++i) {
    want[i / c.per_block * kColumns + 1] += value.at(i);
  }
  return want;
}

TEST(MetricSumOp, AddsBlocksIntoOneColumn) {
  for (const MetricSumCase& c : metric_sum_cases()) {
    for (const InputFamily family : {InputFamily::integers, InputFamily::normals}) {
      TestRandom random(static_cast<uint64_t>(c.blocks * 1000 + c.per_block));
      TestTensor value = make_tensor(Shape(c.blocks * c.per_block), random, family);
      TestTensor table = make_tensor(Shape(c.blocks, kColumns), random, family);
      const std::vector<double> want = expected_table(value, table, c);
      run_op(metric_sum,
             MetricSumArgs{
                 .value_N = value.in<float>(), .leaf_BM = table.inout<float>(), .column = 1});
      if (family == InputFamily::integers) {
        EXPECT_TRUE(bits_equal(table, want));
      } else {
        EXPECT_TRUE(within(table, want, tolerance(4, c.per_block)));
      }
    }
  }
}

TEST(MetricSumOp, FractionsOfCountsAndOfNone) {
  TestTensor count(Shape(4), DType::i32), fraction(Shape(4));
  count.assign(std::vector<double>{1, 0, 3, 4});
  const CountFractionArgs args{.count_E = count.in<int32_t>(), .fraction_E = fraction.out<float>()};
  run_op(count_fraction, args);
  EXPECT_TRUE(bits_equal(fraction, std::vector<double>{0.125, 0, 0.375, 0.5}));
  count.fill(0);
  run_op(count_fraction, args);
  EXPECT_TRUE(bits_equal(fraction, std::vector<double>{0, 0, 0, 0}));
}

TEST(MetricSumOp, MustFailWhenABlockIsShifted) {
  const MetricSumCase c{4, 31};
  TestRandom random(5);
  TestTensor value = make_tensor(Shape(c.blocks * c.per_block), random, InputFamily::normals);
  TestTensor table(Shape(c.blocks, kColumns));
  table.fill(0);
  std::vector<double> want = expected_table(value, table, c);
  std::rotate(want.begin(), want.begin() + kColumns, want.end());
  run_op(metric_sum,
         MetricSumArgs{.value_N = value.in<float>(), .leaf_BM = table.inout<float>(), .column = 1});
  EXPECT_FALSE(within(table, want, tolerance(4, c.per_block)));
}

TEST(MetricSumOp, CudaGivesTheReferencesBits) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const MetricSumCase& c : metric_sum_cases()) {
    TestRandom random(static_cast<uint64_t>(c.blocks * 1000 + c.per_block));
    TestTensor value = make_tensor(Shape(c.blocks * c.per_block), random, InputFamily::normals);
    TestTensor table = make_tensor(Shape(c.blocks, kColumns), random, InputFamily::normals);
    expect_cuda_agrees(
        metric_sum, {.value_N = value.in<float>(), .leaf_BM = table.inout<float>(), .column = 1});
  }
  for (const int64_t total : {0, 100}) {
    TestRandom random(3);
    TestTensor count(Shape(61), DType::i32), fraction(Shape(61));
    count.fill_integers(random, 0, total);
    expect_cuda_agrees(count_fraction,
                       {.count_E = count.in<int32_t>(), .fraction_E = fraction.out<float>()});
  }
}

}  // namespace

}  // namespace cambium::test
