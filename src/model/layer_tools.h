// Helpers that the stages of a layer share (qwen3_moe.h). For src/model/qwen3_*.cc alone.
#pragma once

#include "src/model/qwen3_moe.h"

namespace cambium {

// Extents that the stages use, named as in the shape legend (AGENTS.md).
struct Extents {
  explicit Extents(const LayerContext& c, int64_t tokens = 0)
      : T(tokens),
        D(c.model.hidden),
        H(c.model.heads),
        G(c.model.kv_heads),
        Q(c.model.head_dim),
        C((H + 2 * G) * Q),
        E(c.model.experts),
        K(c.model.top_k),
        F(c.model.expert_hidden),
        N(2 * F),
        P(c.rank.mesh.ep),
        e(E / P) {}
  int64_t T, D, H, G, Q, C, E, K, F, N, P, e;
};

inline Buffer floats(const LayerContext& c, int64_t count, const char* what) {
  return c.rank.activation(4 * count, what);
}
inline Buffer ints(const LayerContext& c, int64_t count, const char* what) {
  return c.rank.activation(4 * count, what);
}
inline In<float> in_f32(const Buffer& buffer, Shape shape) { return {buffer.f32(), shape}; }
inline Out<float> out_f32(const Buffer& buffer, Shape shape) { return {buffer.f32(), shape}; }
inline In<int32_t> in_i32(const Buffer& buffer, Shape shape) {
  return {buffer.as<int32_t>(), shape};
}
inline Out<int32_t> out_i32(const Buffer& buffer, Shape shape) {
  return {buffer.as<int32_t>(), shape};
}

inline bool is_exact(const LayerContext& c) {
  return c.rank.config.numerics.reduction == ReductionMode::exact;
}

// A norm's gain; empty without one.
In<Real> gain(const LayerContext& c, const ParamTensor* tensor);

// dW of a dense linear layer: y = x w^T; now, or noted in `g` for later.
void dense_wgrad(const LayerContext& c, LayerGradients& g, const ParamTensor& tensor,
                 In<Real> d_y_TN, In<Real> x_TK);

// A norm gain's gradient from its per-block leaves; now, or noted in `g` for later.
void gain_wgrad(const LayerContext& c, LayerGradients& g, GainWgrad wgrad);

// A bias's gradient: d_y summed over the tokens; now, or noted in `g` for later.
void bias_wgrad(const LayerContext& c, LayerGradients& g, const ParamTensor& tensor,
                In<Real> d_y_TN);

// A buffer that waiting weight gradients read.
inline void keep_for_weights(LayerGradients& g, Buffer& buffer) {
  if (g.weights == WeightGradients::later) g.kept.push_back(std::move(buffer));
}

// Sums what came home (or the local rows) per token and adds the residual. Stage 5, and the
// gradient of the experts' input.
void sum_rows(const LayerContext& c, int64_t tokens, LayerState& s, const Buffer& rows,
              In<Real> residual_TD, Out<Real> out_TD);

// The norm before router and experts, or before the dense MLP.
void mlp_norm_forward(const LayerContext& c, int64_t tokens, LayerState& s);

// Of a dense layer or of the shared expert: gradient of the second norm's output, and the MLP's
// weight gradients.
Buffer mlp_backward(const LayerContext& c, const MicroBatch& batch, LayerState& s,
                    LayerGradients& g);

// The routers' part of stage 1 (src/model/qwen3_router.cc): logits, top-k, balance losses.
void router_forward(const LayerContext& c, const MicroBatch& batch, LayerState& s);
// What goes to which rank; the counts are exchanged. With ep = 1 nothing.
void plan_dispatch(const LayerContext& c, const MicroBatch& batch, LayerState& s);
// Gradient of the second norm's output: the experts' part, then the router's on top.
Buffer router_backward(const LayerContext& c, const MicroBatch& batch, LayerState& s,
                       LayerGradients& g);

}  // namespace cambium
