// The gate of a shared expert on the CPU: a token at a time, the gradient of w by block.
#include "kernels/token_gate.h"

#include <algorithm>

#include "reference/lane_math.h"
#include "reference/rounding.h"
#include "reference/swiglu_row.h"

namespace cambium::reference {
namespace {

struct GateToken {
  const float* x = nullptr;
  const float* w = nullptr;
  const float* h = nullptr;
  const float* d_y = nullptr;
  const float* d_residual = nullptr;  // null: none
  float* d_h = nullptr;
  float* y = nullptr;
  float* d_x = nullptr;
  float* d_w = nullptr;
  float gate = 0.0f;
};

// Returns d_logit. Outputs may replace inputs of the same element.
float backward_token(const GateToken& t, int64_t D, int64_t F) {
  const float gate = t.gate;
  const float d_logit = gate * (1.0f - gate) * dot(t.d_y, t.h, F);
#pragma GCC ivdep
  for (int64_t i = 0; i < F; ++i) t.d_h[i] = gate * t.d_y[i];
#pragma GCC ivdep
  for (int64_t i = 0; i < F; ++i) t.y[i] = gate * t.h[i];
  for (int64_t i = 0; i < D; ++i) {
    const float d_x = d_logit * t.w[i];
    t.d_w[i] = __builtin_fmaf(d_logit, t.x[i], t.d_w[i]);
    t.d_x[i] = t.d_residual == nullptr ? d_x : t.d_residual[i] + d_x;
  }
  return d_logit;
}

}  // namespace

void token_gate(const TokenGateArgs& args, Workers& workers) {
  const int64_t T = args.x_TD[0], D = args.x_TD[1], F = args.h_TF[1];
  const ReadF32 x(args.x_TD), w(args.w_D), h(args.h_TF);
  const WriteF32 y(args.y_TF);
  const int64_t rows = rows_per_chunk(T, D + F);
  workers.parallel_for((T + rows - 1) / rows, [&](int64_t chunk, Scratch&) {
    for (int64_t t = chunk * rows; t < std::min(T, (chunk + 1) * rows); ++t) {
      const float gate = sigmoid(dot(x.row(t), w.data, D));
      args.gate_T.pointer()[t] = gate;
      const float* from = h.row(t);
      float* to = y.row(t);
#pragma GCC ivdep
      for (int64_t i = 0; i < F; ++i) to[i] = gate * from[i];
    }
  });
}

void token_gate_backward(const TokenGateBackwardArgs& args, Workers& workers) {
  const int64_t T = args.x_TD[0], D = args.x_TD[1], F = args.h_TF[1], B = args.d_w_leaf_BD[0];
  const ReadF32 x(args.x_TD), w(args.w_D), h(args.h_TF), d_y(args.d_y_TF);
  const ReadF32 d_residual(args.d_residual_TD);
  const WriteF32 d_h(args.d_h_TF), y(args.y_TF), d_x(args.d_x_TD), d_w(args.d_w_leaf_BD);
  const int64_t blocks = std::max<int64_t>(1, rows_per_chunk(T, D + F) / args.block_tokens);
  workers.parallel_for((B + blocks - 1) / blocks, [&](int64_t chunk, Scratch&) {
    for (int64_t block = chunk * blocks; block < std::min(B, (chunk + 1) * blocks); ++block) {
      std::fill_n(d_w.row(block), D, 0.0f);
      const int64_t end = std::min(T, (block + 1) * args.block_tokens);
      for (int64_t t = block * args.block_tokens; t < end; ++t) {
        args.d_logit_T.pointer()[t] =
            backward_token({.x = x.row(t),
                            .w = w.data,
                            .h = h.row(t),
                            .d_y = d_y.row(t),
                            .d_residual = d_residual.data == nullptr ? nullptr : d_residual.row(t),
                            .d_h = d_h.row(t),
                            .y = y.row(t),
                            .d_x = d_x.row(t),
                            .d_w = d_w.row(block),
                            .gate = args.gate_T.pointer()[t]},
                           D, F);
      }
    }
  });
}

}  // namespace cambium::reference
