// Small products on panels that lie in the first-level cache: the inner loops of attention.
//
//   C[m, n] = (0 or C[m, n] or row_scale[m] C[m, n]) + sum_k A[m, k] B[k, n]
// Each element of C is one chain of fused multiply-adds from zero over k in ascending order, so a
// row of C depends on its own row of A alone, whatever the number of rows. Rows of B and C are
// contiguous in n; A has any strides.
#pragma once

#include "reference/lane_math.h"

namespace cambium::reference {

enum class PanelCombine { store, add, scale_add };

struct PanelProduct {
  const float* a = nullptr;
  int64_t a_row = 0, a_column = 0;  // strides of A
  const float* b = nullptr;
  int64_t b_row = 0;
  float* c = nullptr;
  int64_t c_row = 0;
  int64_t rows = 0, columns = 0, depth = 0;
  PanelCombine combine = PanelCombine::store;
  const float* row_scale = nullptr;  // scale_add
};

namespace panel_detail {

template <int kRows>
inline void tile(const PanelProduct& p, int64_t row, int64_t column) {
  Lanes sum[kRows] = {};
  const float* a = p.a + row * p.a_row;
  const float* b = p.b + column;
  for (int64_t k = 0; k < p.depth; ++k) {
    const Lanes b_lanes = load_lanes(b);
    for (int r = 0; r < kRows; ++r) {
      sum[r] = fma_lanes(broadcast(a[r * p.a_row]), b_lanes, sum[r]);
    }
    a += p.a_column;
    b += p.b_row;
  }
  for (int r = 0; r < kRows; ++r) {
    float* c = p.c + (row + r) * p.c_row + column;
    if (p.combine == PanelCombine::add) sum[r] = load_lanes(c) + sum[r];
    if (p.combine == PanelCombine::scale_add)
      sum[r] = load_lanes(c) * p.row_scale[row + r] + sum[r];
    store_lanes(c, sum[r]);
  }
}

// The columns that fill no register: the same chain, one element at a time.
inline void scalar_columns(const PanelProduct& p, int64_t first_column) {
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t column = first_column; column < p.columns; ++column) {
      float sum = 0.0f;
      for (int64_t k = 0; k < p.depth; ++k) {
        const float a = p.a[row * p.a_row + k * p.a_column];
        sum = __builtin_fmaf(a, p.b[k * p.b_row + column], sum);
      }
      float& c = p.c[row * p.c_row + column];
      if (p.combine == PanelCombine::add) sum = c + sum;
      if (p.combine == PanelCombine::scale_add) sum = c * p.row_scale[row] + sum;
      c = sum;
    }
  }
}

inline void half_columns(const PanelProduct& p, int64_t column) {
  int64_t row = 0;
  for (; row + 4 <= p.rows; row += 4) tile<4>(p, row, column);
  if (p.rows - row == 3) tile<3>(p, row, column);
  if (p.rows - row == 2) tile<2>(p, row, column);
  if (p.rows - row == 1) tile<1>(p, row, column);
}

}  // namespace panel_detail

void panel_product(const PanelProduct& p);

// to_NM[n, m] = from_MN[m, n]; `to` rows are to_row apart, `from` rows from_row.
struct PanelTranspose {
  const float* from = nullptr;
  int64_t from_row = 0;
  float* to = nullptr;
  int64_t to_row = 0;
  int64_t rows = 0, columns = 0;  // of `from`
};

namespace panel_detail {

inline void transpose_8x8(const float* from, int64_t from_row, float* to, int64_t to_row) {
  __m256 row[8], pair[8], quad[8];
  for (int r = 0; r < 8; ++r) row[r] = _mm256_loadu_ps(from + r * from_row);
  for (int r = 0; r < 8; r += 2) {
    pair[r] = _mm256_unpacklo_ps(row[r], row[r + 1]);
    pair[r + 1] = _mm256_unpackhi_ps(row[r], row[r + 1]);
  }
  for (int r = 0; r < 8; r += 4) {
    quad[r] = _mm256_shuffle_ps(pair[r], pair[r + 2], 0x44);
    quad[r + 1] = _mm256_shuffle_ps(pair[r], pair[r + 2], 0xee);
    quad[r + 2] = _mm256_shuffle_ps(pair[r + 1], pair[r + 3], 0x44);
    quad[r + 3] = _mm256_shuffle_ps(pair[r + 1], pair[r + 3], 0xee);
  }
  for (int r = 0; r < 4; ++r) {
    _mm256_storeu_ps(to + r * to_row, _mm256_permute2f128_ps(quad[r], quad[r + 4], 0x20));
    _mm256_storeu_ps(to + (r + 4) * to_row, _mm256_permute2f128_ps(quad[r], quad[r + 4], 0x31));
  }
}

}  // namespace panel_detail

inline void panel_transpose(const PanelTranspose& p) {
  const int64_t whole_rows = p.rows / 8 * 8, whole_columns = p.columns / 8 * 8;
  for (int64_t row = 0; row < whole_rows; row += 8) {
    for (int64_t column = 0; column < whole_columns; column += 8) {
      panel_detail::transpose_8x8(p.from + row * p.from_row + column, p.from_row,
                                  p.to + column * p.to_row + row, p.to_row);
    }
  }
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t first = row < whole_rows ? whole_columns : 0;
    for (int64_t column = first; column < p.columns; ++column) {
      p.to[column * p.to_row + row] = p.from[row * p.from_row + column];
    }
  }
}

}  // namespace cambium::reference
