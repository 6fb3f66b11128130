// Parity of AdamW: several steps against fp64, hand-made steps, NaN scale, bf16 copy, D1.
#include "tests/ops/adamw_cases.h"
#include "tests/ops/cuda_test.h"

namespace cambium::test {
namespace {

constexpr double kQuietNan = std::numeric_limits<double>::quiet_NaN();

int64_t norm_blocks(int64_t elements) {
  return (elements + kTableBlockElements - 1) / kTableBlockElements;
}

TEST(Adamw, FollowsTheOracleForSeveralSteps) {
  for (const int64_t N : kAdamwCases) {
    AdamwTensors t(N, N + 1);
    AdamwState state{t.param.values(), t.m.values(), t.v.values()};
    TestRandom random(N + 2);
    for (int64_t step = 1; step <= 5; ++step) {
      t.grad.fill_normal(random);
      t.scale.set(0, 0.25);  // exact, so that the oracle's gradient is the op's
      std::vector<double> grad = t.grad.values();
      for (double& g : grad) g *= 0.25;
      run_op(adamw, adamw_args(t, {}, step));
      adamw_oracle({}, step, grad, state);
    }
    // About six roundings a step, five steps.
    EXPECT_TRUE(within(t.m, state.m, tolerance(6, 5))) << N;
    EXPECT_TRUE(within(t.v, state.v, tolerance(6, 5))) << N;
    EXPECT_TRUE(within(t.param, state.param, tolerance(6, 5))) << N;
  }
}

// The first step without decay moves each parameter by lr towards -sign(g), whatever |g| is.
TEST(Adamw, FirstStepMovesByTheLearningRate) {
  AdamwTensors t(3, 1);
  t.param.fill(0);
  t.grad.assign(std::vector<double>{1000, -0.001, 0});
  run_op(adamw, adamw_args(t, {.lr = 0.5, .epsilon = 0x1p-60, .weight_decay = 0}, 1));
  EXPECT_NEAR(t.param.at(0), -0.5, 1e-6);
  EXPECT_NEAR(t.param.at(1), 0.5, 1e-6);
  EXPECT_EQ(t.param.at(2), 0);
}

// Decay acts on the parameter alone: with a zero gradient the step is p (1 - lr wd), exactly.
TEST(Adamw, DecayIsDecoupled) {
  AdamwTensors t(4, 2);
  t.param.assign(std::vector<double>{1, -2, 0.5, 4});
  t.grad.fill(0);
  run_op(adamw, adamw_args(t, {.lr = 0.5, .weight_decay = 0.5}, 1));
  EXPECT_TRUE(bits_equal(t.param, std::vector<double>{0.75, -1.5, 0.375, 3}));
  EXPECT_TRUE(bits_equal(t.m, std::vector<double>(4, 0.0)));
}

TEST(Adamw, NanScaleChangesNothing) {
  AdamwTensors t(100, 3);
  TestTensor copy(Shape(100), DType::bf16);
  copy.fill(7);
  t.v.fill(0.5);
  const AdamwTensors before = t;
  t.scale.set(0, kQuietNan);
  t.grad.set(5, std::numeric_limits<double>::infinity());
  AdamwArgs args = adamw_args(t, {}, 1);
  args.compute_N = copy.out<Real>();
  run_op(adamw, args);
  EXPECT_TRUE(bits_equal(t.param, before.param));
  EXPECT_TRUE(bits_equal(t.m, before.m));
  EXPECT_TRUE(bits_equal(t.v, before.v));
  EXPECT_TRUE(bits_equal(copy, std::vector<double>(100, 7.0)));
}

TEST(Adamw, ComputeCopyIsTheRoundedParameter) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    AdamwTensors t(40000, 4);
    TestTensor copy(Shape(40000), dtype);
    AdamwArgs args = adamw_args(t, {}, 1);
    args.compute_N = copy.out<Real>();
    run_op(adamw, args);
    EXPECT_TRUE(bits_equal(copy, t.param.values()));
  }
}

