#include "kernels/combine.h"

#include <cstring>
#include <vector>

#include "reference/chunks.h"
#include "reference/rounding.h"

namespace cambium::reference {

namespace {

constexpr int64_t kCombineElements = 16384;  // of the output, per chunk
constexpr int64_t kTile = 64;                // columns held in registers while rows are added

// out[0, width) = residual + ((rows[0] + rows[1]) + ...), all from `column` on. Reads everything
// before it writes, so `out` may be the residual.
template <int64_t kWidth>
void combine_tile(const float* const* rows, int64_t row_count, const float* residual,
                  int64_t column, float* out) {
  float sum[kWidth];
  if (row_count == 0) {
    for (int64_t i = 0; i < kWidth; ++i) sum[i] = residual == nullptr ? 0.0f : residual[column + i];
  } else {
    for (int64_t i = 0; i < kWidth; ++i) sum[i] = rows[0][column + i];
    for (int64_t r = 1; r < row_count; ++r) {
      for (int64_t i = 0; i < kWidth; ++i) sum[i] += rows[r][column + i];
    }
    if (residual != nullptr) {
      for (int64_t i = 0; i < kWidth; ++i) sum[i] = residual[column + i] + sum[i];
    }
  }
  std::memcpy(out + column, sum, sizeof(sum));
}

}  // namespace

void combine_rows(const CombineRowsArgs& a, Workers& workers) {
  const int64_t T = a.row_index_TK[0], K = a.row_index_TK[1], D = a.out_TD[1], R = a.y_RD[0];
  const ReadF32 y_RD(a.y_RD), residual_TD(a.residual_TD);
  WriteF32 out_TD(a.out_TD);
  for_ranges(workers, T, items_per_chunk(D, kCombineElements), [&](int64_t begin, int64_t end) {
    std::vector<const float*> rows(static_cast<size_t>(K));
    for (int64_t t = begin; t < end; ++t) {
      const int32_t* row_index = a.row_index_TK.pointer() + t * a.row_index_TK.row_stride;
      int64_t row_count = 0;
      for (int64_t k = 0; k < K; ++k) {
        CHECK(row_index[k] >= -1 && row_index[k] < R);
        if (row_index[k] != -1) rows[row_count++] = y_RD.row(row_index[k]);
      }
      const float* residual = residual_TD.data == nullptr ? nullptr : residual_TD.row(t);
      int64_t column = 0;
      for (; column + kTile <= D; column += kTile) {
        combine_tile<kTile>(rows.data(), row_count, residual, column, out_TD.row(t));
      }
      for (; column < D; ++column) {
        combine_tile<1>(rows.data(), row_count, residual, column, out_TD.row(t));
      }
    }
  });
}

}  // namespace cambium::reference
