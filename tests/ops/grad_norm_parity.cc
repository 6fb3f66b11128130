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
      SquareSumTensors t(N, N, family);
      run_op(square_sum, t.args());
      const std::vector<double> expected = square_sum_oracle(t.grad);
      if (family == InputFamily::integers) {
        EXPECT_TRUE(bits_equal(t.partial_B, expected)) << N;
      } else {
        // Positive terms: 128 additions a lane bound the error by 128 eps, typically its root.
        EXPECT_TRUE(within(t.partial_B, expected, tolerance(1, 128))) << N;
      }
    }
  }
}

// A buffer of tensors with padding between them (poisoned, so reading it shows) whose canonical
// blocks lie elsewhere: the partials of each tensor alone, and nothing else is written.
SquareSumTensors many_tensors() {
  const std::vector<int64_t> elements = {1, 4096, 5000, 31, 3 * 4096 + 17};
  SquareSumTensors all(12 * kNormBlockElements, 3);
  all.grad.poison();
  all.blocks.fill(0);
  all.partial_B = TestTensor(Shape(40));
  TestRandom random(5);
  int64_t block = 0;
  for (size_t n = 0; n < elements.size(); ++n) {
    const TestTensor table = whole_tensor_blocks(elements[n], 8 * (4 - static_cast<int64_t>(n)));
    for (int64_t i = 0; i < table.elements(); ++i) {
      all.blocks.set(block * kBlockColumns + i, table.at(i));
    }
    for (int64_t i = 0; i < elements[n]; ++i) {
      all.grad.set(block * kNormBlockElements + i, random.normal());
    }
    block += norm_block_count(elements[n]) + (n == 2 ? 1 : 0);  // a block of padding after one
  }
  return all;
}

TEST(GradNorm, TensorsOfOneBufferGiveThePartialsOfEachAlone) {
  SquareSumTensors all = many_tensors();
  run_op(square_sum, all.args());
  int64_t written = 0;
  for (int64_t b = 0; b < all.blocks.shape()[0]; ++b) {
    const auto count = static_cast<int64_t>(all.blocks.at(b * kBlockColumns + kBlockElements));
    if (count == 0) continue;
    SquareSumTensors alone(count, 1);
    for (int64_t i = 0; i < count; ++i) alone.grad.set(i, all.grad.at(b * 4096 + i));
    run_op(square_sum, alone.args());
    const auto at = static_cast<int64_t>(all.blocks.at(b * kBlockColumns + kBlockCanonical));
    EXPECT_EQ(all.partial_B.at(at), alone.partial_B.at(0)) << b;
    ++written;
  }
  int64_t poisoned = 0;
  for (int64_t i = 0; i < 40; ++i) poisoned += std::isnan(all.partial_B.at(i)) ? 1 : 0;
  EXPECT_EQ(poisoned, 40 - written);
}

TEST(GradNorm, ShardsAndThreadsGiveTheSamePartials) {
  const int64_t N = 37 * kNormBlockElements + 5;
  SquareSumTensors whole(N, 3), parts(N, 3);
  run_op(square_sum, whole.args());
  for (const auto& [first, last] : {std::pair<int64_t, int64_t>{0, 10}, {10, 11}, {11, 38}}) {
    const int64_t begin = first * kNormBlockElements;
    const int64_t count = std::min(N, last * kNormBlockElements) - begin;
    SquareSumArgs part = parts.args();
    part.grad_N = In<float>(part.grad_N.pointer() + begin, Shape(count));
    part.table.elements = count;
    part.table.block_BC = In<int32_t>(part.table.block_BC.pointer() + first * kBlockColumns,
                                      Shape(last - first, int64_t{kBlockColumns}));
    run_op(square_sum, part);
  }
  EXPECT_TRUE(bits_equal(parts.partial_B, whole.partial_B));
  expect_thread_independent([&](int threads) {
    SquareSumTensors t(N, 3);
    run_op(square_sum, t.args(), threads);
    return t.partial_B.bits();
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
    SquareSumTensors t(5 * kNormBlockElements, 5);
    t.grad.set(3 * kNormBlockElements + 77, bad);
    run_op(square_sum, t.args());
    const TestTensor result = run_clip(t.partial_B, {0, 1, 3, 4, 5}, 1.0, 1.0);
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
  SquareSumTensors t(100, 6);
  run_op(square_sum, t.args());
  std::vector<double> expected = square_sum_oracle(t.grad);
  ASSERT_TRUE(within(t.partial_B, expected, tolerance(1, 128)));
  expected[0] += t.grad.at(3) * t.grad.at(3);
  EXPECT_FALSE(within(t.partial_B, expected, tolerance(1, 128)));
}

TEST(GradNorm, CudaSquareSumGivesTheReferencesBits) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const int64_t N : kSquareSumCases) {
    SquareSumTensors t(N, N);
    expect_cuda_agrees(square_sum, t.args());
  }
  SquareSumTensors all = many_tensors();
  expect_cuda_agrees(square_sum, all.args());
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
