// Query/key normalisation and rotary embedding on the CPU, a token at a time. Queries and keys are
// the same computation on different widths: a HeadTensor.
#include "kernels/qk_norm_rope.h"

#include <algorithm>

#include "reference/lane_math.h"
#include "reference/rounding.h"

namespace cambium::reference {
namespace {

// What one token's heads need. A norm group is the span over which one rstd is taken.
struct HeadShape {
  int64_t heads = 0;
  int64_t head_dim = 0;
  int64_t norm_groups = 0;  // per_head: heads; full_width: 1; none: 0
  int64_t width() const { return heads * head_dim; }
  int64_t group_width() const { return width() / norm_groups; }
};

HeadShape head_shape(QkNormKind kind, int64_t heads, int64_t head_dim) {
  int64_t groups = 0;
  if (kind == QkNormKind::per_head) groups = heads;
  if (kind == QkNormKind::full_width) groups = 1;
  return {heads, head_dim, groups};
}

// cos and sin of one token's position, head_dim / 2 columns each.
struct TokenAngle {
  const float* cos = nullptr;
  const float* sin = nullptr;
};

// out = n rotated by the token's angle, head by head; `out` is not `n`.
void rotate(const HeadShape& shape, TokenAngle angle, const float* __restrict n,
            float* __restrict out) {
  const int64_t half = shape.head_dim / 2;
  for (int64_t head = 0; head < shape.heads; ++head) {
    for (int64_t i = 0; i < half; ++i) {
      out[i] = n[i] * angle.cos[i] - n[i + half] * angle.sin[i];
      out[i + half] = n[i + half] * angle.cos[i] + n[i] * angle.sin[i];
    }
    n += shape.head_dim;
    out += shape.head_dim;
  }
}

// The transpose of `rotate`: by the opposite angle.
void rotate_back(const HeadShape& shape, TokenAngle angle, const float* __restrict d_out,
                 float* __restrict d_n) {
  const int64_t half = shape.head_dim / 2;
  for (int64_t head = 0; head < shape.heads; ++head) {
    for (int64_t i = 0; i < half; ++i) {
      d_n[i] = d_out[i] * angle.cos[i] + d_out[i + half] * angle.sin[i];
      d_n[i + half] = d_out[i + half] * angle.cos[i] - d_out[i] * angle.sin[i];
    }
    d_n += shape.head_dim;
    d_out += shape.head_dim;
  }
}

// n = gain * (x * rstd) of one token, and its rstds.
void norm_token(const HeadShape& shape, float epsilon, const float* x, const float* gain,
                float* __restrict n, float* rstd) {
  const int64_t width = shape.group_width();
  for (int64_t group = 0; group < shape.norm_groups; ++group) {
    const float mean_square = dot(x, x, width) / static_cast<float>(width);
    const float scale = 1.0f / __builtin_sqrtf(mean_square + epsilon);
    rstd[group] = scale;
    for (int64_t i = 0; i < width; ++i) n[i] = gain[i] * (x[i] * scale);
    x += width;
    n += width;
  }
}

// d_x from d_n, adding to the block's d_gain.
void norm_token_backward(const HeadShape& shape, const float* __restrict x,
                         const float* __restrict gain, const float* rstd,
                         const float* __restrict d_n, float* __restrict d_x,
                         float* __restrict d_gain) {
  const int64_t width = shape.group_width();
  for (int64_t group = 0; group < shape.norm_groups; ++group) {
    const float scale = rstd[group];
    const float mean = dot3(gain, d_n, x, width) * scale / static_cast<float>(width);
    for (int64_t i = 0; i < width; ++i) {
      const float n = x[i] * scale;
      d_gain[i] = __builtin_fmaf(d_n[i], n, d_gain[i]);
      d_x[i] = scale * __builtin_fmaf(-n, mean, gain[i] * d_n[i]);
    }
    x += width;
    d_n += width;
    d_x += width;
  }
}

// The forward pass of queries, or of keys.
struct HeadForward {
  HeadForward(In<Real> x_view, In<Real> gain_view, Out<Real> out_view, Out<float> rstd_view,
              QkNormKind kind)
      : shape(head_shape(kind, x_view[1], x_view[2])),
        x(x_view),
        gain(gain_view),
        out(out_view),
        rstd(rstd_view) {}
  HeadShape shape;
  ReadF32 x, gain;
  WriteF32 out, rstd;

