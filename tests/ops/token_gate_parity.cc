// token_gate against its oracle: bits where the gate is exactly one half, tolerances on normals,
// gradients by finite differences, and independence of threads and of other rows.
#include "tests/ops/cuda_test.h"
#include "tests/ops/token_gate_cases.h"

namespace cambium::test {
namespace {

// All tensors of one case. Exact family: w = 0, so that every gate is 1/2.
struct TokenGateTensors {
  TokenGateTensors(const TokenGateCase& shape, InputFamily family, DType dtype = DType::f32)
      : c(shape),
        x(Shape(c.T, c.D), dtype),
        w(Shape(c.D), dtype),
        h(Shape(c.T, c.F), dtype),
        gate(Shape(c.T)),
        y(Shape(c.T, c.F), dtype),
        d_y(Shape(c.T, c.F), dtype),
        d_residual(Shape(c.T, c.D), dtype),
        d_logit(Shape(c.T)),
        d_h(Shape(c.T, c.F), dtype),
        y_again(Shape(c.T, c.F), dtype),
        d_x(Shape(c.T, c.D), dtype),
        d_w_leaf(Shape((c.T + c.block_tokens - 1) / c.block_tokens, c.D)) {
    TestRandom random(static_cast<uint64_t>(c.T * 1000 + c.D));
    for (TestTensor* tensor : {&x, &w, &h, &d_y, &d_residual}) {
      tensor->fill_family(random, family);
    }
    if (family == InputFamily::integers) {
      w.fill(0.0);
    } else {
      w.fill_normal(random, 1.0 / std::sqrt(static_cast<double>(c.D)));
    }
  }

  TokenGateArgs forward_args() {
    return {.x_TD = x.in<Real>(),
            .w_D = w.in<Real>(),
            .h_TF = h.in<Real>(),
            .gate_T = gate.out<float>(),
            .y_TF = y.out<Real>()};
  }
  TokenGateBackwardArgs backward_args() {
    return {.x_TD = x.in<Real>(),
            .w_D = w.in<Real>(),
            .h_TF = h.in<Real>(),
            .gate_T = gate.in<float>(),
            .d_y_TF = d_y.in<Real>(),
            .d_residual_TD = has_residual ? d_residual.in<Real>() : In<Real>(),
            .d_logit_T = d_logit.out<float>(),
            .d_h_TF = d_h.out<Real>(),
            .y_TF = y_again.out<Real>(),
            .d_x_TD = d_x.out<Real>(),
            .d_w_leaf_BD = d_w_leaf.out<float>(),
            .block_tokens = c.block_tokens};
  }
  void forward(int threads = 2) { run_op(token_gate, forward_args(), threads); }
  void backward(int threads = 2) { run_op(token_gate_backward, backward_args(), threads); }
  TokenGateExpected expected() const {
    return token_gate_oracle({x.values(), w.values(), h.values(), d_y.values(),
                              has_residual ? d_residual.values() : std::vector<double>()},
                             c);
  }

