// Parity of the gradient norm: blocks, shards, clipping, non-finite gradients.
#include "tests/ops/cuda_test.h"
#include "tests/ops/grad_norm_cases.h"

namespace cambium::test {
namespace {

constexpr double kInfiniteNorm = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

TEST(GradNorm, SquareSumAgreesWithOracle) {
  for (const int64_t N : kSquareSumCases) {
    for (const InputFamily family : {InputFamily::integers, InputFamily::normals}) {
      TestRandom random(N);
      TestTensor grad = make_tensor(Shape(N), random, family);
      TestTensor partial_B(Shape(norm_block_count(N)));
      run_op(square_sum, {grad.in<float>(), partial_B.out<float>()});
      const std::vector<double> expected = square_sum_oracle(grad);
      if (family == InputFamily::integers) {
        EXPECT_TRUE(bits_equal(partial_B, expected)) << N;
      } else {
        // Positive terms: 128 additions a lane bound the error by 128 eps, typically its root.
        EXPECT_TRUE(within(partial_B, expected, tolerance(1, 128))) << N;
      }
    }
  }
}

TEST(GradNorm, ShardsAndThreadsGiveTheSamePartials) {
  const int64_t N = 37 * kNormBlockElements + 5;
  TestRandom random(3);
  TestTensor grad = make_tensor(Shape(N), random, InputFamily::normals);
  TestTensor whole(Shape(norm_block_count(N)));
  run_op(square_sum, {grad.in<float>(), whole.out<float>()});
  TestTensor parts(Shape(norm_block_count(N)));
  for (const auto& [first, last] : {std::pair<int64_t, int64_t>{0, 10}, {10, 11}, {11, 38}}) {
    const int64_t begin = first * kNormBlockElements;
    const int64_t count = std::min(N, last * kNormBlockElements) - begin;
    run_op(square_sum, {In<float>(grad.in<float>().pointer() + begin, Shape(count)),
                        Out<float>(parts.out<float>().pointer() + first, Shape(last - first))});
  }
  EXPECT_TRUE(bits_equal(parts, whole));
  expect_thread_independent([&](int threads) {
    TestTensor partial_B(Shape(norm_block_count(N)));
    run_op(square_sum, {grad.in<float>(), partial_B.out<float>()}, threads);
    return partial_B.bits();
  });
}

TEST(GradNorm, ClipScaleAgreesWithOracle) {
  for (const int64_t tensors : {1, 2, 3, 7, 20}) {
    TestRandom random(tensors);
    std::vector<double> first_block{0};
    for (int64_t n = 0; n < tensors; ++n) {
      first_block.push_back(first_block.back() + static_cast<double>(random.integer(1, 9)));
    }
    TestTensor partial_B(Shape(static_cast<int64_t>(first_block.back())));
    for (int64_t b = 0; b < partial_B.elements(); ++b) partial_B.set(b, random.uniform());
    for (const double clip : {0.0, 0.001, 1e6}) {
      const ClipExpected expected = clip_oracle(partial_B, 1.0 / 300, clip);
      const TestTensor result = run_clip(partial_B, first_block, 1.0 / 300, clip);
      EXPECT_NEAR(result.at(kClipNorm), expected.norm, 1e-7 * expected.norm);
      EXPECT_NEAR(result.at(kClipScale), expected.scale, 1e-7 * expected.scale);
      EXPECT_EQ(result.at(kClipNonFinite), 0);
      EXPECT_EQ(result.at(kClipFirstTensor), -1);
    }
  }
}

TEST(GradNorm, NonFiniteGradientNamesItsTensorAndStopsTheUpdate) {
  for (const double bad : {kNan, kInfiniteNorm, -kInfiniteNorm}) {
    TestRandom random(5);
    TestTensor grad = make_tensor(Shape(5 * kNormBlockElements), random, InputFamily::normals);
    grad.set(3 * kNormBlockElements + 77, bad);
    TestTensor partial_B(Shape(5));
    run_op(square_sum, {grad.in<float>(), partial_B.out<float>()});
    const TestTensor result = run_clip(partial_B, {0, 1, 3, 4, 5}, 1.0, 1.0);
    EXPECT_EQ(result.at(kClipNonFinite), 1);
    EXPECT_EQ(result.at(kClipFirstTensor), 2);
    EXPECT_TRUE(std::isnan(result.at(kClipScale)));
  }
}

TEST(GradNorm, ZeroGradientIsNotClipped) {
  TestTensor partial_B(Shape(2));
  partial_B.fill(0);
  const TestTensor result = run_clip(partial_B, {0, 2}, 0.5, 1.0);
  EXPECT_EQ(result.at(kClipNorm), 0);
  EXPECT_EQ(result.at(kClipScale), 0.5);
}

TEST(GradNorm, MustFailAnElementCountedTwiceIsDetected) {
  TestRandom random(6);
  TestTensor grad = make_tensor(Shape(100), random, InputFamily::normals), partial_B(Shape(1));
  run_op(square_sum, {grad.in<float>(), partial_B.out<float>()});
  std::vector<double> expected = square_sum_oracle(grad);
  ASSERT_TRUE(within(partial_B, expected, tolerance(1, 128)));
  expected[0] += grad.at(3) * grad.at(3);
  EXPECT_FALSE(within(partial_B, expected, tolerance(1, 128)));
}

TEST(GradNorm, CudaSquareSumGivesTheReferencesBits) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const int64_t N : kSquareSumCases) {
    TestRandom random(N);
    TestTensor grad = make_tensor(Shape(N), random, InputFamily::normals);
    TestTensor partial_B(Shape(norm_block_count(N)));
    expect_cuda_agrees(square_sum, {grad.in<float>(), partial_B.out<float>()});
  }
}

TEST(GradNorm, CudaClipScaleGivesTheReferencesBits) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const int64_t tensors : {1, 2, 7, 1500}) {
    TestRandom random(tensors);
    TestTensor offsets(Shape(tensors + 1), DType::i32), result(Shape(4));
    int64_t blocks = 0;
    for (int64_t n = 0; n < tensors; ++n) {
      offsets.set(n, static_cast<double>(blocks));
      blocks += n == 1 ? 5003 : random.integer(0, 9);
    }
    offsets.set(tensors, static_cast<double>(blocks = std::max<int64_t>(blocks, 1)));
    TestTensor partial_B{Shape(blocks)};
    for (int64_t b = 0; b < blocks; ++b) partial_B.set(b, random.uniform());
    for (const double bad : {0.5, kInfiniteNorm, kNan}) {
      partial_B.set(blocks - 1, bad);
      for (const double clip : {0.0, 0.001, 1e6}) {
        const ClipScaleArgs args{.partial_B = partial_B.in<float>(),
                                 .tensor_first_block_n1 = offsets.in<int32_t>(),
                                 .inverse_tokens = 1.0 / 300,
                                 .clip = clip,
                                 .result_4 = result.out<float>()};
        // A NaN's sign and payload are the processor's affair.
        expect_cuda_agrees(clip_scale, args, std::isfinite(bad) ? 0 : 1e-30);
      }
    }
  }
}

}  // namespace
}  // namespace cambium::test
