// Parity of combine: exact sums, the order of additions, aliasing, bf16, D1 and D2.
#include "tests/ops/combine_cases.h"
#include "tests/ops/cuda_test.h"

namespace cambium::test {
namespace {

TEST(Combine, AgreesWithOracle) {
  for (const CombineCase& c : kCombineCases) {
    for (const InputFamily family : {InputFamily::integers, InputFamily::normals}) {
      TestRandom random(c.T + c.D);
      TestTensor y_RD = make_tensor(Shape(c.R, c.D), random, family);
      TestTensor residual_TD = make_tensor(Shape(c.T, c.D), random, family);
      TestTensor index_TK = make_combine_index(c, 3), out_TD(Shape(c.T, c.D), DType::f32, c.D + 2);
      for (const bool has_residual : {false, true}) {
        const auto residual = has_residual ? residual_TD.in<Real>() : In<Real>();
        run_op(combine_rows,
               {y_RD.in<Real>(), index_TK.in<int32_t>(), residual, out_TD.out<Real>()});
        const std::vector<double> expected = combine_oracle(
            y_RD, index_TK, has_residual ? residual_TD.values() : std::vector<double>(), c.D);
        if (family == InputFamily::integers) {
          EXPECT_TRUE(bits_equal(out_TD, expected)) << c.T << " x " << c.D;
        } else {
          EXPECT_TRUE(within(out_TD, expected, tolerance(1, c.K + 1))) << c.T << " x " << c.D;
        }
      }
    }
  }
}

// 2^24 + 1 is a tie that rounds down: the order of additions is visible.
TEST(Combine, AddsRowsInOrderAndTheResidualLast) {
  TestTensor y_RD(Shape(3, 1)), index_TK(Shape(2, 3), DType::i32), residual_TD(Shape(2, 1));
  y_RD.assign(std::vector<double>{1, 1, 0x1p24});
  index_TK.assign(std::vector<double>{0, 1, 2, 2, 0, 1});
  residual_TD.fill(-0x1p24);
  TestTensor out_TD(Shape(2, 1));
  run_op(combine_rows,
         {y_RD.in<Real>(), index_TK.in<int32_t>(), residual_TD.in<Real>(), out_TD.out<Real>()});
  EXPECT_TRUE(bits_equal(out_TD, std::vector<double>{2, 0}));
}

// A token without rows keeps its residual bit for bit: -0 + 0 would be +0.
TEST(Combine, AbsentRowsAreSkippedNotAdded) {
  TestTensor y_RD(Shape(1, 2)), index_TK(Shape(1, 2), DType::i32), residual_TD(Shape(1, 2));
  y_RD.fill(-0.0);
  index_TK.fill(-1);
  residual_TD.fill(-0.0);
  TestTensor out_TD(Shape(1, 2));
  run_op(combine_rows,
         {y_RD.in<Real>(), index_TK.in<int32_t>(), residual_TD.in<Real>(), out_TD.out<Real>()});
  EXPECT_TRUE(bits_equal(out_TD, residual_TD));
  index_TK.set(1, 0);
  run_op(combine_rows, {y_RD.in<Real>(), index_TK.in<int32_t>(), In<Real>(), out_TD.out<Real>()});
  EXPECT_TRUE(bits_equal(out_TD, y_RD));
}

TEST(Combine, OutputMayBeTheResidual) {
  const CombineCase c{40, 2, 100, 60};
  TestRandom random(4);
  TestTensor y_RD = make_tensor(Shape(c.R, c.D), random, InputFamily::normals);
  TestTensor x_TD = make_tensor(Shape(c.T, c.D), random, InputFamily::normals);
  TestTensor index_TK = make_combine_index(c, 5), out_TD(Shape(c.T, c.D));
  run_op(combine_rows,
         {y_RD.in<Real>(), index_TK.in<int32_t>(), x_TD.in<Real>(), out_TD.out<Real>()});
  run_op(combine_rows,
         {y_RD.in<Real>(), index_TK.in<int32_t>(), x_TD.in<Real>(), x_TD.out<Real>()});
  EXPECT_TRUE(bits_equal(x_TD, out_TD));
}

TEST(Combine, Bf16RoundsOnceWhereStored) {
  const CombineCase c{30, 4, 33, 60};
  TestRandom random(6);
  TestTensor y_RD = make_tensor(Shape(c.R, c.D), random, InputFamily::normals, DType::bf16);
  TestTensor x_TD = make_tensor(Shape(c.T, c.D), random, InputFamily::normals, DType::bf16);
  TestTensor index_TK = make_combine_index(c, 7);
  TestTensor narrow(Shape(c.T, c.D), DType::bf16), wide(Shape(c.T, c.D));
  for (TestTensor* out_TD : {&narrow, &wide}) {
    run_op(combine_rows,
           {y_RD.in<Real>(), index_TK.in<int32_t>(), x_TD.in<Real>(), out_TD->out<Real>()});
  }
  EXPECT_TRUE(bits_equal(narrow, wide.values()));
}

TEST(Combine, BitsDependOnTheTokenAlone) {
  const CombineCase c{70, 3, 129, 200};
  TestRandom random(8);
  TestTensor y_RD = make_tensor(Shape(c.R, c.D), random, InputFamily::normals);
  TestTensor index_TK = make_combine_index(c, 9);
  auto run = [&](const std::vector<int64_t>& tokens, int threads) {
    const auto count = static_cast<int64_t>(tokens.size());
    TestTensor picked_TK(Shape(count, c.K), DType::i32), out_TD(Shape(count, c.D));
    for (int64_t i = 0; i < count * c.K; ++i) {
      picked_TK.set(i, index_TK.at(tokens[i / c.K] * c.K + i % c.K));
    }
    run_op(combine_rows, {y_RD.in<Real>(), picked_TK.in<int32_t>(), In<Real>(), out_TD.out<Real>()},
           threads);
    std::vector<std::vector<std::byte>> bits_of_rows;
    append_row_bits(out_TD, bits_of_rows);
    return bits_of_rows;
  };
  expect_rows_independent(c.T, [&](const std::vector<int64_t>& rows) { return run(rows, 2); });
}

TEST(Combine, DoesNotDependOnThreads) {
  const CombineCase c{1000, 2, 129, 1500};
  TestRandom random(10);
  TestTensor y_RD = make_tensor(Shape(c.R, c.D), random, InputFamily::normals);
  TestTensor index_TK = make_combine_index(c, 11);
  expect_thread_independent([&](int threads) {
    TestTensor out_TD(Shape(c.T, c.D));
    run_op(combine_rows, {y_RD.in<Real>(), index_TK.in<int32_t>(), In<Real>(), out_TD.out<Real>()},
           threads);
    return out_TD.bits();
  });
}

TEST(Combine, MustFailMissingRowIsDetected) {
  const CombineCase c{16, 2, 8, 32};
  TestRandom random(12);
  TestTensor y_RD = make_tensor(Shape(c.R, c.D), random, InputFamily::normals);
  TestTensor index_TK = make_combine_index(c, 13), out_TD(Shape(c.T, c.D));
  index_TK.set(6, 3);
  const std::vector<double> expected = combine_oracle(y_RD, index_TK, {}, c.D);
  index_TK.set(6, -1);
  run_op(combine_rows, {y_RD.in<Real>(), index_TK.in<int32_t>(), In<Real>(), out_TD.out<Real>()});
  EXPECT_FALSE(within(out_TD, expected, tolerance(1, 3)));
  index_TK.set(6, 32);
  EXPECT_THROW(run_op(combine_rows,
                      {y_RD.in<Real>(), index_TK.in<int32_t>(), In<Real>(), out_TD.out<Real>()}),
               Error);
}

TEST(Combine, CudaGivesTheReferencesBits) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  std::vector<CombineCase> cases = kCombineCases;
  cases.push_back({37, 8, 2048, 296});
  cases.push_back({9, 19, 264, 40});
  for (const CombineCase& c : cases) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      SCOPED_TRACE(testing::Message() << c.T << "x" << c.D << " " << dtype_name(dtype));
      TestRandom random(c.T + c.D);
      TestTensor y_RD = make_tensor(Shape(c.R, c.D), random, InputFamily::normals, dtype);
      TestTensor residual_TD = make_tensor(Shape(c.T, c.D), random, InputFamily::normals, dtype);
      TestTensor index_TK = make_combine_index(c, 3), out_TD(Shape(c.T, c.D), dtype);
      CombineRowsArgs args{y_RD.in<Real>(), index_TK.in<int32_t>(), residual_TD.in<Real>(),
                           out_TD.out<Real>()};
      expect_cuda_agrees(combine_rows, args);
      args.out_TD = residual_TD.out<Real>();
      expect_cuda_agrees(combine_rows, args);
      args.residual_TD = {};
      expect_cuda_agrees(combine_rows, args);
      if (c.T == 37) expect_cuda_rows_independent(combine_rows, args, c.T);
    }
  }
}

}  // namespace
}  // namespace cambium::test
