// Stage 1, attention: norm, qkv, q/k norm + RoPE, attention, out + residual; and its backward.
#include <tuple>

#include "kernels/attention.h"
#include "kernels/linear.h"
#include "kernels/qk_norm_rope.h"
#include "kernels/rms_norm.h"
#include "src/model/context.h"
#include "src/model/layer_tools.h"

namespace cambium {

namespace {

// A part of the fused qkv buffer: `heads` heads of Q from column `first`.
template <class ViewType>
ViewType qkv_part(const LayerContext& c, const Buffer& qkv_TC, const Extents& x, int64_t first,
                  int64_t heads) {
  auto* start = qkv_TC.as<std::byte>() + first * dtype_bytes(c.dtype());
  return ViewType(start, c.dtype(), Shape(x.T, heads, x.Q), x.C);
}

QkNormKind qk_norm_kind(QkNorm norm) {
  switch (norm) {
    case QkNorm::none:
      return QkNormKind::none;
    case QkNorm::per_head:
      return QkNormKind::per_head;
    case QkNorm::full_width:
      return QkNormKind::full_width;
  }
  return QkNormKind::none;
}

// 1 / sqrt(Q): the softmax temperature of attention.
float attention_scale(int64_t head_dim) {
  return static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(head_dim)));
}

// NOTE: cuDNN makes a graph per shape: lengths that grow token by token are our kernel's.
AttentionKernel attention_kernel(const LayerContext& c, const MicroBatch& batch) {
  const Config& config = c.rank.config;
  return batch.sequence_length == config.train.sequence_length ? config.numerics.attention
                                                               : AttentionKernel::own;
}

// Keys and values of this rank, and those that are kept for attention: with cp > 1 and no fast ring
// whole sequences.
KeyRows own_keys(const LayerContext& c, const Extents& x, const LayerState& s) {
  return {c.in(s.k_TGQ, Shape(x.T, x.G, x.Q)),
          qkv_part<In<Real>>(c, s.qkv_TC, x, (x.H + x.G) * x.Q, x.G)};
}
KeyRows attention_keys(const LayerContext& c, const Extents& x, const LayerState& s) {
  if (s.k_SC.empty()) return own_keys(c, x, s);
  const Shape whole(x.T * c.rank.mesh.cp, x.G, x.Q);
  return {c.in(s.k_SC, whole), c.in(s.v_SC, whole)};
}

void bias_forward(const LayerContext& c, const ParamTensor* bias, const Buffer& y_TN, Shape shape) {
  if (bias == nullptr) return;
  add_bias({.bias_N = gain(c, bias), .y_TN = {y_TN.data(), c.dtype(), shape}}, c.rank.ops);
}

void attn_norm_forward(const LayerContext& c, int64_t tokens, LayerState& s) {
  const Extents x(c, tokens);
  s.attn_rstd_T = floats(c, x.T, "attention norm rstd");
  s.normed_TD = c.real(Shape(x.T, x.D), "normed input");
  rms_norm({.x_TD = c.in(s.x_TD, Shape(x.T, x.D)),
            .gain_D = gain(c, c.tensors.attn_norm),
            .y_TD = c.out(s.normed_TD, Shape(x.T, x.D)),
            .rstd_T = out_f32(s.attn_rstd_T, Shape(x.T)),
            .epsilon = static_cast<float>(c.model.norm_epsilon)},
           c.rank.ops);
}

