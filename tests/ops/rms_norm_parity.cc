// rms_norm against its oracle: bits on exact inputs, tolerances on normals, gradients by finite
// differences, and independence of threads and of other rows.
#include "tests/ops/cuda_test.h"
#include "tests/ops/rms_norm_cases.h"

namespace cambium::test {
namespace {

constexpr float kEpsilon = 1e-6f;

// All tensors of one case. Exact family: |x + residual| = 2, so that rstd = 1/2 with epsilon 0.
struct RmsNormTensors {
  RmsNormTensors(const RmsNormCase& shape, InputFamily family, DType dtype = DType::f32)
      : c(shape),
        epsilon(family == InputFamily::integers ? 0.0f : kEpsilon),
        x(Shape(c.T, c.D), dtype),
        residual(Shape(c.T, c.D), dtype),
        gain(Shape(c.D), dtype),
        sum(Shape(c.T, c.D), dtype),
        y(Shape(c.T, c.D), dtype),
        rstd(Shape(c.T)),
        d_y(Shape(c.T, c.D), dtype),
        d_residual(Shape(c.T, c.D), dtype),
        d_x(Shape(c.T, c.D), dtype),
        d_gain_leaf(Shape((c.T + c.block_tokens - 1) / c.block_tokens, c.D)) {
    TestRandom random(static_cast<uint64_t>(c.T * 1000 + c.D));
    for (TestTensor* tensor : {&x, &residual, &gain, &d_y, &d_residual}) {
      tensor->fill_family(random, family);
    }
    if (family == InputFamily::integers) {
      for (int64_t i = 0; i < x.elements(); ++i) {
        const double s = random.integer(0, 1) == 0 ? 2.0 : -2.0;
        x.set(i, has_residual() ? s - residual.at(i) : s);
      }
    }
  }
  bool has_residual() const { return c.residual == Residual::present; }
  std::vector<double> residual_values() const {
    return has_residual() ? residual.values() : std::vector<double>();
  }
  std::vector<double> d_residual_values() const {
    return has_residual() ? d_residual.values() : std::vector<double>();
  }
  // What the forward pass normed.
  TestTensor& normed() { return has_residual() ? sum : x; }

  RmsNormArgs forward_args() {
    RmsNormArgs args{.x_TD = x.in<Real>(),
                     .gain_D = gain.in<Real>(),
                     .y_TD = y.out<Real>(),
                     .rstd_T = rstd.out<float>(),
                     .epsilon = epsilon};
    if (has_residual()) {
      args.residual_TD = residual.in<Real>();
      args.sum_TD = sum.out<Real>();
    }
    return args;
  }
  RmsNormBackwardArgs backward_args() {
    RmsNormBackwardArgs args{.d_y_TD = d_y.in<Real>(),
                             .x_TD = normed().in<Real>(),
                             .gain_D = gain.in<Real>(),
                             .rstd_T = rstd.in<float>(),
                             .d_x_TD = d_x.out<Real>(),
                             .d_gain_leaf_BD = d_gain_leaf.out<float>(),
                             .block_tokens = c.block_tokens};
    if (has_residual()) args.d_residual_TD = d_residual.in<Real>();
    return args;
  }
  void forward(int threads = 2) { run_op(rms_norm, forward_args(), threads); }
  void backward(int threads = 2) { run_op(rms_norm_backward, backward_args(), threads); }

