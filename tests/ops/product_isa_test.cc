// The product loops give the same bits in AVX2 and in AVX-512 (reference/product_kernels.h).
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "reference/product_kernels.h"
#include "src/base/philox.h"

namespace cambium::reference {

namespace {

std::vector<float> normals(int64_t count, uint64_t seed) {
  std::vector<float> values(static_cast<size_t>(count));
  fill_normal(values.data(), 0, count, 1.0f, seed, 0);
  return values;
}

bool has_avx512() { return &product_kernels() == &kAvx512Products; }

// Runs `body` with the kernels of either set on a copy of `c` and compares every byte.
template <class Body>
void expect_equal_bits(const std::vector<float>& c, Body&& body, const std::string& what) {
  std::vector<float> narrow = c, wide = c;
  Scratch scratch;
  body(kAvx2Products, narrow.data(), scratch);
  body(kAvx512Products, wide.data(), scratch);
  EXPECT_EQ(std::memcmp(narrow.data(), wide.data(), narrow.size() * sizeof(float)), 0) << what;
  EXPECT_NE(std::memcmp(narrow.data(), c.data(), narrow.size() * sizeof(float)), 0)
      << what << ": nothing was computed";
}

TEST(ProductIsa, ProductsHaveEqualBits) {
  if (!has_avx512()) GTEST_SKIP() << "skipped: no AVX-512";
  for (const int64_t rows : {1, 5, 6, 7, 12, 13, 25, 96}) {
    for (const int64_t columns : {1, 15, 16, 33, 144}) {
      for (const int64_t depth : {1, 8, 77, 256, 300}) {
        for (const OperandOrder order : {OperandOrder::depth_major, OperandOrder::column_major}) {
          const auto a = normals(rows * depth, 1), b = normals(columns * depth, 2);
          const auto c = normals(rows * columns, 3), scale = normals(rows, 4);
          for (const bool is_plain : {true, false}) {
            expect_equal_bits(
                c,
                [&](const ProductKernels& kernels, float* out, Scratch& scratch) {
                  GemmBlock block{.rows = rows,
                                  .columns = columns,
                                  .depth = depth,
                                  .a = a.data(),
                                  .a_stride = depth,
                                  .b = b.data(),
                                  .b_order = order,
                                  .c = out,
                                  .c_stride = columns};
                  block.b_stride = order == OperandOrder::depth_major ? columns : depth;
                  if (!is_plain) block.row_scale = scale.data();
                  if (!is_plain) block.residual = out, block.residual_stride = columns;
                  kernels.gemm_block(block, scratch);
                },
                fmt::format("{} x {} x {}", rows, columns, depth));
          }
        }
      }
    }
  }
}

TEST(ProductIsa, WeightGradientsHaveEqualBits) {
  if (!has_avx512()) GTEST_SKIP() << "skipped: no AVX-512";
  constexpr int64_t kRows = 300;
  for (const int64_t N : {6, 13, 40}) {
    for (const int64_t K : {16, 21, 64}) {
      const auto d_y = normals(kRows * N, 5), x = normals(kRows * K, 6), c = normals(2 * N * K, 7);
      WgradGroup group{.d_y = d_y.data(),
                       .d_y_stride = N,
                       .x = x.data(),
                       .x_stride = K,
                       .N = N,
                       .K = K,
                       .slot_stride = N * K,
                       .row_end = kRows};
      const WgradChunk chunk{.n_count = N, .k_count = K};
      for (const GradMode mode : {GradMode::store, GradMode::accumulate}) {
        expect_equal_bits(
            c,
            [&](const ProductKernels& kernels, float* out, Scratch& scratch) {
              group.mode = mode;
              group.slots = out;
              kernels.accumulate_chunk(group, chunk, scratch);
            },
            fmt::format("{} x {}", N, K));
      }
      // ((0, 1), (2, 3)) with its left neighbour from slot 1, in two batches.
      const std::array<WgradStep, 4> steps{
          {{0, 7, 0, -1}, {7, 90, 1, -1}, {90, 91, 0, -1}, {91, 200, 2, 0}}};
      NodeStore node{.value_present = true, .is_stored = true, .destination = 0, .fold_count = 1};
      node.folds[0] = 1;
      const std::array<StepBatch, 2> batches{{{0, 2, 0, 90, 0}, {2, 4, 90, 200, 1}}};
      const StepWalk walk{.steps = steps.data(),
                          .nodes = &node,
                          .batches = batches.data(),
                          .batch_count = 2,
                          .stack_tiles = 3,
                          .is_carried = true};
      expect_equal_bits(
          c,
          [&](const ProductKernels& kernels, float* out, Scratch& scratch) {
            group.mode = GradMode::nodes;
            group.slots = out;
            kernels.walk_chunk(group, chunk, walk, scratch);
          },
          fmt::format("nodes, {} x {}", N, K));
    }
  }
}

TEST(ProductIsa, PanelProductsHaveEqualBits) {
  if (!has_avx512()) GTEST_SKIP() << "skipped: no AVX-512";
  for (const int64_t rows : {1, 4, 7, 12, 32, 37}) {
    for (const PanelCombine combine :
         {PanelCombine::store, PanelCombine::add, PanelCombine::scale_add}) {
      constexpr int64_t kColumns = 48, kDepth = 33;
      const auto a = normals(rows * kDepth, 8), b = normals(kDepth * kColumns, 9);
      const auto c = normals(rows * kColumns, 10), scale = normals(rows, 11);
      expect_equal_bits(
          c,
          [&](const ProductKernels& kernels, float* out, Scratch&) {
            kernels.panel_columns({.a = a.data(),
                                   .a_row = kDepth,
                                   .a_column = 1,
                                   .b = b.data(),
                                   .b_row = kColumns,
                                   .c = out,
                                   .c_row = kColumns,
                                   .rows = rows,
                                   .columns = kColumns,
                                   .depth = kDepth,
                                   .combine = combine,
                                   .row_scale = scale.data()},
                                  kColumns);
          },
          fmt::format("{} rows", rows));
    }
  }
}

}  // namespace

}  // namespace cambium::reference