void attention_forward(const LayerContext& c, const MicroBatch& batch, LayerState& s) {
  const Extents x(c, batch.tokens);
  OpContext& ops = c.rank.ops;
  s.qkv_TC = c.real(Shape(x.T, x.C), "qkv");
  linear({.x_TK = c.in(s.normed_TD, Shape(x.T, x.D)),
          .w_NK = c.dense.weight(*c.tensors.qkv, Shape(x.C, x.D)),
          .y_TN = c.out(s.qkv_TC, Shape(x.T, x.C))},
         ops);
  bias_forward(c, c.tensors.qkv_bias, s.qkv_TC, Shape(x.T, x.C));
  s.q_THQ = c.real(Shape(x.T, x.H, x.Q), "q");
  s.k_TGQ = c.real(Shape(x.T, x.G, x.Q), "k");
  const bool normed = c.model.qk_norm != QkNorm::none;
  const bool per_head = c.model.qk_norm == QkNorm::per_head;
  s.q_rstd = floats(c, x.T * (per_head ? x.H : 1), "q rstd");
  s.k_rstd = floats(c, x.T * (per_head ? x.G : 1), "k rstd");
  qk_norm_rope({.q_THQ = qkv_part<In<Real>>(c, s.qkv_TC, x, 0, x.H),
                .k_TGQ = qkv_part<In<Real>>(c, s.qkv_TC, x, x.H * x.Q, x.G),
                .q_gain = gain(c, c.tensors.q_norm),
                .k_gain = gain(c, c.tensors.k_norm),
                .cos_SC = c.cos_SC,
                .sin_SC = c.sin_SC,
                .position_T = in_i32(batch.position_T, Shape(x.T)),
                .q_out_THQ = c.out(s.q_THQ, Shape(x.T, x.H, x.Q)),
                .k_out_TGQ = c.out(s.k_TGQ, Shape(x.T, x.G, x.Q)),
                .q_rstd = normed ? out_f32(s.q_rstd, Shape(x.T, per_head ? x.H : 1)) : Out<float>(),
                .k_rstd = normed ? out_f32(s.k_rstd, Shape(x.T, per_head ? x.G : 1)) : Out<float>(),
                .epsilon = static_cast<float>(c.model.norm_epsilon),
                .kind = qk_norm_kind(c.model.qk_norm)},
               ops);
  s.o_TC = c.real(Shape(x.T, x.H, x.Q), "attention output");
  s.lse_TH = floats(c, x.T * x.H, "attention lse");
  AttentionArgs args{.q_THQ = c.in(s.q_THQ, Shape(x.T, x.H, x.Q)),
                     .document_start_T = batch.document_start_T.empty()
                                             ? In<int32_t>()
                                             : in_i32(batch.document_start_T, Shape(x.T)),
                     .o_THQ = c.out(s.o_TC, Shape(x.T, x.H, x.Q)),
                     .lse_TH = out_f32(s.lse_TH, Shape(x.T, x.H)),
                     .sequence_length = batch.sequence_length,
                     .block_tokens = c.rank.config.numerics.block_tokens,
                     .scale = attention_scale(x.Q),
                     .kernel = attention_kernel(c, batch),
                     .share = context_share(c.rank)};
  const KeyRows own = own_keys(c, x, s);
  if (attends_by_parts(c)) return ring_attention(c, batch, own, args);
  if (c.rank.mesh.cp > 1) {
    std::tie(s.k_SC, s.v_SC) = gather_context(c, batch, own);
  }
  const KeyRows keys = attention_keys(c, x, s);
  args.k_TGQ = keys.k_TGQ;
  args.v_TGQ = keys.v_TGQ;
  attention(args, ops);
}

void attention_out_forward(const LayerContext& c, int64_t tokens, LayerState& s) {
  const Extents x(c, tokens);
  s.sum_TD = c.real(Shape(x.T, x.D), "residual stream");
  linear({.x_TK = c.in(s.o_TC, Shape(x.T, x.H * x.Q)),
          .w_NK = c.dense.weight(*c.tensors.attn_out, Shape(x.D, x.H * x.Q)),
          .residual_TN = c.in(s.x_TD, Shape(x.T, x.D)),
          .y_TN = c.out(s.sum_TD, Shape(x.T, x.D))},
         c.rank.ops);
  bias_forward(c, c.tensors.attn_out_bias, s.sum_TD, Shape(x.T, x.D));
}

}  // namespace

