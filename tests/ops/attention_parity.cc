// attention against its oracle: exact cases, tolerances over blocks and documents, finite
// differences, strided views, and independence of threads and of other sequences.
#include "tests/ops/attention_tensors.h"

namespace cambium::test {
namespace {

TEST(Attention, ZeroQueriesAverageTheValuesExactly) {
  for (AttentionCase c : kAttentionCases) {
    AttentionTensors t(c, InputFamily::integers);
    t.q.fill(0.0);
    t.forward();
    EXPECT_TRUE(bits_equal(t.o, attention_oracle(c, t.values(), t.scale).o)) << c.S;
  }
}

TEST(Attention, DocumentsOfOneTokenCopyTheirValue) {
  for (AttentionCase c : kAttentionCases) {
    c.documents = Documents::lengths_of_one;
    AttentionTensors t(c, InputFamily::integers);
    t.forward();
    t.backward();
    const auto expected = attention_oracle(c, t.values(), t.scale);
    const auto gradients = attention_backward_oracle(c, t.values(), t.d_o.values(), t.scale);
    EXPECT_TRUE(bits_equal(t.o, expected.o)) << c.S;
    EXPECT_TRUE(bits_equal(t.lse, expected.lse)) << c.S;
    EXPECT_TRUE(bits_equal(t.d_q, gradients.d_q)) << c.S;
    EXPECT_TRUE(bits_equal(t.d_k, gradients.d_k)) << c.S;
    EXPECT_TRUE(bits_equal(t.d_v, gradients.d_v)) << c.S;
  }
}

TEST(Attention, NormalsStayWithinRounding) {
  for (const AttentionCase& c : kAttentionCases) {
    if (c.S == 1) continue;  // its gradients of q and k are zero: the exact cases test them
    AttentionTensors t(c, InputFamily::normals);
    t.forward();
    t.backward();
    const auto expected = attention_oracle(c, t.values(), t.scale);
    const auto gradients = attention_backward_oracle(c, t.values(), t.d_o.values(), t.scale);
    // A score errs by eps sqrt(Q) of its size, which exp passes on; the sums over keys average.
    EXPECT_TRUE(within(t.o, expected.o, tolerance(2, c.Q + 16))) << c.S;
    EXPECT_TRUE(within(t.lse, expected.lse, tolerance(2, c.Q + 16))) << c.S;
    EXPECT_TRUE(within(t.d_q, gradients.d_q, tolerance(4, c.Q + 16))) << c.S;
    EXPECT_TRUE(within(t.d_k, gradients.d_k, tolerance(4, c.Q + 16))) << c.S;
    EXPECT_TRUE(within(t.d_v, gradients.d_v, tolerance(4, c.Q + 16))) << c.S;
  }
}

TEST(Attention, LargeScoresDoNotOverflow) {
  AttentionTensors t({1, 40, 2, 1, 16, 16, Documents::mixed}, InputFamily::normals);
  t.scale = 200.0f;
  t.forward();
  EXPECT_TRUE(within(t.o, attention_oracle(t.c, t.values(), t.scale).o, 2e-3));
}

TEST(Attention, GradientsAgreeWithFiniteDifferences) {
  AttentionTensors t({1, 21, 4, 2, 8, 8, Documents::mixed}, InputFamily::normals);
  t.forward();
  t.backward();
  const AttentionValues at = t.values();
  const std::vector<double> weight = t.d_o.values();
  auto loss = [&](const AttentionValues& in) {
    const auto o = attention_oracle(t.c, in, t.scale).o;
    double total = 0.0;
    for (size_t i = 0; i < o.size(); ++i) total += weight[i] * o[i];
    return total;
  };
  auto with = [&](std::vector<double> AttentionValues::*field) {
    return [&, field](const std::vector<double>& value) {
      AttentionValues moved = at;
      moved.*field = value;
      return loss(moved);
    };
  };
  TestRandom random(5);
  EXPECT_LT(finite_difference_error(with(&AttentionValues::q), at.q, t.d_q.values(), random), 1e-4);
  EXPECT_LT(finite_difference_error(with(&AttentionValues::k), at.k, t.d_k.values(), random), 1e-4);
  EXPECT_LT(finite_difference_error(with(&AttentionValues::v), at.v, t.d_v.values(), random), 1e-4);
}

TEST(Attention, ThreadsDoNotChangeBits) {
  expect_thread_independent([](int threads) {
    AttentionTensors t({4, 64, 4, 2, 32, 16, Documents::mixed}, InputFamily::normals);
    t.forward(threads);
    t.backward(threads);
    return all_bits(t);
  });
}

// all_bits of what `all` holds for a sequence; `shape` is a batch of that one.
std::vector<std::byte> bits_of_sequence(const AttentionTensors& all, int64_t sequence,
                                        const AttentionTensors& shape) {
  AttentionTensors expected = shape;
  const int64_t row = sequence * all.c.S;
  copy_rows(all.o, row, expected.o);
  copy_rows(all.lse, row, expected.lse);
  copy_rows(all.d_q, row, expected.d_q);
  copy_rows(all.d_k, row, expected.d_k);
  copy_rows(all.d_v, row, expected.d_v);
  return all_bits(expected);
}

TEST(Attention, SequencesDoNotDependOnTheBatch) {
  AttentionTensors all({5, 40, 4, 2, 24, 16, Documents::mixed}, InputFamily::normals);
  all.forward();
  all.backward();
  for (int64_t sequence = 0; sequence < 5; ++sequence) {
    AttentionTensors alone = one_sequence(all, sequence);
    alone.forward();
    alone.backward();
    EXPECT_TRUE(bits_equal(all_bits(alone), bits_of_sequence(all, sequence, alone))) << sequence;
  }
}

AttentionTensors prefix_of(const AttentionTensors& whole, int64_t length) {
  AttentionCase c = whole.c;
  c.S = length;
  AttentionTensors prefix(c, InputFamily::normals, whole.q.dtype());
  copy_rows(whole.q, 0, prefix.q);
  copy_rows(whole.k, 0, prefix.k);
  copy_rows(whole.v, 0, prefix.v);
  return prefix;
}

TEST(Attention, APrefixHasTheBitsOfTheWholeSequence) {
  // Generation runs prefixes: a row must not see how many tokens follow it.
  AttentionTensors whole({1, 50, 4, 2, 32, 16, Documents::absent}, InputFamily::normals);
  whole.forward();
  for (const int64_t length : {1, 5, 16, 17, 33, 49}) {
    AttentionTensors prefix = prefix_of(whole, length);
    prefix.forward();
    TestTensor expected = prefix.o;
    copy_rows(whole.o, 0, expected);
    EXPECT_TRUE(bits_equal(prefix.o, expected)) << length;
  }
}

TEST(Attention, Bf16Storage) {
  AttentionTensors t({2, 48, 4, 2, 32, 16, Documents::mixed}, InputFamily::normals, DType::bf16);
  t.forward();
  t.backward();
  EXPECT_TRUE(within(t.o, attention_oracle(t.c, t.values(), t.scale).o, bf16_tolerance(2, 48)));
  const auto gradients = attention_backward_oracle(t.c, t.values(), t.d_o.values(), t.scale);
  // delta comes from the rounded output: its error is that of one bf16 rounding of o.
  EXPECT_TRUE(within(t.d_q, gradients.d_q, 2 * bf16_tolerance(2, 48)));
  EXPECT_TRUE(within(t.d_k, gradients.d_k, 2 * bf16_tolerance(2, 48)));
  EXPECT_TRUE(within(t.d_v, gradients.d_v, bf16_tolerance(2, 48)));
}

TEST(Attention, MustFailWithoutTheMaskAndForBadDocuments) {
  AttentionTensors t({1, 32, 2, 1, 16, 16, Documents::mixed}, InputFamily::normals);
  t.forward();
  AttentionValues unmasked = t.values();
  unmasked.document_start.clear();
  EXPECT_FALSE(within(t.o, attention_oracle(t.c, unmasked, t.scale).o, tolerance(2, 32)));
  t.document_start.set(3, 4);  // a document cannot begin after its token
  EXPECT_THROW(t.forward(), Error);
}

// ---- the GPU ---------------------------------------------------------------------------------

std::vector<AttentionCase> cuda_cases() {
  std::vector<AttentionCase> cases = kAttentionCases;
  cases.insert(cases.end(), kAttentionTileCases.begin(), kAttentionTileCases.end());
  return cases;
}

TEST(Attention, CudaIsExactForZeroQueriesAndDocumentsOfOneToken) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (AttentionCase c : cuda_cases()) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      SCOPED_TRACE(testing::Message()
                   << c.S << " positions, head " << c.Q << " " << dtype_name(dtype));
      AttentionTensors average(c, InputFamily::integers, dtype);
      average.q.fill(0.0);
      run_cuda_op(attention, average.forward_args());
      EXPECT_TRUE(bits_equal(average.o, attention_oracle(c, average.values(), average.scale).o));
      AttentionCase alone = c;
      alone.documents = Documents::lengths_of_one;
      AttentionTensors t(alone, InputFamily::integers, dtype);
      t.cuda_both();
      const auto expected = attention_oracle(alone, t.values(), t.scale);
      const auto gradients = attention_backward_oracle(alone, t.values(), t.d_o.values(), t.scale);
      EXPECT_TRUE(bits_equal(t.o, expected.o));
      // The tensor-core kernels' scores carry log2(e), which is not exact.
      EXPECT_TRUE(within(t.lse, expected.lse, tolerance(2, 1)));
      EXPECT_TRUE(bits_equal(t.d_q, gradients.d_q));
      EXPECT_TRUE(bits_equal(t.d_k, gradients.d_k));
      EXPECT_TRUE(bits_equal(t.d_v, gradients.d_v));
    }
  }
}

