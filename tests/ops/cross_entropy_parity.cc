// cross_entropy against its oracle: exact cases, tolerances, ignored rows, finite differences.
#include "tests/ops/cross_entropy_cases.h"
#include "tests/ops/cuda_test.h"

namespace cambium::test {
namespace {

struct CrossEntropyTensors {
  CrossEntropyTensors(const CrossEntropyCase& shape, DType dtype = DType::f32)
      : c(shape),
        logits(Shape(c.T, c.V), dtype),
        target(Shape(c.T), DType::i32),
        loss(Shape(c.T)),
        d_logits(Shape(c.T, c.V), dtype) {
    TestRandom random(static_cast<uint64_t>(c.T * 1000 + c.V));
    logits.fill_normal(random, 3.0);
    // Every fifth target is ignored, but not the first.
    for (int64_t t = 0; t < c.T; ++t) {
      target.set(t, t % 5 == 4 ? kIgnoredTarget : random.integer(0, c.V - 1));
    }
  }
  CrossEntropyArgs args() {
    return {.logits_TV = logits.in<Real>(),
            .target_T = target.in<int32_t>(),
            .loss_T = loss.out<float>(),
            .d_logits_TV = d_logits.out<Real>()};
  }
  void run(int threads = 2) { run_op(cross_entropy, args(), threads); }
  CrossEntropyExpected oracle() const {
    return cross_entropy_oracle(logits.values(), target.values(), c.V);
  }
  CrossEntropyCase c;
  TestTensor logits, target, loss, d_logits;
};

TEST(CrossEntropy, ExactInputsGiveTheOraclesBits) {
  // V equal logits with V a power of two: probabilities are exact; a logit 200 above the rest: the
  // rest underflow to zero.
  CrossEntropyTensors equal({16, 64});
  equal.logits.fill(3.0);
  equal.run();
  EXPECT_TRUE(bits_equal(equal.d_logits, equal.oracle().d_logits));
  EXPECT_TRUE(within(equal.loss, equal.oracle().loss, tolerance(1, 1)));
  CrossEntropyTensors peaked({16, 40});
  for (int64_t i = 0; i < peaked.logits.elements(); ++i) {
    peaked.logits.set(i, i % 40 == 7 ? 100.0 : -100.0);
  }
  peaked.run();
  EXPECT_TRUE(bits_equal(peaked.loss, peaked.oracle().loss));
  EXPECT_TRUE(bits_equal(peaked.d_logits, peaked.oracle().d_logits));
}

TEST(CrossEntropy, NormalsStayWithinRounding) {
  for (const CrossEntropyCase& c : kCrossEntropyCases) {
    CrossEntropyTensors t(c);
    t.run();
    // exp adds one ulp, x - max half an ulp of a value of a few units, the sum over V the rest.
    EXPECT_TRUE(within(t.loss, t.oracle().loss, tolerance(2, 16))) << c.T << "x" << c.V;
    EXPECT_TRUE(within(t.d_logits, t.oracle().d_logits, tolerance(2, 16))) << c.T << "x" << c.V;
  }
}

TEST(CrossEntropy, IgnoredRowsAreZero) {
  CrossEntropyTensors t({10, 24});
  t.run();
  for (int64_t row : {4, 9}) {
    EXPECT_EQ(t.loss.at(row), 0.0);
    for (int64_t v = 0; v < 24; ++v) EXPECT_EQ(t.d_logits.at(row * 24 + v), 0.0);
  }
}

TEST(CrossEntropy, GradientAgreesWithFiniteDifferences) {
  CrossEntropyTensors t({6, 50});
  t.run();
  auto loss = [&](const std::vector<double>& logits) {
    double total = 0.0;
    for (double value : cross_entropy_oracle(logits, t.target.values(), 50).loss) total += value;
    return total;
  };
  TestRandom random(5);
  EXPECT_LT(finite_difference_error(loss, t.logits.values(), t.d_logits.values(), random), 1e-4);
}

TEST(CrossEntropy, GradientMayReplaceLogitsOrBeAbsent) {
  CrossEntropyTensors apart({64, 300}), in_place = apart, forward_only = apart;
  apart.run();
  run_op(cross_entropy, CrossEntropyArgs{.logits_TV = in_place.logits.in<Real>(),
                                         .target_T = in_place.target.in<int32_t>(),
                                         .loss_T = in_place.loss.out<float>(),
                                         .d_logits_TV = in_place.logits.out<Real>()});
  EXPECT_TRUE(bits_equal(in_place.logits, apart.d_logits));
  EXPECT_TRUE(bits_equal(in_place.loss, apart.loss));
  run_op(cross_entropy, CrossEntropyArgs{.logits_TV = forward_only.logits.in<Real>(),
                                         .target_T = forward_only.target.in<int32_t>(),
                                         .loss_T = forward_only.loss.out<float>()});
  EXPECT_TRUE(bits_equal(forward_only.loss, apart.loss));
}

TEST(CrossEntropy, ThreadsDoNotChangeBits) {
  expect_thread_independent([](int threads) {
    CrossEntropyTensors t({300, 257});
    t.run(threads);
    std::vector<std::byte> bits = t.loss.bits(), more = t.d_logits.bits();
    bits.insert(bits.end(), more.begin(), more.end());
    return bits;
  });
}

TEST(CrossEntropy, RowsDoNotDependOnTheBatch) {
  CrossEntropyTensors all({37, 77});
  expect_rows_independent(all.c.T, [&](const std::vector<int64_t>& rows) {
    CrossEntropyTensors part({static_cast<int64_t>(rows.size()), 77});
    for (int64_t t = 0; t < part.c.T; ++t) {
      part.target.set(t, all.target.at(rows[t]));
      for (int64_t v = 0; v < 77; ++v) part.logits.set(t * 77 + v, all.logits.at(rows[t] * 77 + v));
    }
    part.run();
    std::vector<std::vector<std::byte>> bits;
    append_row_bits(part.loss, bits);
    append_row_bits(part.d_logits, bits);
    return bits;
  });
}

TEST(CrossEntropy, Bf16Storage) {
  CrossEntropyTensors t({20, 130}, DType::bf16);
  t.run();
  EXPECT_TRUE(within(t.loss, t.oracle().loss, tolerance(2, 16)));
  EXPECT_TRUE(within(t.d_logits, t.oracle().d_logits, bf16_tolerance(2, 16)));
}

TEST(CrossEntropy, MustFailOnAnOffByOneTargetAndABadOne) {
  CrossEntropyTensors t({8, 40});
  t.run();
  std::vector<double> shifted = t.target.values();
  for (double& value : shifted) value = value < 0 ? value : std::fmod(value + 1, 40);
  const auto wrong = cross_entropy_oracle(t.logits.values(), shifted, 40);
  EXPECT_FALSE(within(t.loss, wrong.loss, tolerance(2, 16)));
  EXPECT_FALSE(within(t.d_logits, wrong.d_logits, tolerance(2, 16)));
  t.target.set(3, 40);
  EXPECT_THROW(t.run(), Error);
}

// Beside the common cases: one to eight blocks a row, a real vocabulary, and one that a cluster
// does not hold.
TEST(CrossEntropy, CudaAgreesWithTheReference) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  std::vector<CrossEntropyCase> cases = kCrossEntropyCases;
  for (const int64_t V : {20480, 20488, 50257, 151936, 202048, 430008}) cases.push_back({3, V});
  for (const CrossEntropyCase& c : cases) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      SCOPED_TRACE(testing::Message() << c.T << "x" << c.V << " " << dtype_name(dtype));
      CrossEntropyTensors t(c, dtype);
      const double bound = dtype == DType::bf16 ? bf16_tolerance(2, 16) : tolerance(2, 16);
      expect_cuda_agrees(cross_entropy, t.args(), bound);
      CrossEntropyArgs in_place = t.args(), loss_alone = t.args();
      in_place.d_logits_TV = t.logits.out<Real>();
      loss_alone.d_logits_TV = {};
      expect_cuda_agrees(cross_entropy, in_place, bound);
      expect_cuda_agrees(cross_entropy, loss_alone, tolerance(2, 16));
    }
  }
}

TEST(CrossEntropy, CudaExtremesFollowTheReference) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  CrossEntropyTensors peaked({16, 40});
  for (int64_t i = 0; i < peaked.logits.elements(); ++i) {
    peaked.logits.set(i, i % 40 == 7 ? 100.0 : -100.0);
  }
  expect_cuda_agrees(cross_entropy, peaked.args(), tolerance(1, 1));
}

TEST(CrossEntropy, CudaBitsDependOnTheTokenAlone) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const int64_t V : {77, 40000}) {
    CrossEntropyTensors t({37, V}, DType::bf16);
    expect_cuda_rows_independent(cross_entropy, t.args(), 37);
  }
}

}  // namespace
}  // namespace cambium::test