void release_recomputed(const LayerContext& c, LayerState& s) {
  const RecomputeConfig& recompute = c.rank.config.recompute;
  if (recompute.norms) {
    for (Buffer* done : {&s.normed_TD, &s.mlp_normed_TD}) done->reset();
  }
  if (!recompute.attention) return;
  for (Buffer* done : {&s.qkv_TC, &s.q_THQ, &s.k_TGQ, &s.q_rstd, &s.k_rstd, &s.o_TC, &s.lse_TH,
                       &s.k_SC, &s.v_SC}) {
    done->reset();
  }
}

void recompute_norms(const LayerContext& c, const MicroBatch& batch, LayerState& s) {
  if (!s.normed_TD.empty()) return;
  c.enter(WorkStage::attend, WorkPass::backward, batch.index);
  attn_norm_forward(c, batch.tokens, s);
  mlp_norm_forward(c, batch.tokens, s);
}

void attend_forward(const LayerContext& c, const MicroBatch& batch, Buffer x_TD, LayerState& s) {
  c.enter(WorkStage::attend, WorkPass::forward, batch.index);
  s.micro_batch = batch.index;
  s.x_TD = std::move(x_TD);
  attn_norm_forward(c, batch.tokens, s);
  attention_forward(c, batch, s);
  attention_out_forward(c, batch.tokens, s);
  mlp_norm_forward(c, batch.tokens, s);
  if (c.is_dense()) return;
  router_forward(c, batch, s);
  plan_dispatch(c, batch, s);
}

