// Parity of copy_bytes, zero_bytes, cast_real, scale_values and add_values with plain loops.
#include "kernels/copy.h"
#include "tests/ops/copy_cases.h"
#include "tests/ops/cuda_test.h"
#include "tests/ops/op_test.h"

namespace cambium::test {

namespace {

TEST(CopyOp, CopiesAndZeroesEveryByteAndNoOther) {
  for (const int64_t size : copy_case_sizes()) {
    TestRandom random(static_cast<uint64_t>(size));
    TestTensor from(Shape(size), DType::u8), to(Shape(size), DType::u8);
    from.fill_integers(random, 1, 254);
    run_op(copy_bytes, CopyBytesArgs{.from_N = from.in<uint8_t>(), .to_N = to.out<uint8_t>()});
    EXPECT_TRUE(bits_equal(to, from)) << size;
    run_op(zero_bytes, ZeroBytesArgs{.to_N = to.out<uint8_t>()});
    EXPECT_TRUE(bits_equal(to, std::vector<double>(static_cast<size_t>(size), 0.0))) << size;
  }
}

TEST(CopyOp, CastRoundsToNearestEven) {
  for (const int64_t size : copy_case_sizes()) {
    TestRandom random(static_cast<uint64_t>(size));
    TestTensor from{Shape(size)}, to(Shape(size), DType::bf16);
    from.fill_normal(random);
    run_op(cast_real, CastRealArgs{.from_N = from.in<Real>(), .to_N = to.out<Real>()});
    EXPECT_TRUE(bits_equal(to, from.values())) << size;
  }
  // Ties go to the even neighbour: 1 + 2^-8 lies between 1 and 1 + 2^-7.
  TestTensor tie(Shape(2)), rounded(Shape(2), DType::bf16);
  tie.assign(std::vector<double>{1.0 + 0x1p-8, 1.0 + 0x1p-7 + 0x1p-8});
  run_op(cast_real, CastRealArgs{.from_N = tie.in<Real>(), .to_N = rounded.out<Real>()});
  EXPECT_EQ(rounded.at(0), 1.0);
  EXPECT_EQ(rounded.at(1), 1.0 + 0x1p-6);
}

TEST(CopyOp, ScaleMultipliesInPlace) {
  TestRandom random(3);
  TestTensor value(Shape(1001));
  value.fill_normal(random);
  std::vector<double> want = value.values();
  for (double& element : want) element *= 4.0;
  run_op(scale_values, ScaleValuesArgs{.value_N = value.inout<float>(), .factor = 4.0f});
  EXPECT_TRUE(bits_equal(value, want));
}

TEST(CopyOp, CudaAgreesWithTheReference) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const int64_t size : copy_case_sizes()) {
    TestRandom random(static_cast<uint64_t>(size));
    TestTensor bytes(Shape(size), DType::u8), copied(Shape(size), DType::u8);
    bytes.fill_integers(random, 1, 254);
    run_cuda_op(copy_bytes,
                CopyBytesArgs{.from_N = bytes.in<uint8_t>(), .to_N = copied.out<uint8_t>()});
    EXPECT_TRUE(bits_equal(copied, bytes)) << size;
    run_cuda_op(zero_bytes, ZeroBytesArgs{.to_N = copied.out<uint8_t>()});
    EXPECT_TRUE(bits_equal(copied, std::vector<double>(static_cast<size_t>(size), 0.0))) << size;
    TestTensor value{Shape(size)}, narrow(Shape(size), DType::bf16), wide{Shape(size)};
    value.fill_normal(random);
    run_cuda_op(cast_real, CastRealArgs{.from_N = value.in<Real>(), .to_N = narrow.out<Real>()});
    EXPECT_TRUE(bits_equal(narrow, value.values())) << size;
    run_cuda_op(cast_real, CastRealArgs{.from_N = narrow.in<Real>(), .to_N = wide.out<Real>()});
    EXPECT_TRUE(bits_equal(wide, narrow.values())) << size;
    std::vector<double> scaled = value.values();
    for (double& element : scaled) element *= 4.0;
    run_cuda_op(scale_values, ScaleValuesArgs{.value_N = value.inout<float>(), .factor = 4.0f});
    EXPECT_TRUE(bits_equal(value, scaled)) << size;
    for (int64_t i = 0; i < size; ++i) scaled[i] = static_cast<float>(scaled[i]) + wide.at(i);
    run_cuda_op(add_values,
                AddValuesArgs{.sum_N = value.inout<float>(), .addend_N = wide.in<float>()});
    EXPECT_TRUE(bits_equal(value, scaled)) << size;
  }
}

TEST(CopyOp, AddValuesAddsInPlace) {
  TestRandom random(4);
  TestTensor sum(Shape(1001)), addend(Shape(1001));
  sum.fill_integers(random, -900, 900);
  addend.fill_integers(random, -900, 900);
  std::vector<double> want = sum.values();
  for (size_t i = 0; i < want.size(); ++i) want[i] += addend.values()[i];
  run_op(add_values, AddValuesArgs{.sum_N = sum.inout<float>(), .addend_N = addend.in<float>()});
  EXPECT_TRUE(bits_equal(sum, want));
}

TEST(CopyOp, MustFailWhenAnElementIsMissed) {
  TestTensor value(Shape(64));
  value.fill(1.0);
  TestTensor other = value;
  other.set(63, 2.0);
  EXPECT_FALSE(bits_equal(value, other));
}

}  // namespace

}  // namespace cambium::test
