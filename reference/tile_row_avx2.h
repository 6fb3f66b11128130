// Sixteen neighbouring elements of a register tile, in AVX2: two registers.
//
// kTileRows rows, a row of B and a broadcast fit the 16 registers. reference/tile_row_avx512.h is
// the other one.
#pragma once

#include <immintrin.h>

#include "reference/gemm.h"

namespace cambium::reference {

struct RowAvx2 {
  static constexpr int kTileRows = 6;  // 6 x 2 accumulators, 2 of B, 1 broadcast: 15 registers

  __m256 low, high;

  [[gnu::always_inline]] static RowAvx2 zero() {
    return {_mm256_setzero_ps(), _mm256_setzero_ps()};
  }
  [[gnu::always_inline]] static RowAvx2 load(const float* from) {
    return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
  }
  [[gnu::always_inline]] static RowAvx2 broadcast(const float* from) {
    const __m256 value = _mm256_broadcast_ss(from);
    return {value, value};
  }
  [[gnu::always_inline]] void store(float* to) const {
    _mm256_storeu_ps(to, low);
    _mm256_storeu_ps(to + 8, high);
  }
  [[gnu::always_inline]] RowAvx2 plus(const RowAvx2& right) const {
    return {_mm256_add_ps(low, right.low), _mm256_add_ps(high, right.high)};
  }
  [[gnu::always_inline]] RowAvx2 times(const RowAvx2& right) const {
    return {_mm256_mul_ps(low, right.low), _mm256_mul_ps(high, right.high)};
  }
  // this = factor * b + this, rounded once
  [[gnu::always_inline]] void fuse(const RowAvx2& factor, const RowAvx2& b) {
    low = _mm256_fmadd_ps(factor.low, b.low, low);
    high = _mm256_fmadd_ps(factor.high, b.high, high);
  }
};

}  // namespace cambium::reference
