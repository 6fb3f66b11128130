// cuDNN's attention and ours, each against the fp64 oracle at one bar, and against each other.
#include "tests/ops/attention_tensors.h"

namespace cambium::test {
namespace {

// What keeps these tests from running; empty where there are a GPU and cuDNN.
std::string obstacle() {
  const std::string missing = cuda::cudnn_missing();
  if (!missing.empty()) return "skipped: no cuDNN: " + missing;
  return has_gpu() ? "" : kNoGpu;
}

void run_with(AttentionKernel kernel, AttentionTensors& t) {
  AttentionArgs forward = t.forward_args();
  AttentionBackwardArgs backward = t.backward_args();
  forward.kernel = backward.kernel = kernel;
  run_cuda_op(attention, forward);
  run_cuda_op(attention_backward, backward);
}

// Bounds of Attention.CudaBf16StaysWithinRounding.
struct AttentionBounds {
  explicit AttentionBounds(const AttentionCase& c)
      : o(bf16_tolerance(2, c.Q + 16)), lse(tolerance(2, c.Q + 16)) {}
  double o, lse;
};

void expect_oracle(const AttentionTensors& t, const AttentionExpected& forward,
                   const AttentionGradients& gradients) {
  const AttentionBounds bounds(t.c);
  EXPECT_TRUE(within(t.o, forward.o, bounds.o));
  EXPECT_TRUE(within(t.lse, forward.lse, bounds.lse));
  EXPECT_TRUE(within(t.d_q, gradients.d_q, 2 * bounds.o));
  EXPECT_TRUE(within(t.d_k, gradients.d_k, 2 * bounds.o));
  EXPECT_TRUE(within(t.d_v, gradients.d_v, bounds.o));
}

std::vector<AttentionCase> cudnn_cases() {
  std::vector<AttentionCase> cases = kAttentionTileCases;
  std::erase_if(cases, [](const AttentionCase& c) { return c.S == 1; });
  for (AttentionCase& c : cases) c.documents = Documents::absent;
  return cases;
}

TEST(AttentionCudnn, CudaBothStayWithinRounding) {
  if (!obstacle().empty()) GTEST_SKIP() << obstacle();
  for (const AttentionCase& c : cudnn_cases()) {
    SCOPED_TRACE(testing::Message() << c.S << " positions, head " << c.Q);
    AttentionTensors own(c, InputFamily::normals, DType::bf16);
    AttentionTensors cudnn(c, InputFamily::normals, DType::bf16);
    run_with(AttentionKernel::own, own);
    run_with(AttentionKernel::cudnn, cudnn);
    const auto expected = attention_oracle(c, own.values(), own.scale);
    const auto gradients = attention_backward_oracle(c, own.values(), own.d_o.values(), own.scale);
    expect_oracle(own, expected, gradients);
    expect_oracle(cudnn, expected, gradients);
    const AttentionBounds bounds(c);
    EXPECT_TRUE(agrees(own.o, cudnn.o, bounds.o));
    EXPECT_TRUE(agrees(own.lse, cudnn.lse, bounds.lse));
    EXPECT_TRUE(agrees(own.d_q, cudnn.d_q, 2 * bounds.o));
    EXPECT_TRUE(agrees(own.d_k, cudnn.d_k, 2 * bounds.o));
    EXPECT_TRUE(agrees(own.d_v, cudnn.d_v, bounds.o));
  }
}

TEST(AttentionCudnn, CudaRunsGiveTheSameBits) {
  if (!obstacle().empty()) GTEST_SKIP() << obstacle();
  const AttentionCase c{2, 1024, 8, 2, 128, 32, Documents::absent};
  AttentionTensors first(c, InputFamily::normals, DType::bf16);
  run_with(AttentionKernel::cudnn, first);
  for (int run = 0; run < 4; ++run) {
    AttentionTensors again(c, InputFamily::normals, DType::bf16);
    run_with(AttentionKernel::cudnn, again);
    EXPECT_TRUE(bits_equal(all_bits(again), all_bits(first)));
  }
}

TEST(AttentionCudnn, CudaAnotherScaleIsNoticed) {
  if (!obstacle().empty()) GTEST_SKIP() << obstacle();
  AttentionTensors t({1, 256, 4, 2, 64, 32, Documents::absent}, InputFamily::normals, DType::bf16);
  const auto expected = attention_oracle(t.c, t.values(), t.scale);
  t.scale *= 1.05f;
  run_with(AttentionKernel::cudnn, t);
  EXPECT_FALSE(within(t.o, expected.o, AttentionBounds(t.c).o));
  EXPECT_FALSE(within(t.lse, expected.lse, AttentionBounds(t.c).lse));
}

}  // namespace
}  // namespace cambium::test
