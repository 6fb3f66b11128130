// Parity of the parameter digest: exact, additive over shards, the same for any thread count.
#include "tests/ops/cuda_test.h"
#include "tests/ops/param_digest_cases.h"

namespace cambium::test {
namespace {

TEST(ParamDigest, AgreesWithBlocksDigestedAlone) {
  for (const int64_t N : kParamDigestCases) {
    TestRandom random(N);
    TestTensor data = make_tensor(Shape(N), random, InputFamily::normals);
    for (const int64_t first_block : {0, 5}) {
      EXPECT_EQ(run_param_digest(data.in<float>(), 99, first_block).hex(),
                param_digest_oracle(data, 99, first_block).hex())
          << N;
    }
  }
}

TEST(ParamDigest, ShardsAddUpAndThreadsDoNotMatter) {
  const int64_t N = 100 * kDigestBlockElements + 3;
  TestRandom random(2);
  TestTensor data = make_tensor(Shape(N), random, InputFamily::normals);
  const Digest128 whole = run_param_digest(data.in<float>(), 7, 0, 1);
  for (const int threads : {2, 4}) {
    EXPECT_EQ(run_param_digest(data.in<float>(), 7, 0, threads), whole);
  }
  for (const int64_t cut : {1, 8, 50, 100}) {
    const int64_t head = cut * kDigestBlockElements;
    Digest128 sum = run_param_digest(In<float>(data.in<float>().pointer(), Shape(head)), 7, 0);
    sum += run_param_digest(In<float>(data.in<float>().pointer() + head, Shape(N - head)), 7, cut);
    EXPECT_EQ(sum.hex(), whole.hex()) << cut;
  }
}

TEST(ParamDigest, MustFailOneBitAnywhereIsDetected) {
  TestRandom random(3);
  TestTensor data = make_tensor(Shape(9000), random, InputFamily::normals);
  const Digest128 before = run_param_digest(data.in<float>(), 7, 0);
  for (const int64_t element : {0, 4095, 4096, 8999}) {
    TestTensor changed = data;
    static_cast<uint32_t*>(changed.data())[element] ^= 1;
    EXPECT_NE(run_param_digest(changed.in<float>(), 7, 0), before) << element;
  }
}

TEST(ParamDigest, CudaGivesTheReferencesBits) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  std::vector<int64_t> counts = kParamDigestCases;
  for (int64_t N = 2; N <= 70; ++N) counts.push_back(N);  // every short form of XXH3
  for (const int64_t N : {255, 256, 257, 512, 4079, 4080, 4081, 600 * 4096 + 1000}) {
    counts.push_back(N);
  }
  for (const int64_t N : counts) {
    TestRandom random(N);
    TestTensor data = make_tensor(Shape(N), random, InputFamily::normals);
    TestTensor sum(Shape(2), DType::i64);
    SCOPED_TRACE(N);
    expect_cuda_agrees(param_digest, {.data_N = data.in<float>(),
                                      .tensor_id = 0x9d3f77aa12345678u + static_cast<uint64_t>(N),
                                      .first_block = N % 7,
                                      .sum_2 = sum.out<int64_t>()});
  }
}

}  // namespace
}  // namespace cambium::test
