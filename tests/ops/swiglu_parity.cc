// Parity of SwiGLU: normals, extremes, bf16, D1, D2 and finite differences.
#include "tests/ops/cuda_test.h"
#include "tests/ops/swiglu_cases.h"

namespace cambium::test {
namespace {

constexpr double kBound = 8 * 0x1p-23;  // a handful of roundings, no sum

TEST(Swiglu, AgreesWithOracle) {
  for (const SwigluCase& c : kSwigluCases) {
    TestRandom random(c.R + c.F);
    TestTensor gate_up = make_tensor(Shape(c.R, 2 * c.F), random, InputFamily::normals);
    TestTensor d_h = make_tensor(Shape(c.R, c.F), random, InputFamily::normals);
    TestTensor h(Shape(c.R, c.F), DType::f32, c.F + 3);
    TestTensor d_gate_up(Shape(c.R, 2 * c.F), DType::f32, 2 * c.F + 1);
    run_op(swiglu, SwigluArgs{gate_up.in<Real>(), h.out<Real>()});
    run_op(swiglu_backward,
           SwigluBackwardArgs{gate_up.in<Real>(), d_h.in<Real>(), d_gate_up.out<Real>()});
    EXPECT_TRUE(within(h, swiglu_oracle(gate_up.values(), c.F), kBound));
    EXPECT_TRUE(
        within(d_gate_up, swiglu_backward_oracle(gate_up.values(), d_h.values(), c.F), kBound));
  }
}

// silu(0) = 0 and silu'(0) = 1/2 are exact, and so is up in both products.
TEST(Swiglu, ZeroGateIsExact) {
  TestRandom random(2);
  const int64_t R = 5, F = 12;
  TestTensor gate_up = make_tensor(Shape(R, 2 * F), random, InputFamily::integers);
  for (int64_t i = 0; i < R * F; ++i) gate_up.set(i / F * 2 * F + i % F, 0);
  TestTensor d_h = make_tensor(Shape(R, F), random, InputFamily::integers);
  TestTensor h(Shape(R, F)), d_gate_up(Shape(R, 2 * F));
  run_op(swiglu, SwigluArgs{gate_up.in<Real>(), h.out<Real>()});
  run_op(swiglu_backward,
         SwigluBackwardArgs{gate_up.in<Real>(), d_h.in<Real>(), d_gate_up.out<Real>()});
  EXPECT_TRUE(bits_equal(h, swiglu_oracle(gate_up.values(), F)));
  EXPECT_TRUE(bits_equal(d_gate_up, swiglu_backward_oracle(gate_up.values(), d_h.values(), F)));
}

TEST(Swiglu, LargeGatesStayFinite) {
  TestTensor gate_up(Shape(2, 4)), d_h(Shape(2, 2)), h(Shape(2, 2)), d_gate_up(Shape(2, 4));
  gate_up.assign(std::vector<double>{-1000, 1000, 3, -2, -90, 90, 1, 1});
  d_h.fill(1);
  run_op(swiglu, SwigluArgs{gate_up.in<Real>(), h.out<Real>()});
  run_op(swiglu_backward,
         SwigluBackwardArgs{gate_up.in<Real>(), d_h.in<Real>(), d_gate_up.out<Real>()});
  EXPECT_TRUE(within(h, swiglu_oracle(gate_up.values(), 2), kBound));
  EXPECT_TRUE(within(d_gate_up, swiglu_backward_oracle(gate_up.values(), d_h.values(), 2), kBound));
}

TEST(Swiglu, Bf16RoundsOnceWhereStored) {
  TestRandom random(4);
  TestTensor gate_up(Shape(9, 40), DType::bf16), h(Shape(9, 20), DType::bf16), wide(Shape(9, 20));
  gate_up.fill_normal(random);
  run_op(swiglu, SwigluArgs{gate_up.in<Real>(), h.out<Real>()});
  run_op(swiglu, SwigluArgs{gate_up.in<Real>(), wide.out<Real>()});
  EXPECT_TRUE(bits_equal(h, wide.values()));
}

TEST(Swiglu, BitsDependOnTheRowAlone) {
  const int64_t R = 70, F = 300;
  TestRandom random(6);
  TestTensor gate_up = make_tensor(Shape(R, 2 * F), random, InputFamily::normals);
  TestTensor d_h = make_tensor(Shape(R, F), random, InputFamily::normals);
  auto run = [&](const std::vector<int64_t>& rows, int threads) {
    const auto count = static_cast<int64_t>(rows.size());
    TestTensor from(Shape(count, 2 * F)), d_from(Shape(count, F));
    for (int64_t i = 0; i < count * 2 * F; ++i) {
      from.set(i, gate_up.at(rows[i / (2 * F)] * 2 * F + i % (2 * F)));
    }
    for (int64_t i = 0; i < count * F; ++i) d_from.set(i, d_h.at(rows[i / F] * F + i % F));
    TestTensor h(Shape(count, F)), d_gate_up(Shape(count, 2 * F));
    run_op(swiglu, SwigluArgs{from.in<Real>(), h.out<Real>()}, threads);
    run_op(swiglu_backward,
           SwigluBackwardArgs{from.in<Real>(), d_from.in<Real>(), d_gate_up.out<Real>()}, threads);
    std::vector<std::vector<std::byte>> bits_of_rows;
    append_row_bits(h, bits_of_rows);
    append_row_bits(d_gate_up, bits_of_rows);
    return bits_of_rows;
  };
  expect_rows_independent(R, [&](const std::vector<int64_t>& rows) { return run(rows, 2); });
  std::vector<int64_t> all(R);
  for (int64_t row = 0; row < R; ++row) all[row] = row;
  expect_thread_independent([&](int threads) {
    std::vector<std::byte> bits;
    for (const auto& row : run(all, threads)) bits.insert(bits.end(), row.begin(), row.end());
    return bits;
  });
}

TEST(Swiglu, BackwardAgreesWithFiniteDifferences) {
  const int64_t R = 6, F = 11;
  TestRandom random(8);
  TestTensor gate_up = make_tensor(Shape(R, 2 * F), random, InputFamily::normals);
  TestTensor d_h = make_tensor(Shape(R, F), random, InputFamily::normals);
  TestTensor d_gate_up(Shape(R, 2 * F));
  run_op(swiglu_backward,
         SwigluBackwardArgs{gate_up.in<Real>(), d_h.in<Real>(), d_gate_up.out<Real>()});
  auto loss = [&](const std::vector<double>& values) {
    const std::vector<double> h = swiglu_oracle(values, F);
    double sum = 0;
    for (int64_t i = 0; i < R * F; ++i) sum += h[i] * d_h.at(i);
    return sum;
  };
  EXPECT_LT(finite_difference_error(loss, gate_up.values(), d_gate_up.values(), random), 1e-5);
}

TEST(Swiglu, MustFailWrongOutputIsDetected) {
  TestRandom random(10);
  TestTensor gate_up = make_tensor(Shape(8, 32), random, InputFamily::normals);
  TestTensor h(Shape(8, 16));
  run_op(swiglu, SwigluArgs{gate_up.in<Real>(), h.out<Real>()});
  const std::vector<double> expected = swiglu_oracle(gate_up.values(), 16);
  ASSERT_TRUE(within(h, expected, kBound));
  h.set(20, h.at(20) + 1e-4);
  EXPECT_FALSE(within(h, expected, kBound));
  TestTensor swapped(Shape(8, 32));  // gate and up exchanged
  for (int64_t i = 0; i < 256; ++i) swapped.set(i, gate_up.at(i / 32 * 32 + (i + 16) % 32));
  run_op(swiglu, SwigluArgs{swapped.in<Real>(), h.out<Real>()});
  EXPECT_FALSE(within(h, expected, kBound));
}

TEST(Swiglu, CudaAgreesWithTheReference) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  std::vector<SwigluCase> cases = kSwigluCases;
  cases.push_back({37, 768});
  for (const SwigluCase& c : cases) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      TestRandom random(c.R + c.F);
      TestTensor gate_up = make_tensor(Shape(c.R, 2 * c.F), random, InputFamily::normals, dtype);
      TestTensor d_h = make_tensor(Shape(c.R, c.F), random, InputFamily::normals, dtype);
      TestTensor h(Shape(c.R, c.F), dtype), d_gate_up(Shape(c.R, 2 * c.F), dtype);
      const SwigluArgs forward{gate_up.in<Real>(), h.out<Real>()};
      const SwigluBackwardArgs backward{gate_up.in<Real>(), d_h.in<Real>(), d_gate_up.out<Real>()};
      const double bound = dtype == DType::bf16 ? 0x1p-8 : kBound;
      expect_cuda_agrees(swiglu, forward, bound);
      expect_cuda_agrees(swiglu_backward, backward, bound);
      if (c.R != 37) continue;
      expect_cuda_rows_independent(swiglu, forward, c.R);
      expect_cuda_rows_independent(swiglu_backward, backward, c.R);
    }
  }
}

}  // namespace
}  // namespace cambium::test
