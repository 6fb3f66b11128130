// RMSNorm on the CPU: a row at a time, everything else of the row stays in the first-level cache.
#include "kernels/rms_norm.h"

#include <algorithm>

#include "reference/lane_math.h"
#include "reference/rounding.h"

namespace cambium::reference {
namespace {

// sum = x + residual, rounded to what the tensor stores.
void add_rows(const float* x, const float* residual, float* sum, int64_t count, DType storage) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) sum[i] = x[i] + residual[i];
  if (storage == DType::bf16) {
    for (int64_t i = 0; i < count; ++i) sum[i] = round_to_bf16(sum[i]);
  }
}

// y = gain * (x * rstd)
void scale_row(const float* x, const float* gain, float rstd, float* y, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) y[i] = gain[i] * (x[i] * rstd);
}

struct BackwardRow {
  const float* d_y = nullptr;
  const float* x = nullptr;
  const float* gain = nullptr;
  const float* d_residual = nullptr;  // null: none
  float* d_x = nullptr;
  float* d_gain = nullptr;
  float rstd = 0.0f;
  int64_t count = 0;
};

void backward_row(const BackwardRow& row) {
  const float *d_y = row.d_y, *x = row.x, *gain = row.gain, *d_residual = row.d_residual;
  float *d_x = row.d_x, *d_gain = row.d_gain;
  const float rstd = row.rstd;
  const float mean = dot3(gain, d_y, x, row.count) * rstd / static_cast<float>(row.count);
  if (d_residual == nullptr) {
#pragma GCC ivdep
    for (int64_t i = 0; i < row.count; ++i) {
      const float n = x[i] * rstd, d = d_y[i];
      d_gain[i] = __builtin_fmaf(d, n, d_gain[i]);
      d_x[i] = rstd * __builtin_fmaf(-n, mean, gain[i] * d);
    }
    return;
  }
#pragma GCC ivdep
  for (int64_t i = 0; i < row.count; ++i) {
    const float n = x[i] * rstd, d = d_y[i];
    d_gain[i] = __builtin_fmaf(d, n, d_gain[i]);
    d_x[i] = rstd * __builtin_fmaf(-n, mean, gain[i] * d) + d_residual[i];
  }
}

}  // namespace

void rms_norm(const RmsNormArgs& args, Workers& workers) {
  const int64_t T = args.x_TD[0], D = args.x_TD[1];
  const ReadF32 x(args.x_TD), residual(args.residual_TD), gain(args.gain_D);
  const WriteF32 sum(args.sum_TD), y(args.y_TD);
  const int64_t rows = rows_per_chunk(T, D);
  workers.parallel_for((T + rows - 1) / rows, [&](int64_t chunk, Scratch& scratch) {
    for (int64_t t = chunk * rows; t < std::min(T, (chunk + 1) * rows); ++t) {
      const float* normed = x.row(t);
      if (residual.data != nullptr) {
        float* added = sum.data != nullptr ? sum.row(t) : scratch.floats(0, D);
        add_rows(x.row(t), residual.row(t), added, D, args.x_TD.dtype);
        normed = added;
      } else if (sum.data != nullptr && sum.row(t) != x.row(t)) {
        std::copy(x.row(t), x.row(t) + D, sum.row(t));
      }
      const float mean_square = dot(normed, normed, D) / static_cast<float>(D);
      const float rstd = 1.0f / __builtin_sqrtf(mean_square + args.epsilon);
      args.rstd_T.pointer()[t] = rstd;
      scale_row(normed, gain.data, rstd, y.row(t), D);
    }
  });
}

void rms_norm_backward(const RmsNormBackwardArgs& args, Workers& workers) {
  const int64_t T = args.d_y_TD[0], D = args.d_y_TD[1], B = args.d_gain_leaf_BD[0];
  const ReadF32 d_y(args.d_y_TD), x(args.x_TD), gain(args.gain_D);
  const ReadF32 d_residual(args.d_residual_TD);
  const WriteF32 d_x(args.d_x_TD), d_gain(args.d_gain_leaf_BD);
  const int64_t blocks = std::max<int64_t>(1, rows_per_chunk(T, D) / args.block_tokens);
  workers.parallel_for((B + blocks - 1) / blocks, [&](int64_t chunk, Scratch&) {
    for (int64_t block = chunk * blocks; block < std::min(B, (chunk + 1) * blocks); ++block) {
      std::fill_n(d_gain.row(block), D, 0.0f);
      const int64_t end = std::min(T, (block + 1) * args.block_tokens);
      for (int64_t t = block * args.block_tokens; t < end; ++t) {
        backward_row({.d_y = d_y.row(t),
                      .x = x.row(t),
                      .gain = gain.data,
                      .d_residual = d_residual.data == nullptr ? nullptr : d_residual.row(t),
                      .d_x = d_x.row(t),
                      .d_gain = d_gain.row(block),
                      .rstd = args.rstd_T.pointer()[t],
                      .count = D});
      }
    }
  });
}

}  // namespace cambium::reference
