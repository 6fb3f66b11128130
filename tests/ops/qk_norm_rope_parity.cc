// qk_norm_rope against its oracle, and rope_table against Hugging Face's order of roundings.
#include "tests/ops/cuda_test.h"
#include "tests/ops/qk_norm_rope_cases.h"

namespace cambium::test {
namespace {

constexpr float kQkNormEpsilon = 1e-6f;
constexpr int64_t kPositions = 40;

// Queries, keys and values lie in one fused tensor; views are strided.
struct QkNormRopeTensors {
  QkNormRopeTensors(const QkNormRopeCase& shape, InputFamily family, DType dtype = DType::f32)
      : c(shape),
        epsilon(family == InputFamily::integers ? 0.0f : kQkNormEpsilon),
        q(Shape(c.T, c.H, c.Q), dtype, fused()),
        k(Shape(c.T, c.G, c.Q), dtype, fused()),
        q_gain(Shape(gain_width(c.H)), dtype),
        k_gain(Shape(gain_width(c.G)), dtype),
        cos(Shape(kPositions, c.Q / 2)),
        sin(Shape(kPositions, c.Q / 2)),
        position(Shape(c.T), DType::i32),
        q_out(Shape(c.T, c.H, c.Q), dtype),
        k_out(Shape(c.T, c.G, c.Q), dtype),
        q_rstd(Shape(c.T, c.kind == QkNormKind::full_width ? 1 : c.H)),
        k_rstd(Shape(c.T, c.kind == QkNormKind::full_width ? 1 : c.G)),
        d_q_out(Shape(c.T, c.H, c.Q), dtype),
        d_k_out(Shape(c.T, c.G, c.Q), dtype),
        d_q(Shape(c.T, c.H, c.Q), dtype, fused()),
        d_k(Shape(c.T, c.G, c.Q), dtype, fused()),
        d_q_gain(Shape(blocks(), gain_width(c.H))),
        d_k_gain(Shape(blocks(), gain_width(c.G))) {
    TestRandom random(static_cast<uint64_t>(c.T * 1000 + c.Q));
    for (TestTensor* tensor : {&q, &k, &q_gain, &k_gain, &d_q_out, &d_k_out}) {
      tensor->fill_family(random, family);
    }
    for (int64_t t = 0; t < c.T; ++t) position.set(t, random.integer(0, kPositions - 1));
    if (family == InputFamily::normals) {
      std::vector<float> cos_SC, sin_SC;
      rope_table({.theta = 10000.0, .head_dim = c.Q, .positions = kPositions}, cos_SC, sin_SC);
      cos.assign(cos_SC);
      sin.assign(sin_SC);
      return;
    }
    // Exact family: |x| = 2, so that rstd = 1/2 with epsilon 0, and quarter turns.
    for (TestTensor* tensor : {&q, &k}) {
      for (int64_t i = 0; i < tensor->elements(); ++i) {
        tensor->set(i, random.integer(0, 1) == 0 ? 2.0 : -2.0);
      }
    }
    for (int64_t i = 0; i < cos.elements(); ++i) {
      const int64_t quarter = random.integer(0, 3);
      cos.set(i, quarter % 2 == 0 ? 1.0 - static_cast<double>(quarter) : 0.0);
      sin.set(i, quarter % 2 == 1 ? 2.0 - static_cast<double>(quarter) : 0.0);
    }
  }
  int64_t fused() const { return (c.H + 2 * c.G) * c.Q; }
  int64_t blocks() const { return (c.T + c.block_tokens - 1) / c.block_tokens; }
  int64_t gain_width(int64_t heads) const {
    return c.kind == QkNormKind::full_width ? heads * c.Q : c.Q;
  }
  bool has_norm() const { return c.kind != QkNormKind::none; }