namespace {

// Backward of an RMSNorm whose input is also the residual stream.
Buffer norm_backward(const LayerContext& c, const MicroBatch& batch, LayerGradients& g,
                     const ParamTensor& tensor, const Buffer& d_y_TD, const Buffer& x_TD,
                     const Buffer& rstd_T, const Buffer& d_residual_TD) {
  const Extents x(c, batch.tokens);
  const int64_t block = c.rank.config.numerics.block_tokens, blocks = x.T / block;
  Buffer d_x_TD = c.real(Shape(x.T, x.D), "d norm input");
  Buffer leaf = floats(c, blocks * x.D, "d gain leaves");
  rms_norm_backward({.d_y_TD = c.in(d_y_TD, Shape(x.T, x.D)),
                     .x_TD = c.in(x_TD, Shape(x.T, x.D)),
                     .gain_D = gain(c, &tensor),
                     .rstd_T = in_f32(rstd_T, Shape(x.T)),
                     .d_residual_TD = c.in(d_residual_TD, Shape(x.T, x.D)),
                     .d_x_TD = c.out(d_x_TD, Shape(x.T, x.D)),
                     .d_gain_leaf_BD = out_f32(leaf, Shape(blocks, x.D)),
                     .block_tokens = block},
                    c.rank.ops);
  gain_wgrad(c, g, {&tensor, std::move(leaf), blocks});
  return d_x_TD;
}

// Gradients around attention itself.
struct AttentionGrads {
  In<Real> o;
  Out<Real> q, k, v;
};
void attention_core_backward(const LayerContext& c, const MicroBatch& batch, const LayerState& s,
                             const AttentionGrads& d) {
  const Extents x(c, batch.tokens);
  const KeyRows keys = attention_keys(c, x, s);
  const Buffer delta = floats(c, x.T * x.H, "attention delta");
  AttentionBackwardArgs backward{
      .q_THQ = c.in(s.q_THQ, Shape(x.T, x.H, x.Q)),
      .k_TGQ = keys.k_TGQ,
      .v_TGQ = keys.v_TGQ,
      .o_THQ = c.in(s.o_TC, Shape(x.T, x.H, x.Q)),
      .d_o_THQ = d.o,
      .lse_TH = in_f32(s.lse_TH, Shape(x.T, x.H)),
      .document_start_T = batch.document_start_T.empty()
                              ? In<int32_t>()
                              : in_i32(batch.document_start_T, Shape(x.T)),
      .d_q_THQ = d.q,
      .delta_TH = out_f32(delta, Shape(x.T, x.H)),
      .sequence_length = batch.sequence_length,
      .block_tokens = c.rank.config.numerics.block_tokens,
      .scale = attention_scale(x.Q),
      .kernel = attention_kernel(c, batch),
      .share = context_share(c.rank),
      .one_chain = is_exact(c)};
  if (attends_by_parts(c)) {
    ring_attention_backward(c, batch, keys, {d.k, d.v}, backward);
  } else if (c.rank.mesh.cp == 1) {
    backward.d_k_TGQ = d.k;
    backward.d_v_TGQ = d.v;
    attention_backward(backward, c.rank.ops);
  } else if (!is_exact(c)) {
    const int64_t rows = x.T * c.rank.mesh.cp, width = x.G * x.Q;
    const Buffer sum_SC = floats(c, rows * 2 * width, "key gradients of own queries");
    backward.d_k_sum_SC = {sum_SC.f32(), Shape(rows, width), 2 * width};
    backward.d_v_sum_SC = {sum_SC.f32() + width, Shape(rows, width), 2 * width};
    attention_backward(backward, c.rank.ops);
    reduce_context(c, batch, sum_SC, {d.k, d.v});
  } else if (c.rank.config.parallel.context == ContextExchange::all_gather ||
             c.rank.config.run.device == DeviceKind::cuda) {
    chain_context(c, batch, {d.k, d.v}, backward);
  } else {  // a ring on the CPU, which alone keeps query blocks' partials apart
    const int64_t width = x.G * x.Q;
    const int64_t rows =
        attention_partial_rows(x.T, batch.sequence_length, backward.block_tokens, backward.share);
    const Buffer k_partial = floats(c, rows * width, "d k of query blocks");
    const Buffer v_partial = floats(c, rows * width, "d v of query blocks");
    backward.d_k_partial_MC = out_f32(k_partial, Shape(rows, width));
    backward.d_v_partial_MC = out_f32(v_partial, Shape(rows, width));
    attention_backward(backward, c.rank.ops);
    fold_context(c, batch, k_partial, d.k);
    fold_context(c, batch, v_partial, d.v);
  }
}

// From the gradient of the attention block's output to that of the qkv projection's output.
Buffer attention_backward_qkv(const LayerContext& c, const MicroBatch& batch, LayerState& s,
                              LayerGradients& g, const Buffer& d_sum_TD) {
  const Extents x(c, batch.tokens);
  OpContext& ops = c.rank.ops;
  const Buffer d_o = c.real(Shape(x.T, x.H, x.Q), "d attention output");
  linear_dgrad({.d_y_TN = c.in(d_sum_TD, Shape(x.T, x.D)),
                .w_NK = c.dense.weight(*c.tensors.attn_out, Shape(x.D, x.H * x.Q)),
                .d_x_TK = c.out(d_o, Shape(x.T, x.H * x.Q))},
               ops);
  dense_wgrad(c, g, *c.tensors.attn_out, c.in(d_sum_TD, Shape(x.T, x.D)),
              c.in(s.o_TC, Shape(x.T, x.H * x.Q)));
  if (c.tensors.attn_out_bias != nullptr) {
    bias_wgrad(c, g, *c.tensors.attn_out_bias, c.in(d_sum_TD, Shape(x.T, x.D)));
  }
  const Buffer d_q = c.real(Shape(x.T, x.H, x.Q), "d q");
  const Buffer d_k = c.real(Shape(x.T, x.G, x.Q), "d k");
  Buffer d_qkv = c.real(Shape(x.T, x.C), "d qkv");
  attention_core_backward(c, batch, s,
                          {.o = c.in(d_o, Shape(x.T, x.H, x.Q)),
                           .q = c.out(d_q, Shape(x.T, x.H, x.Q)),
                           .k = c.out(d_k, Shape(x.T, x.G, x.Q)),
                           .v = qkv_part<Out<Real>>(c, d_qkv, x, (x.H + x.G) * x.Q, x.G)});
  const int64_t block = c.rank.config.numerics.block_tokens, blocks = x.T / block;
  const bool per_head = c.model.qk_norm == QkNorm::per_head;
  Buffer q_leaf, k_leaf;
  QkNormRopeBackwardArgs args{.d_q_out_THQ = c.in(d_q, Shape(x.T, x.H, x.Q)),
                              .d_k_out_TGQ = c.in(d_k, Shape(x.T, x.G, x.Q)),
                              .cos_SC = c.cos_SC,
                              .sin_SC = c.sin_SC,
                              .position_T = in_i32(batch.position_T, Shape(x.T)),
                              .d_q_THQ = qkv_part<Out<Real>>(c, d_qkv, x, 0, x.H),
                              .d_k_TGQ = qkv_part<Out<Real>>(c, d_qkv, x, x.H * x.Q, x.G),
                              .block_tokens = block,
                              .kind = qk_norm_kind(c.model.qk_norm)};
  if (c.tensors.q_norm != nullptr) {
    const int64_t q_width = c.tensors.q_norm->elements, k_width = c.tensors.k_norm->elements;
    q_leaf = floats(c, blocks * q_width, "d q gain leaves");
    k_leaf = floats(c, blocks * k_width, "d k gain leaves");
    args.q_THQ = qkv_part<In<Real>>(c, s.qkv_TC, x, 0, x.H);
    args.k_TGQ = qkv_part<In<Real>>(c, s.qkv_TC, x, x.H * x.Q, x.G);
    args.q_gain = gain(c, c.tensors.q_norm);
    args.k_gain = gain(c, c.tensors.k_norm);
    args.q_rstd = in_f32(s.q_rstd, Shape(x.T, per_head ? x.H : 1));
    args.k_rstd = in_f32(s.k_rstd, Shape(x.T, per_head ? x.G : 1));
    args.d_q_gain_leaf_BN = out_f32(q_leaf, Shape(blocks, q_width));
    args.d_k_gain_leaf_BN = out_f32(k_leaf, Shape(blocks, k_width));
  }
  qk_norm_rope_backward(args, ops);
  if (c.tensors.q_norm != nullptr) {
    gain_wgrad(c, g, {c.tensors.q_norm, std::move(q_leaf), blocks});
    gain_wgrad(c, g, {c.tensors.k_norm, std::move(k_leaf), blocks});
  }
  return d_qkv;
}

}  // namespace

