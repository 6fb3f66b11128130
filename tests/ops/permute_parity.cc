// Parity of the gathers: copies, so bitwise for every storage.
#include "tests/ops/permute_cases.h"

#include "tests/ops/cuda_test.h"
#include "tests/ops/routing_test.h"

namespace cambium::test {
namespace {

TEST(Permute, GatherRowsCopiesBits) {
  for (const GatherCase& c : kGatherCases) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      TestRandom random(c.M + 1);
      TestTensor x_TD(Shape(c.T, c.D), dtype, c.D + 5), y_MD(Shape(c.M, c.D), dtype, c.D + 3);
      x_TD.fill_normal(random);
      TestTensor index_M = make_gather_index(c, 2);
      run_op(gather_rows, {x_TD.in<Real>(), index_M.in<int32_t>(), y_MD.out<Real>()});
      EXPECT_TRUE(bits_equal(y_MD, gather_oracle(x_TD, index_M, c.D))) << c.M << " x " << c.D;
    }
  }
}

TEST(Permute, GatherScalarsTakesAnyContiguousShape) {
  for (const GatherCase& c : kGatherCases) {
    TestRandom random(c.M + 1);
    TestTensor x_N = make_tensor(Shape(c.T), random, InputFamily::normals);
    TestTensor index_M = make_gather_index(c, 3), y_M(Shape(c.M));
    run_op(gather_scalars, {x_N.in<float>(), index_M.in<int32_t>(), y_M.out<float>()});
    EXPECT_TRUE(bits_equal(y_M, gather_oracle(x_N, index_M, 1)));
  }
  TestTensor weight_TK(Shape(2, 2)), slot_R(Shape(3, 1), DType::i32), y_R(Shape(3));
  weight_TK.assign(std::vector<double>{1, 2, 3, 4});
  slot_R.assign(std::vector<double>{3, -1, 0});
  run_op(gather_scalars, {weight_TK.in<float>(), slot_R.in<int32_t>(), y_R.out<float>()});
  EXPECT_TRUE(bits_equal(y_R, std::vector<double>{4, 0, 1}));
}

TEST(Permute, RowBlocksFollowTheirTokens) {
  TestTensor token_block_T(Shape(4), DType::i32), row_token_R(Shape(5), DType::i32);
  TestTensor row_block_R = make_index_output(Shape(5));
  token_block_T.assign(std::vector<double>{10, 10, 11, 40});
  row_token_R.assign(std::vector<double>{3, 0, 2, -1, 1});
  run_op(gather_row_blocks,
         {token_block_T.in<int32_t>(), row_token_R.in<int32_t>(), row_block_R.out<int32_t>()});
  EXPECT_TRUE(bits_equal(row_block_R, std::vector<double>{40, 10, 11, -1, 10}));
}

TEST(Permute, DoesNotDependOnThreads) {
  const GatherCase c{200, 3001, 67};
  TestRandom random(5);
  TestTensor x_TD = make_tensor(Shape(c.T, c.D), random, InputFamily::normals);
  TestTensor index_M = make_gather_index(c, 6);
  expect_thread_independent([&](int threads) {
    TestTensor y_MD(Shape(c.M, c.D));
    run_op(gather_rows, {x_TD.in<Real>(), index_M.in<int32_t>(), y_MD.out<Real>()}, threads);
    return y_MD.bits();
  });
}

TEST(Permute, MustFailWrongIndexIsDetected) {
  const GatherCase c{9, 20, 16};
  TestRandom random(7);
  TestTensor x_TD = make_tensor(Shape(c.T, c.D), random, InputFamily::normals);
  TestTensor index_M = make_gather_index(c, 8), y_MD(Shape(c.M, c.D));
  const std::vector<double> expected = gather_oracle(x_TD, index_M, c.D);
  index_M.set(4, index_M.at(4) == 0 ? 1 : 0);
  run_op(gather_rows, {x_TD.in<Real>(), index_M.in<int32_t>(), y_MD.out<Real>()});
  EXPECT_FALSE(bits_equal(y_MD, expected));
  for (const double outside : {9.0, -2.0}) {
    index_M.set(4, outside);
    EXPECT_THROW(run_op(gather_rows, {x_TD.in<Real>(), index_M.in<int32_t>(), y_MD.out<Real>()}),
                 Error);
  }
}

TEST(Permute, CudaGivesTheReferencesBits) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  std::vector<GatherCase> cases = kGatherCases;
  cases.push_back({64, 200, 2048});
  for (const GatherCase& c : cases) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      for (const int64_t padding : {0, 5}) {
        TestRandom random(c.M + 1);
        TestTensor x_TD(Shape(c.T, c.D), dtype, c.D + padding), y_MD(Shape(c.M, c.D), dtype, c.D);
        x_TD.fill_normal(random);
        TestTensor index_M = make_gather_index(c, 2), y_M(Shape(c.M));
        expect_cuda_agrees(gather_rows, {x_TD.in<Real>(), index_M.in<int32_t>(), y_MD.out<Real>()});
        TestTensor x_T = make_tensor(Shape(c.T), random, InputFamily::normals);
        expect_cuda_agrees(gather_scalars,
                           {x_T.in<float>(), index_M.in<int32_t>(), y_M.out<float>()});
        TestTensor block_T(Shape(c.T), DType::i32), row_block(Shape(c.M), DType::i32);
        block_T.fill_integers(random, 0, 1000);
        expect_cuda_agrees(gather_row_blocks, {block_T.in<int32_t>(), index_M.in<int32_t>(),
                                               row_block.out<int32_t>()});
      }
    }
  }
}

}  // namespace
}  // namespace cambium::test