TEST(Attention, CudaFp32StaysWithinRounding) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const AttentionCase& c : cuda_cases()) {
    if (c.S == 1) continue;
    SCOPED_TRACE(testing::Message() << c.S << " positions, head " << c.Q);
    AttentionTensors t(c, InputFamily::normals);
    t.cuda_both();
    const auto expected = attention_oracle(c, t.values(), t.scale);
    const auto gradients = attention_backward_oracle(c, t.values(), t.d_o.values(), t.scale);
    EXPECT_TRUE(within(t.o, expected.o, tolerance(2, c.Q + 16)));
    EXPECT_TRUE(within(t.lse, expected.lse, tolerance(2, c.Q + 16)));
    EXPECT_TRUE(within(t.d_q, gradients.d_q, tolerance(4, c.Q + 16)));
    EXPECT_TRUE(within(t.d_k, gradients.d_k, tolerance(4, c.Q + 16)));
    EXPECT_TRUE(within(t.d_v, gradients.d_v, tolerance(4, c.Q + 16)));
  }
}

// P and dS are operands in bf16: each of their roundings is at most 2^-9 of its value, with random
// signs, so a sum of them errs by less than the one rounding of its result that the bound allows.
TEST(Attention, CudaBf16StaysWithinRounding) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const AttentionCase& c : cuda_cases()) {
    if (c.S == 1) continue;
    SCOPED_TRACE(testing::Message() << c.S << " positions, head " << c.Q);
    AttentionTensors t(c, InputFamily::normals, DType::bf16);
    t.cuda_both();
    const auto expected = attention_oracle(c, t.values(), t.scale);
    const auto gradients = attention_backward_oracle(c, t.values(), t.d_o.values(), t.scale);
    const double bound = bf16_tolerance(2, c.Q + 16);
    EXPECT_TRUE(within(t.o, expected.o, bound));
    EXPECT_TRUE(within(t.lse, expected.lse, tolerance(2, c.Q + 16)));
    // delta comes from the rounded output.
    EXPECT_TRUE(within(t.d_q, gradients.d_q, 2 * bound));
    EXPECT_TRUE(within(t.d_k, gradients.d_k, 2 * bound));
    EXPECT_TRUE(within(t.d_v, gradients.d_v, bound));
  }
}