  QkNormRopeArgs forward_args() {
    QkNormRopeArgs args{.q_THQ = q.in<Real>(),
                        .k_TGQ = k.in<Real>(),
                        .cos_SC = cos.in<float>(),
                        .sin_SC = sin.in<float>(),
                        .position_T = position.in<int32_t>(),
                        .q_out_THQ = q_out.out<Real>(),
                        .k_out_TGQ = k_out.out<Real>(),
                        .epsilon = epsilon,
                        .kind = c.kind};
    if (has_norm()) {
      args.q_gain = q_gain.in<Real>(), args.k_gain = k_gain.in<Real>();
      args.q_rstd = q_rstd.out<float>(), args.k_rstd = k_rstd.out<float>();
    }
    return args;
  }
  QkNormRopeBackwardArgs backward_args() {
    QkNormRopeBackwardArgs args{.d_q_out_THQ = d_q_out.in<Real>(),
                                .d_k_out_TGQ = d_k_out.in<Real>(),
                                .cos_SC = cos.in<float>(),
                                .sin_SC = sin.in<float>(),
                                .position_T = position.in<int32_t>(),
                                .d_q_THQ = d_q.out<Real>(),
                                .d_k_TGQ = d_k.out<Real>(),
                                .block_tokens = c.block_tokens,
                                .kind = c.kind};
    if (has_norm()) {
      args.q_THQ = q.in<Real>(), args.k_TGQ = k.in<Real>();
      args.q_gain = q_gain.in<Real>(), args.k_gain = k_gain.in<Real>();
      args.q_rstd = q_rstd.in<float>(), args.k_rstd = k_rstd.in<float>();
      args.d_q_gain_leaf_BN = d_q_gain.out<float>(), args.d_k_gain_leaf_BN = d_k_gain.out<float>();
    }
    return args;
  }
  void forward(int threads = 2) { run_op(qk_norm_rope, forward_args(), threads); }
  void backward(int threads = 2) { run_op(qk_norm_rope_backward, backward_args(), threads); }
  // Rows of a table at the tokens' positions.
  std::vector<double> at_positions(const TestTensor& table) const {
    std::vector<double> rows;
    for (int64_t i = 0; i < c.T * c.Q / 2; ++i) {
      const int64_t row = static_cast<int64_t>(position.at(i / (c.Q / 2)));
      rows.push_back(table.at(row * (c.Q / 2) + i % (c.Q / 2)));
    }
    return rows;
  }

