// Parity of the router's z-loss: oracle, extremes, D1, D2, finite differences.
#include "tests/ops/cuda_test.h"
#include "tests/ops/z_loss_cases.h"

namespace cambium::test {
namespace {

// exp and log are within an ulp or two, the sum of E positive terms adds the rest.
double z_loss_bound(int64_t E) { return tolerance(8, E); }

TEST(ZLoss, AgreesWithOracle) {
  for (const ZLossCase& c : kZLossCases) {
    TestRandom random(c.T + c.E);
    TestTensor logits_TE = make_tensor(Shape(c.T, c.E), random, InputFamily::normals);
    TestTensor loss_T(Shape(c.T)), d_logits_TE(Shape(c.T, c.E), DType::f32, c.E + 3);
    run_op(z_loss,
           {logits_TE.in<float>(), 0.5f, 3.0f, loss_T.out<float>(), d_logits_TE.out<float>()});
    const ZLossExpected expected = z_loss_oracle(logits_TE.values(), c.E, 0.5, 3.0);
    EXPECT_TRUE(within(loss_T, expected.loss_T, z_loss_bound(c.E))) << c.T << " x " << c.E;
    EXPECT_TRUE(within(d_logits_TE, expected.d_logits_TE, z_loss_bound(c.E)));
  }
}

TEST(ZLoss, LargeLogitsStayFinite) {
  TestTensor logits_TE(Shape(3, 3)), loss_T(Shape(3)), d_logits_TE(Shape(3, 3));
  logits_TE.assign(std::vector<double>{1000, -1000, 999, -500, -500, -500, 0, 0, 90});
  run_op(z_loss,
         {logits_TE.in<float>(), 1.0f, 1.0f, loss_T.out<float>(), d_logits_TE.out<float>()});
  const ZLossExpected expected = z_loss_oracle(logits_TE.values(), 3, 1.0, 1.0);
  EXPECT_TRUE(within(loss_T, expected.loss_T, z_loss_bound(3)));
  EXPECT_TRUE(within(d_logits_TE, expected.d_logits_TE, z_loss_bound(3)));
}

TEST(ZLoss, BitsDependOnTheTokenAlone) {
  const int64_t T = 600, E = 61;
  TestRandom random(3);
  TestTensor logits_TE = make_tensor(Shape(T, E), random, InputFamily::normals);
  auto run = [&](const std::vector<int64_t>& tokens, int threads) {
    const auto count = static_cast<int64_t>(tokens.size());
    TestTensor from(Shape(count, E)), loss_T{Shape(count)}, d_logits_TE{Shape(count, E)};
    for (int64_t i = 0; i < count * E; ++i) from.set(i, logits_TE.at(tokens[i / E] * E + i % E));
    run_op(z_loss, {from.in<float>(), 0.5f, 3.0f, loss_T.out<float>(), d_logits_TE.out<float>()},
           threads);
    std::vector<std::vector<std::byte>> bits_of_rows;
    append_row_bits(loss_T, bits_of_rows);
    append_row_bits(d_logits_TE, bits_of_rows);
    return bits_of_rows;
  };
  expect_rows_independent(T, [&](const std::vector<int64_t>& rows) { return run(rows, 2); });
  std::vector<int64_t> all(T);
  for (int64_t t = 0; t < T; ++t) all[t] = t;
  expect_thread_independent([&](int threads) {
    std::vector<std::byte> bits;
    for (const auto& row : run(all, threads)) bits.insert(bits.end(), row.begin(), row.end());
    return bits;
  });
}

TEST(ZLoss, GradientAgreesWithFiniteDifferences) {
  TestRandom random(4);
  TestTensor logits_TE = make_tensor(Shape(6, 11), random, InputFamily::normals);
  TestTensor loss_T(Shape(6)), d_logits_TE(Shape(6, 11));
  run_op(z_loss,
         {logits_TE.in<float>(), 0.5f, 0.5f, loss_T.out<float>(), d_logits_TE.out<float>()});
  auto loss = [](const std::vector<double>& logits) {
    double sum = 0;
    for (const double value : z_loss_oracle(logits, 11, 0.5, 0.5).loss_T) sum += value;
    return sum;
  };
  EXPECT_LT(finite_difference_error(loss, logits_TE.values(), d_logits_TE.values(), random), 1e-5);
}

TEST(ZLoss, MustFailMissingFactorIsDetected) {
  TestRandom random(5);
  TestTensor logits_TE = make_tensor(Shape(9, 8), random, InputFamily::normals);
  TestTensor loss_T(Shape(9)), d_logits_TE(Shape(9, 8));
  run_op(z_loss,
         {logits_TE.in<float>(), 1.0f, 1.0f, loss_T.out<float>(), d_logits_TE.out<float>()});
  const ZLossExpected wrong = z_loss_oracle(logits_TE.values(), 8, 1.00001, 0.5);
  EXPECT_FALSE(within(loss_T, wrong.loss_T, z_loss_bound(8)));
  EXPECT_FALSE(within(d_logits_TE, wrong.d_logits_TE, z_loss_bound(8)));
}

TEST(ZLoss, CudaAgreesWithTheReference) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const ZLossCase& c : kZLossCases) {
    TestRandom random(c.T + c.E);
    TestTensor logits_TE = make_tensor(Shape(c.T, c.E), random, InputFamily::normals);
    TestTensor loss_T(Shape(c.T)), d_logits_TE(Shape(c.T, c.E), DType::f32, c.E + 3);
    const ZLossArgs args{logits_TE.in<float>(), 0.5f, 3.0f, loss_T.out<float>(),
                         d_logits_TE.out<float>()};
    expect_cuda_agrees(z_loss, args, z_loss_bound(c.E));
    if (c.T == 33) expect_cuda_rows_independent(z_loss, args, c.T);
  }
}

}  // namespace
}  // namespace cambium::test