TEST(Attention, CudaLargeScoresDoNotOverflow) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  AttentionTensors t({1, 200, 2, 1, 128, 16, Documents::mixed}, InputFamily::normals, DType::bf16);
  t.scale = 200.0f;
  t.cuda_both();
  EXPECT_TRUE(within(t.o, attention_oracle(t.c, t.values(), t.scale).o, 4e-3));
  for (const TestTensor* tensor : {&t.d_q, &t.d_k, &t.d_v}) {
    for (const double value : tensor->values()) ASSERT_TRUE(std::isfinite(value));
  }
}

TEST(Attention, CudaRunsGiveTheSameBits) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  const AttentionCase c{2, 700, 8, 2, 128, 32, Documents::long_ones};
  AttentionTensors first(c, InputFamily::normals, DType::bf16);
  first.cuda_both();
  for (int run = 0; run < 5; ++run) {
    AttentionTensors again(c, InputFamily::normals, DType::bf16);
    again.cuda_both();
    EXPECT_TRUE(bits_equal(all_bits(again), all_bits(first)));
  }
}

// D2: a sequence's bits do not depend on the others, nor a row's on the positions after it.
TEST(Attention, CudaSequencesDoNotDependOnTheBatch) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const DType dtype : {DType::bf16, DType::f32}) {
    AttentionTensors all({5, 200, 4, 2, 64, 16, Documents::mixed}, InputFamily::normals, dtype);
    all.cuda_both();
    for (int64_t sequence = 0; sequence < 5; ++sequence) {
      AttentionTensors alone = one_sequence(all, sequence);
      alone.cuda_both();
      EXPECT_TRUE(bits_equal(all_bits(alone), bits_of_sequence(all, sequence, alone)));
    }
  }
}

TEST(Attention, CudaAPrefixHasTheBitsOfTheWholeSequence) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  const AttentionCase c{1, 300, 4, 2, 128, 16, Documents::absent};
  AttentionTensors whole(c, InputFamily::normals, DType::bf16);
  run_cuda_op(attention, whole.forward_args());
  for (const int64_t length : {1, 63, 64, 127, 128, 129, 299}) {
    AttentionTensors prefix = prefix_of(whole, length);
    run_cuda_op(attention, prefix.forward_args());
    TestTensor expected = prefix.o;
    copy_rows(whole.o, 0, expected);
    EXPECT_TRUE(bits_equal(prefix.o, expected)) << length;
  }
}

}  // namespace
}  // namespace cambium::test
