// Sixteen neighbouring elements of a register tile, in AVX-512: one register.
#pragma once

#include <immintrin.h>

#include "reference/gemm.h"

namespace cambium::reference {

struct RowAvx512 {
  // A multiply-add reads its factor from memory, so two loads a cycle feed two of them a cycle when
  // the load of B is shared by many rows; from about 12 rows on more of them change nothing.
  static constexpr int kTileRows = 12;

  __m512 all;

  [[gnu::always_inline]] static RowAvx512 zero() { return {_mm512_setzero_ps()}; }
  [[gnu::always_inline]] static RowAvx512 load(const float* from) {
    return {_mm512_loadu_ps(from)};
  }
  [[gnu::always_inline]] static RowAvx512 broadcast(const float* from) {
    return {_mm512_set1_ps(*from)};
  }
  [[gnu::always_inline]] void store(float* to) const { _mm512_storeu_ps(to, all); }
  [[gnu::always_inline]] RowAvx512 plus(const RowAvx512& right) const {
    return {_mm512_add_ps(all, right.all)};
  }
  [[gnu::always_inline]] RowAvx512 times(const RowAvx512& right) const {
    return {_mm512_mul_ps(all, right.all)};
  }
  // this = factor * b + this, rounded once
  [[gnu::always_inline]] void fuse(const RowAvx512& factor, const RowAvx512& b) {
    all = _mm512_fmadd_ps(factor.all, b.all, all);
  }
};

}  // namespace cambium::reference