  RmsNormCase c;
  float epsilon;
  TestTensor x, residual, gain, sum, y, rstd, d_y, d_residual, d_x, d_gain_leaf;
};

TEST(RmsNorm, ExactInputsGiveTheOraclesBits) {
  for (const RmsNormCase& c : kRmsNormCases) {
    if ((c.D & (c.D - 1)) != 0) continue;  // the mean over D is exact for powers of two
    RmsNormTensors t(c, InputFamily::integers);
    t.forward();
    const auto expected =
        rms_norm_oracle(t.x.values(), t.residual_values(), t.gain.values(), c.T, 0);
    EXPECT_TRUE(bits_equal(t.y, expected.y));
    EXPECT_TRUE(bits_equal(t.rstd, expected.rstd));
    if (t.has_residual()) {
      EXPECT_TRUE(bits_equal(t.sum, expected.sum));
    }
    t.backward();
    const auto gradients = rms_norm_backward_oracle(t.d_y.values(), expected.sum, t.gain.values(),
                                                    t.d_residual_values(), c, 0);
    EXPECT_TRUE(bits_equal(t.d_x, gradients.d_x));
    EXPECT_TRUE(bits_equal(t.d_gain_leaf, gradients.d_gain_leaf));
  }
}

TEST(RmsNorm, NormalsStayWithinRounding) {
  for (const RmsNormCase& c : kRmsNormCases) {
    RmsNormTensors t(c, InputFamily::normals);
    t.forward();
    const auto expected =
        rms_norm_oracle(t.x.values(), t.residual_values(), t.gain.values(), c.T, kEpsilon);
    // rstd carries half the error of a sum over D; four roundings follow.
    EXPECT_TRUE(within(t.y, expected.y, tolerance(2, 4))) << c.T << "x" << c.D;
    EXPECT_TRUE(within(t.rstd, expected.rstd, tolerance(2, 4)));
    t.backward();
    const auto gradients = rms_norm_backward_oracle(t.d_y.values(), expected.sum, t.gain.values(),
                                                    t.d_residual_values(), c, kEpsilon);
    // With D = 1 the gradient cancels to rounding noise: only the exact family tests it.
    if (c.D > 1) {
      EXPECT_TRUE(within(t.d_x, gradients.d_x, tolerance(2, 16))) << c.T << "x" << c.D;
    }
    EXPECT_TRUE(within(t.d_gain_leaf, gradients.d_gain_leaf, tolerance(2, c.block_tokens)));
  }
}

TEST(RmsNorm, GradientsAgreeWithFiniteDifferences) {
  const RmsNormCase c{12, 40, 12, Residual::absent};
  RmsNormTensors t(c, InputFamily::normals);
  t.forward();
  t.backward();
  const std::vector<double> weight = t.d_y.values(), x = t.x.values(), gain = t.gain.values();
  auto loss = [&](const std::vector<double>& at_x, const std::vector<double>& at_gain) {
    const auto y = rms_norm_oracle(at_x, {}, at_gain, c.T, kEpsilon).y;
    double total = 0.0;
    for (size_t i = 0; i < y.size(); ++i) total += weight[i] * y[i];
    return total;
  };
  TestRandom random(5);
  EXPECT_LT(finite_difference_error([&](const auto& v) { return loss(v, gain); }, x, t.d_x.values(),
                                    random),
            1e-4);
  EXPECT_LT(finite_difference_error([&](const auto& v) { return loss(x, v); }, gain,
                                    t.d_gain_leaf.values(), random),
            1e-4);
}

TEST(RmsNorm, ThreadsDoNotChangeBits) {
  expect_thread_independent([](int threads) {
    RmsNormTensors t({512, 128, 32, Residual::present}, InputFamily::normals);
    t.forward(threads);
    t.backward(threads);
    std::vector<std::byte> bits = t.y.bits();
    for (const TestTensor* tensor : {&t.sum, &t.rstd, &t.d_x, &t.d_gain_leaf}) {
      const std::vector<std::byte> more = tensor->bits();
      bits.insert(bits.end(), more.begin(), more.end());
    }
    return bits;
  });
}

TEST(RmsNorm, RowsDoNotDependOnTheBatch) {
  RmsNormTensors all({37, 72, 37, Residual::present}, InputFamily::normals);
  expect_rows_independent(all.c.T, [&](const std::vector<int64_t>& rows) {
    const int64_t D = all.c.D, T = static_cast<int64_t>(rows.size());
    RmsNormTensors part({T, D, T, Residual::present}, InputFamily::normals);
    part.gain.assign(all.gain.values());
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t i = 0; i < D; ++i) {
        part.x.set(t * D + i, all.x.at(rows[t] * D + i));
        part.residual.set(t * D + i, all.residual.at(rows[t] * D + i));
        part.d_y.set(t * D + i, all.d_y.at(rows[t] * D + i));
        part.d_residual.set(t * D + i, all.d_residual.at(rows[t] * D + i));
      }
    }
    part.forward();
    part.backward();
    std::vector<std::vector<std::byte>> bits;
    for (const TestTensor* tensor : {&part.y, &part.sum, &part.rstd, &part.d_x}) {
      append_row_bits(*tensor, bits);
    }
    return bits;
  });
}

TEST(RmsNorm, Bf16StorageRoundsTheSumBeforeTheNorm) {
  RmsNormTensors t({40, 96, 16, Residual::present}, InputFamily::normals, DType::bf16);
  t.forward();
  // The oracle starts from the stored sum: that rounding is part of the contract.
  const auto expected = rms_norm_oracle(t.sum.values(), {}, t.gain.values(), t.c.T, kEpsilon);
  EXPECT_TRUE(within(t.y, expected.y, bf16_tolerance(2, 4)));
  EXPECT_TRUE(within(t.rstd, expected.rstd, tolerance(2, 4)));
  t.backward();
  const auto gradients = rms_norm_backward_oracle(t.d_y.values(), t.sum.values(), t.gain.values(),
                                                  t.d_residual_values(), t.c, kEpsilon);
  EXPECT_TRUE(within(t.d_x, gradients.d_x, bf16_tolerance(2, 16)));
  EXPECT_TRUE(within(t.d_gain_leaf, gradients.d_gain_leaf, tolerance(2, t.c.block_tokens)));
}

