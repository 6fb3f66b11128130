// Query/key normalisation (optional) and rotary position embedding, on views into a fused qkv.
//
//   n = gain * (x * rstd), rstd = 1 / sqrt(mean(x^2) + epsilon)
//     per_head: over the Q elements of each head, gain [Q]        (Qwen3)
//     full_width: over all H Q (or G Q) elements, gain [H Q]      (OLMoE)
//     none: n = x                                                 (Mixtral)
//   NeoX halves (HF rotate_half), c and s of the token's position, i < Q/2:
//     out_i = n_i c_i - n_{i+Q/2} s_i,   out_{i+Q/2} = n_{i+Q/2} c_i + n_i s_i
// Rotary embedding: arXiv 2104.09864. Backward rotates by the opposite angle, then the RMSNorm
// gradient of kernels/rms_norm.h; gain gradients are one row per block, a sum in an order that is
// the block's own: tokens in position order, heads in order within a token, on the CPU; see
// kernels/qk_norm_rope.cu for the GPU's.
// Napkin: 8 T (H + G) Q bytes forward, 12 backward; memory bound.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels/op.h"
#include "src/base/fmath.h"

namespace cambium {

enum class QkNormKind : uint8_t { none, per_head, full_width };

struct QkNormRopeArgs {
  In<Real> q_THQ = {};  // rows may be strided
  In<Real> k_TGQ = {};
  In<Real> q_gain = {};  // none: absent; per_head: [Q]; full_width: [H Q]
  In<Real> k_gain = {};  // none: absent; per_head: [Q]; full_width: [G Q]
  In<float> cos_SC;      // a row per position, C = Q / 2 columns; made by rope_table
  In<float> sin_SC;
  In<int32_t> position_T;
  Out<Real> q_out_THQ;
  Out<Real> k_out_TGQ;
  Out<float> q_rstd = {};  // none: absent; per_head: [T, H]; full_width: [T, 1]
  Out<float> k_rstd = {};  // none: absent; per_head: [T, G]; full_width: [T, 1]
  float epsilon = 1e-6f;
  QkNormKind kind = QkNormKind::none;
};

struct QkNormRopeBackwardArgs {
  In<Real> d_q_out_THQ;
  In<Real> d_k_out_TGQ;
  In<Real> q_THQ = {};  // the inputs of the forward pass; none: absent
  In<Real> k_TGQ = {};
  In<Real> q_gain = {};
  In<Real> k_gain = {};
  In<float> cos_SC;
  In<float> sin_SC;
  In<int32_t> position_T;
  In<float> q_rstd = {};
  In<float> k_rstd = {};
  Out<Real> d_q_THQ;  // rows may be strided; may be the same memory as d_q_out_THQ
  Out<Real> d_k_TGQ;
  Out<float> d_q_gain_leaf_BN = {};  // none: absent; B = ceil(T / block_tokens), N = gain elements
  Out<float> d_k_gain_leaf_BN = {};
  int64_t block_tokens = 0;  // not used by kind `none`
  QkNormKind kind = QkNormKind::none;
};

namespace qk_norm_rope_detail {

// Elements of the gain, and columns of rstd, for `heads` heads of `head_dim`.
inline int64_t gain_elements(QkNormKind kind, int64_t heads, int64_t head_dim) {
  return kind == QkNormKind::full_width ? heads * head_dim : head_dim;
}
inline int64_t rstd_columns(QkNormKind kind, int64_t heads) {
  return kind == QkNormKind::full_width ? 1 : heads;
}

template <class Args>
void check_shared(const char* op, const Args& a, int64_t T, int64_t H, int64_t G, int64_t Q) {
  CHECK_EQ(Q % 2, 0);
  check_shape(op, "cos_SC", a.cos_SC, Shape(a.cos_SC[0], Q / 2));
  check_shape(op, "sin_SC", a.sin_SC, Shape(a.cos_SC[0], Q / 2));
  check_shape(op, "position_T", a.position_T, Shape(T));
  if (a.kind == QkNormKind::none) {
    CHECK(a.q_gain.empty() && a.k_gain.empty() && a.q_rstd.empty() && a.k_rstd.empty());
    return;
  }
  check_shape(op, "q_gain", a.q_gain, Shape(gain_elements(a.kind, H, Q)));
  check_shape(op, "k_gain", a.k_gain, Shape(gain_elements(a.kind, G, Q)));
  check_shape(op, "q_rstd", a.q_rstd, Shape(T, rstd_columns(a.kind, H)));
  check_shape(op, "k_rstd", a.k_rstd, Shape(T, rstd_columns(a.kind, G)));
}

}  // namespace qk_norm_rope_detail

inline void check_args(const QkNormRopeArgs& a) {
  const char* op = "qk_norm_rope";
  const int64_t T = a.q_THQ[0], H = a.q_THQ[1], Q = a.q_THQ[2], G = a.k_TGQ[1];
  check_shape(op, "k_TGQ", a.k_TGQ, Shape(T, G, Q));
  check_shape(op, "q_out_THQ", a.q_out_THQ, Shape(T, H, Q));
  check_shape(op, "k_out_TGQ", a.k_out_TGQ, Shape(T, G, Q));
  qk_norm_rope_detail::check_shared(op, a, T, H, G, Q);
}

inline void check_args(const QkNormRopeBackwardArgs& a) {
  const char* op = "qk_norm_rope_backward";
  const int64_t T = a.d_q_out_THQ[0], H = a.d_q_out_THQ[1], Q = a.d_q_out_THQ[2];
  const int64_t G = a.d_k_out_TGQ[1];
  check_shape(op, "d_k_out_TGQ", a.d_k_out_TGQ, Shape(T, G, Q));
  check_shape(op, "d_q_THQ", a.d_q_THQ, Shape(T, H, Q));
  check_shape(op, "d_k_TGQ", a.d_k_TGQ, Shape(T, G, Q));
  qk_norm_rope_detail::check_shared(op, a, T, H, G, Q);
  if (a.kind == QkNormKind::none) return;
  check_shape(op, "q_THQ", a.q_THQ, Shape(T, H, Q));
  check_shape(op, "k_TGQ", a.k_TGQ, Shape(T, G, Q));
  CHECK_GE(a.block_tokens, 1);
  const int64_t B = (T + a.block_tokens - 1) / a.block_tokens;
  check_shape(op, "d_q_gain_leaf_BN", a.d_q_gain_leaf_BN, Shape(B, a.q_gain[0]));
  check_shape(op, "d_k_gain_leaf_BN", a.d_k_gain_leaf_BN, Shape(B, a.k_gain[0]));
}

inline Cost cost(const QkNormRopeArgs& a) {
  const int64_t T = a.q_THQ[0], H = a.q_THQ[1], Q = a.q_THQ[2], G = a.k_TGQ[1];
  const int64_t flops = (a.kind == QkNormKind::none ? 3 : 7) * T * (H + G) * Q;
  const int64_t bytes = 2 * dtype_bytes(a.q_THQ.dtype) * T * (H + G) * Q + 8 * T * Q;
  return {"qk_norm_rope", {T, H, G, Q}, flops, bytes, 0};
}

inline Cost cost(const QkNormRopeBackwardArgs& a) {
  const int64_t T = a.d_q_out_THQ[0], H = a.d_q_out_THQ[1], Q = a.d_q_out_THQ[2];
  const int64_t G = a.d_k_out_TGQ[1], passes = a.kind == QkNormKind::none ? 2 : 3;
  const int64_t flops = (a.kind == QkNormKind::none ? 3 : 12) * T * (H + G) * Q;
  const int64_t bytes = passes * dtype_bytes(a.d_q_THQ.dtype) * T * (H + G) * Q + 8 * T * Q;
  return {"qk_norm_rope_backward", {T, H, G, Q}, flops, bytes, 0};
}

template <class Visitor>
void visit_views(const QkNormRopeArgs& a, Visitor&& visit) {
  visit("q_THQ", a.q_THQ);
  visit("k_TGQ", a.k_TGQ);
  visit("q_gain", a.q_gain);
  visit("k_gain", a.k_gain);
  visit("cos_SC", a.cos_SC);
  visit("sin_SC", a.sin_SC);
  visit("position_T", a.position_T);
  visit("q_out_THQ", a.q_out_THQ);
  visit("k_out_TGQ", a.k_out_TGQ);
  visit("q_rstd", a.q_rstd);
  visit("k_rstd", a.k_rstd);
}

template <class Visitor>
void visit_views(const QkNormRopeBackwardArgs& a, Visitor&& visit) {
  visit("d_q_out_THQ", a.d_q_out_THQ);
  visit("d_k_out_TGQ", a.d_k_out_TGQ);
  visit("q_THQ", a.q_THQ);
  visit("k_TGQ", a.k_TGQ);
  visit("q_gain", a.q_gain);
  visit("k_gain", a.k_gain);
  visit("cos_SC", a.cos_SC);
  visit("sin_SC", a.sin_SC);
  visit("position_T", a.position_T);
  visit("q_rstd", a.q_rstd);
  visit("k_rstd", a.k_rstd);
  visit("d_q_THQ", a.d_q_THQ);
  visit("d_k_TGQ", a.d_k_TGQ);
  visit("d_q_gain_leaf_BN", a.d_q_gain_leaf_BN);
  visit("d_k_gain_leaf_BN", a.d_k_gain_leaf_BN);
}

// Host tables for positions 0..positions-1, `positions` rows of head_dim / 2 columns each. The
// order of fp32 roundings is that of HF: theta^(2i/Q), its reciprocal, times position, cos and sin;
// each function is computed in double and rounded once. With `factor` > 1 angles are divided by it,
// those of YaRN (arXiv 2309.00071) only as far as pairs turn less than beta_fast times over
// `original_positions`, and wholly below beta_slow turns; cos and sin are then times `attention`.
struct RopeTableArgs {
  double theta = 10000.0;
  int64_t head_dim = 0;
  int64_t positions = 0;
  double factor = 1;
  int64_t original_positions = 0;  // 0 = every angle is divided: linear interpolation
  double beta_fast = 32, beta_slow = 1;
  double attention = 1;
};

// Which part of a pair's angle is kept undivided.
inline float rope_kept_part(const RopeTableArgs& args, int64_t column) {
  if (args.original_positions == 0) return 0;
  constexpr double kTurn = 6.283185307179586;  // 2 pi
  const auto column_of = [&](double turns) {
    const double pairs = static_cast<double>(args.original_positions) / (turns * kTurn);
    return static_cast<double>(args.head_dim) * fmath::log(pairs) / (2 * fmath::log(args.theta));
  };
  const double last = static_cast<double>(args.head_dim - 1);
  const auto low = static_cast<float>(std::max(__builtin_floor(column_of(args.beta_fast)), 0.0));
  auto high = static_cast<float>(std::min(__builtin_ceil(column_of(args.beta_slow)), last));
  if (low == high) high += 0.001f;  // as HF: no division by zero
  const float ramp = (static_cast<float>(column) - low) / (high - low);
  return 1.0f - std::clamp(ramp, 0.0f, 1.0f);
}

inline void rope_table(const RopeTableArgs& args, std::vector<float>& cos_SC,
                       std::vector<float>& sin_SC) {
  const int64_t C = args.head_dim / 2;
  cos_SC.resize(static_cast<size_t>(args.positions * C));
  sin_SC.resize(static_cast<size_t>(args.positions * C));
  for (int64_t column = 0; column < C; ++column) {
    const float exponent = static_cast<float>(2 * column) / static_cast<float>(args.head_dim);
    const auto period = static_cast<float>(fmath::pow(args.theta, exponent));
    float inverse = 1.0f / period;
    if (args.factor != 1) {
      const float divided = 1.0f / (static_cast<float>(args.factor) * period);
      const float kept = rope_kept_part(args, column);
      inverse = divided * (1.0f - kept) + inverse * kept;
    }
    for (int64_t position = 0; position < args.positions; ++position) {
      const float angle = inverse * static_cast<float>(position);
      const auto attention = static_cast<float>(args.attention);
      cos_SC[position * C + column] = static_cast<float>(fmath::cos(angle)) * attention;
      sin_SC[position * C + column] = static_cast<float>(fmath::sin(angle)) * attention;
    }
  }
}

namespace reference {
void qk_norm_rope(const QkNormRopeArgs& args, Workers& workers);
void qk_norm_rope_backward(const QkNormRopeBackwardArgs& args, Workers& workers);
}  // namespace reference
namespace cuda {
void qk_norm_rope(const QkNormRopeArgs& args, Stream& stream);
void qk_norm_rope_backward(const QkNormRopeBackwardArgs& args, Stream& stream);
}  // namespace cuda

inline void qk_norm_rope(const QkNormRopeArgs& args, OpCall call) {
  execute(args, call, reference::qk_norm_rope, kHasCuda ? cuda::qk_norm_rope : nullptr);
}
inline void qk_norm_rope_backward(const QkNormRopeBackwardArgs& args, OpCall call) {
  execute(args, call, reference::qk_norm_rope_backward,
          kHasCuda ? cuda::qk_norm_rope_backward : nullptr);
}

}  // namespace cambium
