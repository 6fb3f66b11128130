// The MLP that every token passes: of a dense layer, whose stages 2 to 4 are empty, or the shared
// expert beside routed ones, with or without a gate (kernels/token_gate.h):
//
//   y = W_down (gate * silu(W_gate x) * (W_up x)) + residual
// Its weights are dense parameters like attention's.
#include "kernels/linear.h"
#include "kernels/swiglu.h"
#include "kernels/token_gate.h"
#include "src/model/layer_tools.h"

namespace cambium {

namespace {

struct Mlp {
  Mlp(const LayerContext& c, int64_t tokens)
      : w_gate_up(c.is_dense() ? *c.tensors.mlp_gate_up : *c.tensors.shared_gate_up),
        w_down(c.is_dense() ? *c.tensors.mlp_down : *c.tensors.shared_down),
        w_gate(c.is_dense() ? nullptr : c.tensors.shared_gate),
        T(tokens),
        D(c.model.hidden),
        F(c.is_dense() ? c.model.dense_hidden : c.model.shared_expert_hidden) {}
  Shape gate_up() const { return Shape(T, 2 * F); }
  Shape h() const { return Shape(T, F); }
  Shape x() const { return Shape(T, D); }

  const ParamTensor &w_gate_up, &w_down;
  const ParamTensor* w_gate;  // null: no gate
  int64_t T, D, F;
};

Buffer mlp_hidden(const LayerContext& c, const Mlp& mlp, const LayerState& s) {
  Buffer h = c.real(mlp.h(), "mlp h");
  swiglu({.gate_up_RN = c.in(s.mlp_gate_up_TN, mlp.gate_up()), .h_RF = c.out(h, mlp.h())},
         c.rank.ops);
  return h;
}

}  // namespace

Buffer mlp_forward(const LayerContext& c, const MicroBatch& batch, LayerState& s) {
  const Mlp mlp(c, batch.tokens);
  s.mlp_gate_up_TN = c.real(mlp.gate_up(), "mlp gate and up");
  linear({.x_TK = c.in(s.mlp_normed_TD, mlp.x()),
          .w_NK = c.dense.weight(mlp.w_gate_up, Shape(2 * mlp.F, mlp.D)),
          .y_TN = c.out(s.mlp_gate_up_TN, mlp.gate_up())},
         c.rank.ops);
  const bool recomputing = c.keep == Keep::recomputing;
  if (recomputing && mlp.w_gate == nullptr) return {};
  const Buffer h = mlp_hidden(c, mlp, s);
  if (mlp.w_gate != nullptr) {
    s.shared_gate_T = floats(c, mlp.T, "shared expert gate");
    token_gate({.x_TD = c.in(s.mlp_normed_TD, mlp.x()),
                .w_D = gain(c, mlp.w_gate),
                .h_TF = c.in(h, mlp.h()),
                .gate_T = out_f32(s.shared_gate_T, Shape(mlp.T)),
                .y_TF = c.out(h, mlp.h())},
               c.rank.ops);
  }
  if (recomputing) return {};
  Buffer out_TD = c.real(mlp.x(), c.is_dense() ? "layer output" : "shared expert output");
  linear({.x_TK = c.in(h, mlp.h()),
          .w_NK = c.dense.weight(mlp.w_down, Shape(mlp.D, mlp.F)),
          .residual_TN = c.in(s.sum_TD, mlp.x()),
          .y_TN = c.out(out_TD, mlp.x())},
         c.rank.ops);
  return out_TD;
}

namespace {

// Turns h into gate * h and its gradient into that of h; returns the gate's part of d_x.
Buffer gate_backward(const LayerContext& c, const Mlp& mlp, const LayerState& s, LayerGradients& g,
                     const Buffer& h, const Buffer& d_h) {
  const int64_t block = c.rank.config.numerics.block_tokens, blocks = mlp.T / block;
  Buffer d_x_TD = c.real(mlp.x(), "d gate input");
  Buffer leaf = floats(c, blocks * mlp.D, "d gate leaves");
  const Buffer d_logit = floats(c, mlp.T, "d gate logit");
  token_gate_backward({.x_TD = c.in(s.mlp_normed_TD, mlp.x()),
                       .w_D = gain(c, mlp.w_gate),
                       .h_TF = c.in(h, mlp.h()),
                       .gate_T = in_f32(s.shared_gate_T, Shape(mlp.T)),
                       .d_y_TF = c.in(d_h, mlp.h()),
                       .d_logit_T = out_f32(d_logit, Shape(mlp.T)),
                       .d_h_TF = c.out(d_h, mlp.h()),
                       .y_TF = c.out(h, mlp.h()),
                       .d_x_TD = c.out(d_x_TD, mlp.x()),
                       .d_w_leaf_BD = out_f32(leaf, Shape(blocks, mlp.D)),
                       .block_tokens = block},
                      c.rank.ops);
  gain_wgrad(c, g, {mlp.w_gate, std::move(leaf), blocks});
  return d_x_TD;
}

}  // namespace

Buffer mlp_backward(const LayerContext& c, const MicroBatch& batch, LayerState& s,
                    LayerGradients& g) {
  const Mlp mlp(c, batch.tokens);
  Buffer h = mlp_hidden(c, mlp, s);
  const Buffer d_h = c.real(mlp.h(), "d mlp h");
  linear_dgrad({.d_y_TN = c.in(g.d_out_TD, mlp.x()),
                .w_NK = c.dense.weight(mlp.w_down, Shape(mlp.D, mlp.F)),
                .d_x_TK = c.out(d_h, mlp.h())},
               c.rank.ops);
  Buffer d_gate_x_TD;
  if (mlp.w_gate != nullptr) d_gate_x_TD = gate_backward(c, mlp, s, g, h, d_h);
  dense_wgrad(c, g, mlp.w_down, c.in(g.d_out_TD, mlp.x()), c.in(h, mlp.h()));
  Buffer d_gate_up = c.real(mlp.gate_up(), "d mlp gate and up");
  swiglu_backward({.gate_up_RN = c.in(s.mlp_gate_up_TN, mlp.gate_up()),
                   .d_h_RF = c.in(d_h, mlp.h()),
                   .d_gate_up_RN = c.out(d_gate_up, mlp.gate_up())},
                  c.rank.ops);
  Buffer d_normed_TD = c.real(mlp.x(), "d mlp normed");
  linear_dgrad({.d_y_TN = c.in(d_gate_up, mlp.gate_up()),
                .w_NK = c.dense.weight(mlp.w_gate_up, Shape(2 * mlp.F, mlp.D)),
                .residual_TK = d_gate_x_TD.empty() ? In<Real>() : c.in(d_gate_x_TD, mlp.x()),
                .d_x_TK = c.out(d_normed_TD, mlp.x())},
               c.rank.ops);
  dense_wgrad(c, g, mlp.w_gate_up, c.in(d_gate_up, mlp.gate_up()), c.in(s.mlp_normed_TD, mlp.x()));
  keep_for_weights(g, h);
  keep_for_weights(g, d_gate_up);
  return d_normed_TD;
}

}  // namespace cambium
