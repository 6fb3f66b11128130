// Parity of AdamW: several steps against fp64, hand-made steps, NaN scale, bf16 copy, D1.
#include "tests/ops/adamw_cases.h"
#include "tests/ops/cuda_test.h"

namespace cambium::test {
namespace {

constexpr double kQuietNan = std::numeric_limits<double>::quiet_NaN();

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

// Pieces cut anywhere give the bits of the whole: shards own pieces.
TEST(Adamw, ElementsAreIndependentAndThreadsDoNotMatter) {
  const int64_t N = 70001;
  AdamwTensors whole(N, 5);
  run_op(adamw, adamw_args(whole, {}, 3));
  for (const int64_t cut : {1, 5, 32768, 69999}) {
    AdamwTensors t(N, 5);
    AdamwArgs args = adamw_args(t, {}, 3);
    for (const int64_t first : {int64_t{0}, cut}) {
      const int64_t count = first == 0 ? cut : N - cut;
      AdamwArgs part = args;
      part.param_N = InOut<float>(args.param_N.pointer() + first, Shape(count));
      part.m_N = InOut<float>(args.m_N.pointer() + first, Shape(count));
      part.v_N = InOut<float>(args.v_N.pointer() + first, Shape(count));
      part.grad_N = In<float>(args.grad_N.pointer() + first, Shape(count));
      run_op(adamw, part);
    }
    EXPECT_TRUE(bits_equal(t.param, whole.param)) << cut;
  }
  expect_thread_independent([&](int threads) {
    AdamwTensors t(N, 5);
    run_op(adamw, adamw_args(t, {}, 3), threads);
    return t.param.bits();
  });
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
      AdamwTensors t(N, N + 1);
      TestTensor copy(Shape(N), dtype);
      TestRandom random(N + 3);
      t.m.fill_normal(random, 0.1);
      for (int64_t i = 0; i < N; ++i) t.v.set(i, random.uniform());
      t.scale.set(0, 0.3);
      AdamwArgs args = adamw_args(t, {}, 7);
      expect_cuda_agrees(adamw, args);
      args.compute_N = copy.out<Real>();
      expect_cuda_agrees(adamw, args);
      t.scale.set(0, kQuietNan);
      expect_cuda_agrees(adamw, args);
    }
  }
}

}  // namespace
}  // namespace cambium::test