// Blocks in any cut give the bits of the whole: shards own blocks. Tensors that do not decay, and
// padding, lie between those that do.
TEST(Adamw, ShardsAndThreadsGiveTheSameBits) {
  const int64_t N = 17 * kTableBlockElements + 5;
  const auto tensors = [&](DType moments) {
    AdamwTensors t(N, 5, moments);
    t.blocks.set(3 * kBlockColumns + kBlockDecays, 0);
    t.blocks.set(4 * kBlockColumns + kBlockElements, 0);
    return t;
  };
  for (const DType moments : {DType::f32, DType::bf16}) {
    AdamwTensors whole = tensors(moments);
    run_op(adamw, adamw_args(whole, {}, 3));
    EXPECT_EQ(whole.param.at(4 * 4096), tensors(moments).param.at(4 * 4096));  // padding
    for (const int64_t cut : {1, 3, 17}) {
      AdamwTensors t = tensors(moments);
      const AdamwArgs args = adamw_args(t, {}, 3);
      const int64_t width = dtype_bytes(moments);
      for (const int64_t first : {int64_t{0}, cut}) {
        const int64_t begin = first * kTableBlockElements;
        const int64_t count = first == 0 ? cut * kTableBlockElements : N - begin;
        const auto moment = [&](const InOut<Real>& view) {
          return InOut<Real>(static_cast<std::byte*>(view.data) + begin * width, moments,
                             Shape(count));
        };
        AdamwArgs part = args;
        part.param_N = InOut<float>(args.param_N.pointer() + begin, Shape(count));
        part.m_N = moment(args.m_N);
        part.v_N = moment(args.v_N);
        part.grad_N = In<float>(args.grad_N.pointer() + begin, Shape(count));
        part.table.elements = count;
        part.table.block_BC = In<int32_t>(args.table.block_BC.pointer() + first * kBlockColumns,
                                          Shape(norm_blocks(count), int64_t{kBlockColumns}));
        run_op(adamw, part);
      }
      EXPECT_TRUE(bits_equal(t.param, whole.param)) << cut;
      EXPECT_TRUE(bits_equal(t.m, whole.m)) << cut;
      EXPECT_TRUE(bits_equal(t.v, whole.v)) << cut;
    }
    expect_thread_independent([&](int threads) {
      AdamwTensors t = tensors(moments);
      run_op(adamw, adamw_args(t, {}, 3), threads);
      return t.param.bits();
    });
  }
}

// bf16 moments are within one unit in the last place of the fp32 ones, on both sides of them, and
// right in the mean: a second moment that loses 1/1000 a step, less than half a unit, goes down.
TEST(Adamw, Bf16MomentsAreRoundedWithTheOddsOfTheDistance) {
  const int64_t N = 40000;
  AdamwTensors exact(N, 8), stored(N, 8, DType::bf16);
  run_op(adamw, adamw_args(exact, {}, 1));
  run_op(adamw, adamw_args(stored, {}, 1));
  EXPECT_TRUE(bits_equal(stored.param, exact.param));  // the step uses unrounded moments
  int64_t up = 0, down = 0;
  double mean = 0;
  for (int64_t i = 0; i < N; ++i) {
    const double gap = (stored.v.at(i) - exact.v.at(i)) / exact.v.at(i);
    ASSERT_LT(std::abs(gap), 0x1p-7) << i;
    (gap > 0 ? up : down) += 1;
    mean += gap / static_cast<double>(N);
  }
  EXPECT_GT(std::min(up, down), N / 3);
  EXPECT_LT(std::abs(mean), 5e-5);  // a gap is about 2e-3: 5 standard deviations
  stored.v.fill(1);
  stored.grad.fill(0);
  AdamwSettings slow;
  slow.beta2 = 0.999;
  for (int64_t step = 2; step <= 101; ++step) run_op(adamw, adamw_args(stored, slow, step));
  double left = 0;
  for (int64_t i = 0; i < N; ++i) left += stored.v.at(i) / static_cast<double>(N);
  EXPECT_NEAR(left, std::pow(0.999, 100), 2e-3);
}

TEST(Adamw, MustFailCoupledDecayIsDetected) {
  AdamwTensors t(1000, 6);
  AdamwState state{t.param.values(), t.m.values(), t.v.values()};
  std::vector<double> coupled = t.grad.values();
  for (size_t i = 0; i < coupled.size(); ++i) coupled[i] += 0.1 * state.param[i];
  AdamwSettings no_decay;
  no_decay.weight_decay = 0;
  adamw_oracle(no_decay, 1, coupled, state);
  run_op(adamw, adamw_args(t, {}, 1));
  EXPECT_FALSE(within(t.param, state.param, tolerance(6, 5)));
}

TEST(Adamw, CudaGivesTheReferencesBits) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const int64_t N : kAdamwCases) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      for (const DType moments : {DType::f32, DType::bf16}) {
        AdamwTensors t(N, N + 1, moments);
        TestTensor copy(Shape(N), dtype);
        TestRandom random(N + 3);
        t.m.fill_normal(random, 0.1);
        for (int64_t i = 0; i < N; ++i) t.v.set(i, random.uniform());
        t.scale.set(0, 0.3);
        if (N > 3 * kTableBlockElements) {
          t.blocks.set(kBlockColumns + kBlockDecays, 0);
          t.blocks.set(2 * kBlockColumns + kBlockElements, 0);
        }
        AdamwArgs args = adamw_args(t, {}, 7);
        expect_cuda_agrees(adamw, args);
        args.compute_N = copy.out<Real>();
        expect_cuda_agrees(adamw, args);
        t.scale.set(0, kQuietNan);
        expect_cuda_agrees(adamw, args);
      }
    }
  }
}

}  // namespace
}  // namespace cambium::test