Buffer attend_backward(const LayerContext& c, const MicroBatch& batch, LayerState& s,
                       LayerGradients& g) {
  const Extents x(c, batch.tokens);
  c.enter(WorkStage::attend, WorkPass::backward, batch.index);
  const Buffer d_mlp_normed =
      c.is_dense() ? mlp_backward(c, batch, s, g) : router_backward(c, batch, s, g);
  Buffer d_sum_TD = norm_backward(c, batch, g, *c.tensors.mlp_norm, d_mlp_normed, s.sum_TD,
                                  s.mlp_rstd_T, g.d_out_TD);
  if (s.o_TC.empty()) attention_forward(c, batch, s);
  Buffer d_qkv = attention_backward_qkv(c, batch, s, g, d_sum_TD);
  const Buffer d_normed = c.real(Shape(x.T, x.D), "d normed input");
  linear_dgrad({.d_y_TN = c.in(d_qkv, Shape(x.T, x.C)),
                .w_NK = c.dense.weight(*c.tensors.qkv, Shape(x.C, x.D)),
                .d_x_TK = c.out(d_normed, Shape(x.T, x.D))},
               c.rank.ops);
  dense_wgrad(c, g, *c.tensors.qkv, c.in(d_qkv, Shape(x.T, x.C)),
              c.in(s.normed_TD, Shape(x.T, x.D)));
  if (c.tensors.qkv_bias != nullptr) {
    bias_wgrad(c, g, *c.tensors.qkv_bias, c.in(d_qkv, Shape(x.T, x.C)));
  }
  Buffer d_x_TD =
      norm_backward(c, batch, g, *c.tensors.attn_norm, d_normed, s.x_TD, s.attn_rstd_T, d_sum_TD);
  keep_for_weights(g, d_sum_TD);
  keep_for_weights(g, d_qkv);
  return d_x_TD;
}

}  // namespace cambium
