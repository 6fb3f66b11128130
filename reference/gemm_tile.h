// Register tiles of the product kernels (reference/gemm.h) in AVX2 intrinsics.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "reference/gemm.h"

namespace cambium::reference {

// Calls body.template operator()<i>() for i = 0 .. kCount - 1, expanded by the compiler:
// accumulators indexed by constants stay in registers, those indexed by a loop variable do not.
template <int kCount, class Body>
[[gnu::always_inline]] inline void unrolled(Body&& body) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (body.template operator()<i>(), ...);
  }
  (std::make_integer_sequence<int, kCount>());
}

// kRows x 16 accumulators.
template <int kRows>
struct Tile {
  __m256 low[kRows];
  __m256 high[kRows];

  [[gnu::always_inline]] inline void clear() {
    unrolled<kRows>([&]<int i>()
                        __attribute__((always_inline)) { low[i] = high[i] = _mm256_setzero_ps(); });
  }
  [[gnu::always_inline]] inline void load(const float* c, int64_t c_stride) {
    unrolled<kRows>([&]<int i>() __attribute__((always_inline)) {
      low[i] = _mm256_loadu_ps(c + i * c_stride);
      high[i] = _mm256_loadu_ps(c + i * c_stride + 8);
    });
  }
  [[gnu::always_inline]] inline void store(float* c, int64_t c_stride) const {
    unrolled<kRows>([&]<int i>() __attribute__((always_inline)) {
      _mm256_storeu_ps(c + i * c_stride, low[i]);
      _mm256_storeu_ps(c + i * c_stride + 8, high[i]);
    });
  }
  // this = c + this
  [[gnu::always_inline]] inline void add_left(const float* c, int64_t c_stride) {
    unrolled<kRows>([&]<int i>() __attribute__((always_inline)) {
      low[i] = _mm256_add_ps(_mm256_loadu_ps(c + i * c_stride), low[i]);
      high[i] = _mm256_add_ps(_mm256_loadu_ps(c + i * c_stride + 8), high[i]);
    });
  }
  // this = this + right
  [[gnu::always_inline]] inline void add(const Tile& right) {
    unrolled<kRows>([&]<int i>() __attribute__((always_inline)) {
      low[i] = _mm256_add_ps(low[i], right.low[i]);
      high[i] = _mm256_add_ps(high[i], right.high[i]);
    });
  }
  [[gnu::always_inline]] inline void scale_rows(const float* scale) {
    unrolled<kRows>([&]<int i>() __attribute__((always_inline)) {
      const __m256 factor = _mm256_broadcast_ss(scale + i);
      low[i] = _mm256_mul_ps(low[i], factor);
      high[i] = _mm256_mul_ps(high[i], factor);
    });
  }
  // Asks for the cache lines that `store` will write, so that they arrive during the product.
  [[gnu::always_inline]] static inline void prefetch(const float* c, int64_t c_stride) {
    unrolled<kRows>([&]<int i>() __attribute__((always_inline)) {
      __builtin_prefetch(c + i * c_stride, 1);
      __builtin_prefetch(c + i * c_stride + kTileColumns - 1, 1);
    });
  }
  // Continues the chains over `depth` terms: A[i][k] = a[i * row_step + k * depth_step], B a panel
  // [depth][16].
  [[gnu::always_inline]] inline void multiply(const float* a, int64_t row_step, int64_t depth_step,
                                              const float* b, int64_t depth) {
    Tile sum = *this;
    for (int64_t k = 0; k < depth; ++k) {
      const __m256 b_low = _mm256_loadu_ps(b);
      const __m256 b_high = _mm256_loadu_ps(b + 8);
      unrolled<kRows>([&]<int i>() __attribute__((always_inline)) {
        const __m256 factor = _mm256_broadcast_ss(a + i * row_step);
        sum.low[i] = _mm256_fmadd_ps(factor, b_low, sum.low[i]);
        sum.high[i] = _mm256_fmadd_ps(factor, b_high, sum.high[i]);
      });
      a += depth_step;
      b += kTileColumns;
    }
    *this = sum;
  }
};

// A tile of fewer than 16 columns goes through a full one on the stack.
template <int kRows>
[[gnu::always_inline]] inline void load_tile(Tile<kRows>& tile, const float* c, int64_t c_stride,
                                             int64_t columns) {
  if (columns == kTileColumns) return tile.load(c, c_stride);
  alignas(64) float full[kTileRows * kTileColumns] = {};
  for (int i = 0; i < kRows; ++i) {
    std::copy_n(c + i * c_stride, columns, full + i * kTileColumns);
  }
  tile.load(full, kTileColumns);
}

template <int kRows>
[[gnu::always_inline]] inline void store_tile(const Tile<kRows>& tile, float* c, int64_t c_stride,
                                              int64_t columns) {
  if (columns == kTileColumns) return tile.store(c, c_stride);
  alignas(64) float full[kTileRows * kTileColumns];
  tile.store(full, kTileColumns);
  for (int i = 0; i < kRows; ++i) {
    std::copy_n(full + i * kTileColumns, columns, c + i * c_stride);
  }
}

// Cut of `rows` into the fewest panels of at most kTileRows, as even as possible: the first
// `longer` panels have `base` + 1 rows. (Even panels keep enough chains in flight.)
struct PanelCut {
  int64_t panels = 0;
  int64_t base = 0;
  int64_t longer = 0;

  explicit PanelCut(int64_t rows)
      : panels((rows + kTileRows - 1) / kTileRows),
        base(panels == 0 ? 0 : rows / panels),
        longer(panels == 0 ? 0 : rows % panels) {}
  int64_t begin(int64_t panel) const { return panel * base + (panel < longer ? panel : longer); }
  int64_t count(int64_t panel) const { return base + (panel < longer ? 1 : 0); }
};

// Calls run.template operator()<rows>() for a run-time row count of 1..kTileRows.
template <class Run>
inline void with_tile_rows(int64_t rows, Run&& run) {
  static_assert(kTileRows == 6, "one case per row count");
  switch (rows) {
    case 6:
      return run.template operator()<6>();
    case 5:
      return run.template operator()<5>();
    case 4:
      return run.template operator()<4>();
    case 3:
      return run.template operator()<3>();
    case 2:
      return run.template operator()<2>();
    default:
      return run.template operator()<1>();
  }
}

// Between panels: consecutive panels start in different cache sets, else packing evicts itself.
constexpr int64_t kPanelPadding = kTileColumns;

// Packs B[depth][columns] into panels of 16 columns, each [depth][16], `panel_stride` apart, with
// zeros beyond `columns`.
void pack_panels(const float* b, int64_t b_stride, OperandOrder order, int64_t columns,
                 int64_t depth, float* packed, int64_t panel_stride);

}  // namespace cambium::reference