TEST(RmsNorm, OutputsMayReplaceInputs) {
  RmsNormTensors apart({64, 128, 32, Residual::present}, InputFamily::normals);
  RmsNormTensors in_place = apart;
  apart.forward();
  apart.backward();
  run_op(rms_norm, RmsNormArgs{.x_TD = in_place.x.in<Real>(),
                               .residual_TD = in_place.residual.in<Real>(),
                               .gain_D = in_place.gain.in<Real>(),
                               .sum_TD = in_place.residual.out<Real>(),
                               .y_TD = in_place.x.out<Real>(),
                               .rstd_T = in_place.rstd.out<float>(),
                               .epsilon = kEpsilon});
  EXPECT_TRUE(bits_equal(in_place.x, apart.y));
  EXPECT_TRUE(bits_equal(in_place.residual, apart.sum));
  run_op(rms_norm_backward, RmsNormBackwardArgs{.d_y_TD = in_place.d_y.in<Real>(),
                                                .x_TD = in_place.residual.in<Real>(),
                                                .gain_D = in_place.gain.in<Real>(),
                                                .rstd_T = in_place.rstd.in<float>(),
                                                .d_residual_TD = in_place.d_residual.in<Real>(),
                                                .d_x_TD = in_place.d_residual.out<Real>(),
                                                .d_gain_leaf_BD = in_place.d_gain_leaf.out<float>(),
                                                .block_tokens = 32});
  EXPECT_TRUE(bits_equal(in_place.d_residual, apart.d_x));
}

TEST(RmsNorm, MustFailWhenTheMeanIsWrong) {
  const RmsNormCase c{16, 64, 16, Residual::absent};
  RmsNormTensors t(c, InputFamily::normals);
  t.forward();
  t.backward();
  const auto right =
      rms_norm_backward_oracle(t.d_y.values(), t.x.values(), t.gain.values(), {}, c, kEpsilon);
  auto wrong = right.d_x;  // a gradient that forgets the projection along x
  for (int64_t i = 0; i < c.T * c.D; ++i) {
    wrong[i] = t.rstd.at(i / c.D) * t.gain.at(i % c.D) * t.d_y.at(i);
  }
  EXPECT_TRUE(within(t.d_x, right.d_x, tolerance(2, 16)));
  EXPECT_FALSE(within(t.d_x, wrong, tolerance(2, 16)));
  EXPECT_THROW(run_op(rms_norm, RmsNormArgs{.x_TD = t.x.in<Real>(),
                                            .gain_D = t.x.in<Real>(),
                                            .y_TD = t.y.out<Real>(),
                                            .rstd_T = t.rstd.out<float>()}),
               Error);
}

// Beside the common cases: rows of whole vectors at a real width, and rows longer than one vector a
// thread.
std::vector<RmsNormCase> cuda_rms_norm_cases() {
  std::vector<RmsNormCase> cases = kRmsNormCases;
  cases.push_back({37, 2048, 16, Residual::present});
  cases.push_back({3, 16384, 2, Residual::absent});
  return cases;
}

TEST(RmsNorm, CudaAgreesWithTheReference) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const RmsNormCase& c : cuda_rms_norm_cases()) {
    for (const InputFamily family : {InputFamily::integers, InputFamily::normals}) {
      for (const DType dtype : {DType::f32, DType::bf16}) {
        SCOPED_TRACE(testing::Message() << c.T << "x" << c.D << " " << dtype_name(dtype));
        RmsNormTensors t(c, family, dtype);
        t.forward();
        const bool exact = family == InputFamily::integers && (c.D & (c.D - 1)) == 0;
        const double bound = dtype == DType::bf16 ? bf16_tolerance(2, 16) : tolerance(2, 16);
        expect_cuda_agrees(rms_norm, t.forward_args(), exact ? 0 : bound);
        if (c.D == 1 && !exact) continue;  // its gradient cancels to rounding noise
        expect_cuda_agrees(rms_norm_backward, t.backward_args(), exact ? 0 : bound);
      }
    }
  }
}

TEST(RmsNorm, CudaBitsDependOnTheRowAlone) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const int64_t D : {72, 2048, 131}) {
    RmsNormTensors t({37, D, 64, Residual::present}, InputFamily::normals, DType::bf16);
    t.forward();
    expect_cuda_rows_independent(rms_norm, t.forward_args(), 37);
    expect_cuda_rows_independent(rms_norm_backward, t.backward_args(), 37);
  }
}

}  // namespace
}  // namespace cambium::test