  void run(int64_t t, TokenAngle angle, float epsilon, Scratch& scratch) const {
    float* n = scratch.floats(0, shape.width());
    if (shape.norm_groups == 0) {
      std::copy(x.row(t), x.row(t) + shape.width(), n);
    } else {
      norm_token(shape, epsilon, x.row(t), gain.data, n, rstd.row(t));
    }
    rotate(shape, angle, n, out.row(t));
  }
};

// The backward pass of queries, or of keys.
struct HeadBackward {
  HeadBackward(In<Real> d_out_view, In<Real> x_view, In<Real> gain_view, In<float> rstd_view,
               Out<Real> d_x_view, Out<float> d_gain_view, QkNormKind kind)
      : shape(head_shape(kind, d_out_view[1], d_out_view[2])),
        d_out(d_out_view),
        x(x_view),
        gain(gain_view),
        rstd(rstd_view),
        d_x(d_x_view),
        d_gain(d_gain_view) {}
  HeadShape shape;
  ReadF32 d_out, x, gain, rstd;
  WriteF32 d_x, d_gain;

  void begin_block(int64_t block) const {
    if (shape.norm_groups > 0) std::fill_n(d_gain.row(block), shape.group_width(), 0.0f);
  }
  void run(int64_t t, int64_t block, TokenAngle angle, Scratch& scratch) const {
    float* d_n = scratch.floats(0, shape.width());
    rotate_back(shape, angle, d_out.row(t), d_n);
    if (shape.norm_groups == 0) {
      std::copy(d_n, d_n + shape.width(), d_x.row(t));
    } else {
      norm_token_backward(shape, x.row(t), gain.data, rstd.row(t), d_n, d_x.row(t),
                          d_gain.row(block));
    }
  }
};

template <class Args>
TokenAngle token_angle(const Args& args, int64_t t) {
  const int64_t position = args.position_T.pointer()[t];
  CHECK(position >= 0 && position < args.cos_SC[0]);
  return {args.cos_SC.pointer() + position * args.cos_SC.row_stride,
          args.sin_SC.pointer() + position * args.sin_SC.row_stride};
}

}  // namespace

void qk_norm_rope(const QkNormRopeArgs& args, Workers& workers) {
  const int64_t T = args.q_THQ[0];
  const HeadForward q(args.q_THQ, args.q_gain, args.q_out_THQ, args.q_rstd, args.kind);
  const HeadForward k(args.k_TGQ, args.k_gain, args.k_out_TGQ, args.k_rstd, args.kind);
  const int64_t rows = rows_per_chunk(T, q.shape.width() + k.shape.width());
  workers.parallel_for((T + rows - 1) / rows, [&](int64_t chunk, Scratch& scratch) {
    for (int64_t t = chunk * rows; t < std::min(T, (chunk + 1) * rows); ++t) {
      const TokenAngle angle = token_angle(args, t);
      q.run(t, angle, args.epsilon, scratch);
      k.run(t, angle, args.epsilon, scratch);
    }
  });
}

void qk_norm_rope_backward(const QkNormRopeBackwardArgs& args, Workers& workers) {
  const int64_t T = args.d_q_out_THQ[0];
  const HeadBackward q(args.d_q_out_THQ, args.q_THQ, args.q_gain, args.q_rstd, args.d_q_THQ,
                       args.d_q_gain_leaf_BN, args.kind);
  const HeadBackward k(args.d_k_out_TGQ, args.k_TGQ, args.k_gain, args.k_rstd, args.d_k_TGQ,
                       args.d_k_gain_leaf_BN, args.kind);
  const int64_t rows = rows_per_chunk(T, q.shape.width() + k.shape.width());
  const int64_t block_tokens = args.kind == QkNormKind::none ? rows : args.block_tokens;
  const int64_t B = (T + block_tokens - 1) / block_tokens;
  const int64_t blocks = std::max<int64_t>(1, rows / block_tokens);
  workers.parallel_for((B + blocks - 1) / blocks, [&](int64_t chunk, Scratch& scratch) {
    for (int64_t block = chunk * blocks; block < std::min(B, (chunk + 1) * blocks); ++block) {
      q.begin_block(block);
      k.begin_block(block);
      for (int64_t t = block * block_tokens; t < std::min(T, (block + 1) * block_tokens); ++t) {
        const TokenAngle angle = token_angle(args, t);
        q.run(t, block, angle, scratch);
        k.run(t, block, angle, scratch);
      }
    }
  });
}

}  // namespace cambium::reference