  QkNormRopeCase c;
  float epsilon;
  TestTensor q, k, q_gain, k_gain, cos, sin, position, q_out, k_out, q_rstd, k_rstd;
  TestTensor d_q_out, d_k_out, d_q, d_k, d_q_gain, d_k_gain;
};

// Compares both tensors of a finished forward and backward pass by `equal(actual, expected)`.
template <class Equal>
void expect_oracle(const QkNormRopeTensors& t, Equal&& equal) {
  const std::vector<double> cos = t.at_positions(t.cos), sin = t.at_positions(t.sin);
  const HeadOracle q{t.c, t.c.H, cos, sin, t.epsilon}, k{t.c, t.c.G, cos, sin, t.epsilon};
  const auto q_gradients = q.backward(t.d_q_out.values(), t.q.values(), t.q_gain.values());
  const auto k_gradients = k.backward(t.d_k_out.values(), t.k.values(), t.k_gain.values());
  EXPECT_TRUE(equal(t.q_out, q.forward(t.q.values(), t.q_gain.values())));
  EXPECT_TRUE(equal(t.k_out, k.forward(t.k.values(), t.k_gain.values())));
  EXPECT_TRUE(equal(t.d_q, q_gradients.d_x));
  EXPECT_TRUE(equal(t.d_k, k_gradients.d_x));
  if (!t.has_norm()) return;
  EXPECT_TRUE(equal(t.q_rstd, q.rstd(t.q.values())));
  EXPECT_TRUE(equal(t.k_rstd, k.rstd(t.k.values())));
  EXPECT_TRUE(equal(t.d_q_gain, q_gradients.d_gain_leaf));
  EXPECT_TRUE(equal(t.d_k_gain, k_gradients.d_gain_leaf));
}

TEST(QkNormRope, ExactInputsGiveTheOraclesBits) {
  for (const QkNormRopeCase& c : kQkNormRopeCases) {
    if ((c.Q & (c.Q - 1)) != 0 || (c.H & (c.H - 1)) != 0) continue;  // the mean is exact
    QkNormRopeTensors t(c, InputFamily::integers);
    t.forward();
    t.backward();
    expect_oracle(t, [](const TestTensor& actual, const std::vector<double>& expected) {
      return bits_equal(actual, expected);
    });
  }
}

TEST(QkNormRope, NormalsStayWithinRounding) {
  for (const QkNormRopeCase& c : kQkNormRopeCases) {
    if (c.Q == 2) continue;  // a mean over two cancels: the exact family tests it
    QkNormRopeTensors t(c, InputFamily::normals);
    t.forward();
    t.backward();
    expect_oracle(t, [](const TestTensor& actual, const std::vector<double>& expected) {
      return within(actual, expected, tolerance(2, 16));
    });
  }
}

TEST(QkNormRope, GradientsAgreeWithFiniteDifferences) {
  for (const QkNormKind kind : {QkNormKind::none, QkNormKind::per_head, QkNormKind::full_width}) {
    QkNormRopeTensors t({9, 4, 2, 12, 9, kind}, InputFamily::normals);
    t.forward();
    t.backward();
    const std::vector<double> cos = t.at_positions(t.cos), sin = t.at_positions(t.sin);
    const HeadOracle oracle{t.c, t.c.H, cos, sin, t.epsilon};
    const std::vector<double> weight = t.d_q_out.values(), x = t.q.values();
    const std::vector<double> gain = t.q_gain.values();
    auto loss = [&](const std::vector<double>& at_x, const std::vector<double>& at_gain) {
      const auto out = oracle.forward(at_x, at_gain);
      double total = 0.0;
      for (size_t i = 0; i < out.size(); ++i) total += weight[i] * out[i];
      return total;
    };
    TestRandom random(5);
    EXPECT_LT(finite_difference_error([&](const auto& v) { return loss(v, gain); }, x,
                                      t.d_q.values(), random),
              1e-4);
    if (kind == QkNormKind::none) continue;
    EXPECT_LT(finite_difference_error([&](const auto& v) { return loss(x, v); }, gain,
                                      t.d_q_gain.values(), random),
              1e-4);
  }
}

TEST(QkNormRope, ThreadsDoNotChangeBits) {
  expect_thread_independent([](int threads) {
    QkNormRopeTensors t({300, 4, 2, 32, 32, QkNormKind::per_head}, InputFamily::normals);
    t.forward(threads);
    t.backward(threads);
    std::vector<std::byte> bits = t.q_out.bits();
    for (const TestTensor* tensor : {&t.k_out, &t.d_q, &t.d_k, &t.d_q_gain, &t.d_k_gain}) {
      const std::vector<std::byte> more = tensor->bits();
      bits.insert(bits.end(), more.begin(), more.end());
    }
    return bits;
  });
}

TEST(QkNormRope, RowsDoNotDependOnTheBatch) {
  QkNormRopeTensors all({37, 4, 2, 20, 37, QkNormKind::per_head}, InputFamily::normals);
  expect_rows_independent(all.c.T, [&](const std::vector<int64_t>& rows) {
    QkNormRopeCase c = all.c;
    c.T = static_cast<int64_t>(rows.size());
    QkNormRopeTensors part(c, InputFamily::normals);
    part.q_gain.assign(all.q_gain.values());
    part.k_gain.assign(all.k_gain.values());
    const std::pair<TestTensor*, TestTensor*> copies[] = {{&part.q, &all.q},
                                                          {&part.k, &all.k},
                                                          {&part.d_q_out, &all.d_q_out},
                                                          {&part.d_k_out, &all.d_k_out},
                                                          {&part.position, &all.position}};
    for (const auto& [to, from] : copies) {
      const int64_t width = to->shape().row_elements();
      for (int64_t i = 0; i < to->elements(); ++i) {
        to->set(i, from->at(rows[i / width] * width + i % width));
      }
    }
    part.forward();
    part.backward();
    std::vector<std::vector<std::byte>> bits;
    for (const TestTensor* tensor : {&part.q_out, &part.k_out, &part.d_q, &part.d_k}) {
      append_row_bits(*tensor, bits);
    }
    return bits;
  });
}

TEST(QkNormRope, Bf16Storage) {
  QkNormRopeTensors t({40, 4, 2, 32, 16, QkNormKind::per_head}, InputFamily::normals, DType::bf16);
  t.forward();
  t.backward();
  expect_oracle(t, [](const TestTensor& actual, const std::vector<double>& expected) {
    const bool is_rounded = actual.dtype() == DType::bf16;
    return within(actual, expected, is_rounded ? bf16_tolerance(2, 16) : tolerance(2, 16));
  });
}

TEST(RopeTable, FollowsTheRoundingsOfFloat32) {
  // transformers: inv_freq = 1 / theta^(2i/Q), angle = inv_freq * position, all float32. The libm
  // of the test differs by at most an ulp in powf, which the angle's rounding absorbs or doubles.
  for (const double theta : {10000.0, 1e6}) {
    std::vector<float> cos, sin;
    rope_table({.theta = theta, .head_dim = 32, .positions = 300}, cos, sin);
    for (int64_t i = 0; i < 16; ++i) {
      const float power = static_cast<float>(std::pow(theta, static_cast<double>(2 * i) / 32.0));
      const float inverse = 1.0f / power;
      for (int64_t position = 0; position < 300; ++position) {
        const float angle = inverse * static_cast<float>(position);
        EXPECT_EQ(cos[position * 16 + i], static_cast<float>(std::cos(static_cast<double>(angle))));
        EXPECT_EQ(sin[position * 16 + i], static_cast<float>(std::sin(static_cast<double>(angle))));
      }
    }
  }
}

TEST(QkNormRope, MustFailForInterleavedPairsAndBadPositions) {
  QkNormRopeTensors t({16, 2, 1, 16, 16, QkNormKind::none}, InputFamily::normals);
  t.forward();
  // GPT-J pairs (2i, 2i + 1) where NeoX pairs (i, i + Q/2): the mistake that this op invites.
  const std::vector<double> cos = t.at_positions(t.cos), sin = t.at_positions(t.sin);
  const std::vector<double> x = t.q.values();
  std::vector<double> interleaved(x.size());
  for (size_t pair = 0; pair < x.size() / 2; ++pair) {
    const size_t column = pair / 16 * 8 + pair % 8;
    interleaved[2 * pair] = x[2 * pair] * cos[column] - x[2 * pair + 1] * sin[column];
    interleaved[2 * pair + 1] = x[2 * pair + 1] * cos[column] + x[2 * pair] * sin[column];
  }
  EXPECT_FALSE(within(t.q_out, interleaved, tolerance(2, 16)));
  t.position.set(3, kPositions);
  EXPECT_THROW(t.forward(), Error);
}

// Beside the common cases: production heads, which are whole vectors, heads that need several
// vectors a lane, and warps whose passes have more or fewer heads than there are.
std::vector<QkNormRopeCase> cuda_qk_norm_rope_cases() {
  std::vector<QkNormRopeCase> cases = kQkNormRopeCases;
  for (const QkNormKind kind : {QkNormKind::none, QkNormKind::per_head, QkNormKind::full_width}) {
    cases.push_back({21, 32, 4, 128, 8, kind});
    cases.push_back({9, 5, 1, 80, 4, kind});
    cases.push_back({5, 60, 4, 128, 4, kind});
    cases.push_back({6, 70, 5, 16, 4, kind});
    cases.push_back({7, 37, 5, 32, 3, kind});
    cases.push_back({3, 72, 24, 256, 2, kind});
    cases.push_back({45, 9, 2, 64, 13, kind});  // the last leaf has six tokens
  }
  return cases;
}

TEST(QkNormRope, CudaAgreesWithTheReference) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const QkNormRopeCase& c : cuda_qk_norm_rope_cases()) {
    for (const InputFamily family : {InputFamily::integers, InputFamily::normals}) {
      for (const DType dtype : {DType::f32, DType::bf16}) {
        SCOPED_TRACE(testing::Message() << c.T << "x" << c.H << "+" << c.G << "x" << c.Q << " kind "
                                        << static_cast<int>(c.kind) << " " << dtype_name(dtype));
        QkNormRopeTensors t(c, family, dtype);
        t.forward();
        const bool is_power = (c.Q & (c.Q - 1)) == 0 && (c.H & (c.H - 1)) == 0;
        const bool exact = family == InputFamily::integers && is_power;
        if (c.Q == 2 && !exact) continue;  // a mean over two cancels
        const double bound = dtype == DType::bf16 ? bf16_tolerance(2, 16) : tolerance(2, 16);
        expect_cuda_agrees(qk_norm_rope, t.forward_args(), exact ? 0 : bound);
        // NOTE: sums of signed integers may reach zero from either side, so zeros keep a tolerance.
        expect_cuda_agrees(qk_norm_rope_backward, t.backward_args(), exact ? 1e-30 : bound);
      }
    }
  }
}

TEST(QkNormRope, CudaBitsDependOnTheTokenAlone) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const QkNormKind kind : {QkNormKind::none, QkNormKind::per_head, QkNormKind::full_width}) {
    QkNormRopeTensors t({37, 8, 2, 128, 64, kind}, InputFamily::normals, DType::bf16);
    t.forward();
    expect_cuda_rows_independent(qk_norm_rope, t.forward_args(), 37);
    expect_cuda_rows_independent(qk_norm_rope_backward, t.backward_args(), 37);
  }
}

}  // namespace
}  // namespace cambium::test