  TokenGateCase c;
  bool has_residual = true;
  TestTensor x, w, h, gate, y, d_y, d_residual, d_logit, d_h, y_again, d_x, d_w_leaf;
};

TEST(TokenGate, ExactInputsGiveTheOraclesBits) {
  for (const TokenGateCase& c : kTokenGateCases) {
    TokenGateTensors t(c, InputFamily::integers);
    t.forward();
    t.backward();
    const TokenGateExpected expected = t.expected();
    EXPECT_TRUE(bits_equal(t.gate, expected.gate));
    EXPECT_TRUE(bits_equal(t.y, expected.y));
    EXPECT_TRUE(bits_equal(t.y_again, expected.y));
    EXPECT_TRUE(bits_equal(t.d_logit, expected.d_logit));
    EXPECT_TRUE(bits_equal(t.d_h, expected.d_h));
    EXPECT_TRUE(bits_equal(t.d_x, expected.d_x));
    EXPECT_TRUE(bits_equal(t.d_w_leaf, expected.d_w_leaf));
  }
}

TEST(TokenGate, NormalsStayWithinRounding) {
  for (const TokenGateCase& c : kTokenGateCases) {
    for (const bool has_residual : {true, false}) {
      TokenGateTensors t(c, InputFamily::normals);
      t.has_residual = has_residual;
      t.forward();
      t.backward();
      const TokenGateExpected expected = t.expected();
      EXPECT_TRUE(within(t.gate, expected.gate, tolerance(2, c.D)));
      EXPECT_TRUE(within(t.y, expected.y, tolerance(2, c.D)));
      EXPECT_TRUE(bits_equal(t.y_again, t.y));
      EXPECT_TRUE(within(t.d_logit, expected.d_logit, tolerance(4, c.F + c.D)));
      EXPECT_TRUE(within(t.d_h, expected.d_h, tolerance(2, c.D)));
      EXPECT_TRUE(within(t.d_x, expected.d_x, tolerance(4, c.F + c.D)));
      EXPECT_TRUE(within(t.d_w_leaf, expected.d_w_leaf, tolerance(4, c.F + c.D)));
    }
  }
}

TEST(TokenGate, GradientsAgreeWithFiniteDifferences) {
  const TokenGateCase c{12, 20, 9, 12};
  TokenGateTensors t(c, InputFamily::normals);
  t.has_residual = false;
  t.forward();
  t.backward();
  const TokenGateValues at{t.x.values(), t.w.values(), t.h.values(), t.d_y.values(), {}};
  const auto loss = [&](const TokenGateValues& v) {
    const std::vector<double> y = token_gate_oracle(v, c).y;
    double total = 0.0;
    for (size_t i = 0; i < y.size(); ++i) total += at.d_y[i] * y[i];
    return total;
  };
  TestRandom random(5);
  const auto error = [&](std::vector<double> TokenGateValues::*input, const TestTensor& gradient) {
    return finite_difference_error(
        [&](const auto& values) {
          TokenGateValues moved = at;
          moved.*input = values;
          return loss(moved);
        },
        at.*input, gradient.values(), random);
  };
  EXPECT_LT(error(&TokenGateValues::x, t.d_x), 1e-4);
  EXPECT_LT(error(&TokenGateValues::w, t.d_w_leaf), 1e-4);
  EXPECT_LT(error(&TokenGateValues::h, t.d_h), 1e-4);
}

TEST(TokenGate, ThreadsDoNotChangeBits) {
  expect_thread_independent([](int threads) {
    TokenGateTensors t({512, 64, 96, 32}, InputFamily::normals);
    t.forward(threads);
    t.backward(threads);
    std::vector<std::byte> bits = t.y.bits();
    for (const TestTensor* tensor : {&t.gate, &t.d_logit, &t.d_h, &t.d_x, &t.d_w_leaf}) {
      const std::vector<std::byte> more = tensor->bits();
      bits.insert(bits.end(), more.begin(), more.end());
    }
    return bits;
  });
}

TEST(TokenGate, RowsDoNotDependOnTheBatch) {
  TokenGateTensors all({37, 72, 40, 37}, InputFamily::normals);
  expect_rows_independent(all.c.T, [&](const std::vector<int64_t>& rows) {
    const int64_t T = static_cast<int64_t>(rows.size());
    TokenGateTensors part({T, all.c.D, all.c.F, T}, InputFamily::normals);
    part.w.assign(all.w.values());
    const auto take = [&](const TestTensor& from, TestTensor& to, int64_t width) {
      for (int64_t i = 0; i < T * width; ++i)
        to.set(i, from.at(rows[i / width] * width + i % width));
    };
    take(all.x, part.x, all.c.D);
    take(all.d_residual, part.d_residual, all.c.D);
    take(all.h, part.h, all.c.F);
    take(all.d_y, part.d_y, all.c.F);
    part.forward();
    part.backward();
    std::vector<std::vector<std::byte>> bits;
    for (const TestTensor* tensor : {&part.y, &part.gate, &part.d_h, &part.d_x}) {
      append_row_bits(*tensor, bits);
    }
    return bits;
  });
}

TEST(TokenGate, OutputsMayReplaceInputs) {
  TokenGateTensors apart({64, 48, 56, 32}, InputFamily::normals);
  TokenGateTensors in_place = apart;
  apart.forward();
  apart.backward();
  in_place.forward();
  TokenGateBackwardArgs args = in_place.backward_args();
  args.d_h_TF = in_place.d_y.out<Real>();
  args.y_TF = in_place.h.out<Real>();
  args.d_x_TD = in_place.d_residual.out<Real>();
  run_op(token_gate_backward, args);
  EXPECT_TRUE(bits_equal(in_place.d_y, apart.d_h));
  EXPECT_TRUE(bits_equal(in_place.h, apart.y));
  EXPECT_TRUE(bits_equal(in_place.d_residual, apart.d_x));
}

TEST(TokenGate, MustFailWhenTheSigmoidsSlopeIsForgotten) {
  const TokenGateCase c{16, 64, 24, 16};
  TokenGateTensors t(c, InputFamily::normals);
  t.forward();
  t.backward();
  const TokenGateExpected right = t.expected();
  auto wrong = right.d_logit;
  for (int64_t i = 0; i < c.T; ++i) wrong[i] /= 1.0 - right.gate[i];
  EXPECT_TRUE(within(t.d_logit, right.d_logit, tolerance(4, c.F + c.D)));
  EXPECT_FALSE(within(t.d_logit, wrong, tolerance(4, c.F + c.D)));
  TokenGateArgs args = t.forward_args();
  args.w_D = t.x.in<Real>();
  EXPECT_THROW(run_op(token_gate, args), Error);
}

TEST(TokenGate, CudaAgreesWithTheReference) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  std::vector<TokenGateCase> cases = kTokenGateCases;
  cases.push_back({37, 2048, 768, 16});
  for (const TokenGateCase& c : cases) {
    for (const InputFamily family : {InputFamily::integers, InputFamily::normals}) {
      for (const DType dtype : {DType::f32, DType::bf16}) {
        SCOPED_TRACE(testing::Message() << c.T << "x" << c.D << " " << dtype_name(dtype));
        TokenGateTensors t(c, family, dtype);
        t.forward();
        const bool exact = family == InputFamily::integers;
        // The GPU's sigmoid is two instructions of the special-function unit.
        const double bound =
            dtype == DType::bf16 ? bf16_tolerance(4, 16) : tolerance(16, c.F + c.D);
        expect_cuda_agrees(token_gate, t.forward_args(), exact ? 0 : bound);
        expect_cuda_agrees(token_gate_backward, t.backward_args(), exact ? 0 : bound);
      }
    }
  }
}

TEST(TokenGate, CudaBitsDependOnTheRowAlone) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const int64_t D : {72, 2048, 131}) {
    TokenGateTensors t({37, D, 96, 64}, InputFamily::normals, DType::bf16);
    t.forward();
    expect_cuda_rows_independent(token_gate, t.forward_args(), 37);
    expect_cuda_rows_independent(token_gate_backward, t.backward_args(), 37);
  }
}

}  // namespace
}  // namespace cambium::test
