// The grouped GEMM on the GPU against the reference: plain kernels (odd shapes, fp32) and the
// tensor cores' kernel (bf16, extents that are multiples of 64), gathered rows, D1, D2 and D3.
#include "tests/ops/grouped_gemm_layer.h"

namespace cambium::test {
namespace {

// Around the tile of 256 x 192 and its slices of 64 rows: nothing, one row, slice and tile borders,
// more rows than a cluster's item, empty experts, one expert with everything, a last tile of 64 and
// of 128 columns, and the production widths.
const std::vector<GroupedCase> kTileCases = {
    {{0, 0, 0}, 64, 64},
    {{1}, 64, 64},
    {{0, 63, 0, 64, 65, 0}, 128, 192},
    {{0, 700, 0, 0}, 192, 128},
    {{255, 256, 257, 511, 0, 513, 3}, 320, 192},
    {{1300, 128, 40}, 256, 256},
    {{300, 0, 212}, 2048, 768},
};

struct CudaCase {
  GroupedCase c;
  LayerKind kind;
};

std::vector<CudaCase> grouped_cuda_cases() {
  std::vector<CudaCase> cases;
  for (const RowSource source : {RowSource::permuted, RowSource::gathered}) {
    for (const GroupedCase& c : kGroupedCases) {
      cases.push_back({c, {DType::f32, RowStrides::padded, source}});
      cases.push_back({c, {DType::bf16, RowStrides::padded, source}});
    }
    for (const GroupedCase& c : kTileCases) {
      cases.push_back({c, {DType::bf16, RowStrides::contiguous, source}});
    }
  }
  return cases;
}

std::string case_name(const CudaCase& test) {
  std::string rows;
  for (const int64_t count : test.c.rows) rows += std::to_string(count) + " ";
  return rows + "rows, D " + std::to_string(test.c.D) + ", F " + std::to_string(test.c.F) + ", " +
         dtype_name(test.kind.dtype) +
         (test.kind.source == RowSource::gathered ? ", gathered" : "");
}

// Sums differ in order, so a stored bf16 may be its neighbour.
double bound_of(const CudaCase& test, int64_t terms) {
  return test.kind.dtype == DType::bf16 ? bf16_tolerance(kChainFactor, terms)
                                        : tolerance(kChainFactor, terms);
}

// Each op alone, on the reference's intermediate results.
TEST(GroupedGemm, CudaAgreesWithTheReference) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const CudaCase& test : grouped_cuda_cases()) {
    SCOPED_TRACE(case_name(test));
    for (const RowWeights weights : {RowWeights::absent, RowWeights::given}) {
      ExpertLayer layer(test.c, 41, test.kind);
      layer.run(weights);
      ExpertLayer gpu = layer;
      const auto expect_within = [&](const TestTensor& actual, const TestTensor& expected,
                                     double bound) {
        EXPECT_TRUE(within(actual, expected.values(), bound));
      };
      const double of_D = bound_of(test, test.c.D), of_F = bound_of(test, 2 * test.c.F);
      for (TestTensor* tensor : {&gpu.gate_up, &gpu.h}) tensor->poison();
      run_cuda_op(grouped_up, gpu.up_args());
      expect_within(gpu.gate_up, layer.gate_up, of_D);
      expect_within(gpu.h, layer.h, of_D);
      gpu.gate_up = layer.gate_up;
      gpu.h = layer.h;
      gpu.y.poison();
      run_cuda_op(grouped_down, gpu.down_args(weights));
      expect_within(gpu.y, layer.y, of_F);
      for (TestTensor* tensor : {&gpu.d_gate_up, &gpu.d_weight, &gpu.weighted_h}) tensor->poison();
      run_cuda_op(grouped_down_dgrad, gpu.down_dgrad_args(weights));
      expect_within(gpu.d_gate_up, layer.d_gate_up, of_D);
      expect_within(gpu.weighted_h, layer.weighted_h, of_D);
      if (weights == RowWeights::given) {
        expect_within(gpu.d_weight, layer.d_weight, tolerance(8, test.c.D + test.c.F));
      }
      gpu.d_gate_up = layer.d_gate_up;
      gpu.d_x.poison();
      run_cuda_op(grouped_up_dgrad, gpu.up_dgrad_args());
      expect_within(gpu.d_x, layer.d_x, of_F);
    }
  }
}

TEST(GroupedGemm, CudaWgradAgreesWithTheReference) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const CudaCase& test : grouped_cuda_cases()) {
    SCOPED_TRACE(case_name(test));
    ExpertLayer layer(test.c, 43, test.kind);
    layer.run(RowWeights::given);
    for (const WgradOf which : {WgradOf::up, WgradOf::down}) {
      const TestTensor expected = wgrad_of(layer, which, Device::cpu, 0.5);
      const TestTensor actual = wgrad_of(layer, which, Device::gpu, 0.5);
      EXPECT_TRUE(within(actual, expected.values(), tolerance(kChainFactor, test.c.R() + 1)));
      EXPECT_TRUE(bits_equal(wgrad_of(layer, which, Device::gpu, 0.5), actual));  // D1
      EXPECT_TRUE(bits_equal(wgrad_of(layer, which, Device::gpu, 0, GradMode::store),
                             wgrad_of(layer, which, Device::gpu)));
    }
  }
}

TEST(GroupedGemm, CudaIntegersAreExact) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const CudaCase& test : grouped_cuda_cases()) {
    if (test.kind.source == RowSource::gathered || test.c.D >= 2048) continue;
    SCOPED_TRACE(case_name(test));
    const GroupedCase& c = test.c;
    ExpertLayer layer(c, 45, test.kind);
    TestRandom random(47);
    for (TestTensor* tensor : {&layer.x, &layer.w_up, &layer.w_down, &layer.weight, &layer.h,
                               &layer.d_gate_up, &layer.d_y, &layer.weighted_h}) {
      tensor->fill_integers(random, -4, 4);
    }
    run_cuda_op(grouped_down, layer.down_args(RowWeights::given));
    std::vector<double> y =
        grouped_forward_oracle(c, layer.h.values(), layer.w_down.values(), c.D, c.F);
    for (int64_t i = 0; i < c.R() * c.D; ++i) y[i] *= layer.weight.at(i / c.D);
    EXPECT_TRUE(bits_equal(layer.y, y));
    run_cuda_op(grouped_up_dgrad, layer.up_dgrad_args());
    EXPECT_TRUE(bits_equal(layer.d_x, grouped_dgrad_oracle(c, layer.d_gate_up.values(),
                                                           layer.w_up.values(), 2 * c.F, c.D)));
    for (const WgradOf which : {WgradOf::up, WgradOf::down}) {
      EXPECT_TRUE(bits_equal(wgrad_of(layer, which, Device::gpu, 3),
                             wgrad_of(layer, which, Device::cpu, 3)));
    }
    run_cuda_op(grouped_up, layer.up_args());
    EXPECT_TRUE(
        bits_equal(layer.gate_up,
                   grouped_forward_oracle(c, layer.x.values(), layer.w_up.values(), 2 * c.F, c.D)));
  }
}

TEST(GroupedGemm, CudaRowsDoNotDependOnTheBatch) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  const ExpertLayer tiles({{261, 2, 70}, 128, 192}, 49, {DType::bf16, RowStrides::contiguous});
  const ExpertLayer plain({{61, 2, 40}, 130, 72}, 51);
  for (const ExpertLayer* whole : {&tiles, &plain}) {
    expect_rows_independent(whole->c.R(), [&](const std::vector<int64_t>& rows) {
      return bits_of_batch(*whole, rows, Device::gpu);
    });
  }
}

TEST(GroupedGemm, CudaRunsHaveTheSameBits) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  const LayerKind kind{DType::bf16, RowStrides::contiguous, RowSource::gathered};
  ExpertLayer first({{700, 0, 33, 1300}, 256, 192}, 53, kind);
  first.run(RowWeights::given, 1, Device::gpu);
  for (int repeat = 0; repeat < 3; ++repeat) {
    ExpertLayer again({{700, 0, 33, 1300}, 256, 192}, 53, kind);
    again.run(RowWeights::given, 1, Device::gpu);
    for (size_t i = 0; i < first.results().size(); ++i) {
      EXPECT_TRUE(bits_equal(*again.results()[i], *first.results()[i])) << i;
    }
  }
}

// D3: the GPU's chains and tree are the reference's, bit for bit.
TEST(GroupedGemm, CudaNodesHaveTheBitsOfTheReference) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const int64_t total_blocks : {1, 3, 8, 13, 32}) {
    for (const int64_t rows_per_block : {1, 3, 20}) {
      const GroupedForest forest(total_blocks, rows_per_block, 100 + total_blocks);
      std::vector<std::vector<float>> expected;
      for (int64_t x = 0; x < forest.e; ++x) expected.push_back(forest.oracle(x));
      for (const int64_t width : {int64_t{3}, total_blocks}) {
        for (const auto order : {CallOrder::ascending, CallOrder::odd_first}) {
          EXPECT_EQ(forest.run(call_ranges(total_blocks, width, order), 2, Device::gpu), expected)
              << total_blocks << " blocks in calls of " << width;
        }
      }
    }
  }
}

TEST(GroupedGemm, CudaMustFailWrongExpertIsDetected) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  ExpertLayer layer({{200, 112}, 128, 64}, 55, {DType::bf16, RowStrides::contiguous});
  layer.run(RowWeights::given);
  const std::vector<double> expected = layer.y.values();
  layer.run(RowWeights::given, 1, Device::gpu);
  ASSERT_TRUE(within(layer.y, expected, 4 * bf16_tolerance(kChainFactor, 256)));
  layer.offsets.set(1, 199);  // one row goes to its neighbour's expert
  layer.run(RowWeights::given, 1, Device::gpu);
  EXPECT_FALSE(within(layer.y, expected, 4 * bf16_tolerance(kChainFactor, 256)));
}

}  // namespace
}  // namespace cambium::test
