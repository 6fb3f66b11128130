// The MLP of a dense layer: y = W_down (silu(W_gate x) * (W_up x)) + residual. Stages 2 to 4 of
// such a layer are empty, and its weights are dense parameters like attention's.
#include "kernels/linear.h"
#include "kernels/swiglu.h"
#include "src/model/layer_tools.h"

namespace cambium {

namespace {

struct MlpShapes {
  MlpShapes(const LayerContext& c, int64_t tokens)
      : gate_up(tokens, 2 * c.model.dense_hidden),
        h(tokens, c.model.dense_hidden),
        x(tokens, c.model.hidden),
        w_gate_up(2 * c.model.dense_hidden, c.model.hidden),
        w_down(c.model.hidden, c.model.dense_hidden) {}
  Shape gate_up, h, x, w_gate_up, w_down;
};

Buffer mlp_hidden(const LayerContext& c, const MlpShapes& shape, const LayerState& s) {
  Buffer h = c.real(shape.h, "mlp h");
  swiglu({.gate_up_RN = c.in(s.mlp_gate_up_TN, shape.gate_up), .h_RF = c.out(h, shape.h)},
         c.rank.ops);
  return h;
}

}  // namespace

Buffer mlp_forward(const LayerContext& c, const MicroBatch& batch, LayerState& s) {
  const MlpShapes shape(c, batch.tokens);
  s.mlp_gate_up_TN = c.real(shape.gate_up, "mlp gate and up");
  linear({.x_TK = c.in(s.mlp_normed_TD, shape.x),
          .w_NK = c.dense.weight(*c.tensors.mlp_gate_up, shape.w_gate_up),
          .y_TN = c.out(s.mlp_gate_up_TN, shape.gate_up)},
         c.rank.ops);
  if (c.keep == Keep::recomputing) return {};
  const Buffer h = mlp_hidden(c, shape, s);
  Buffer out_TD = c.real(shape.x, "layer output");
  linear({.x_TK = c.in(h, shape.h),
          .w_NK = c.dense.weight(*c.tensors.mlp_down, shape.w_down),
          .residual_TN = c.in(s.sum_TD, shape.x),
          .y_TN = c.out(out_TD, shape.x)},
         c.rank.ops);
  return out_TD;
}

Buffer mlp_backward(const LayerContext& c, const MicroBatch& batch, LayerState& s,
                    LayerGradients& g) {
  const MlpShapes shape(c, batch.tokens);
  Buffer h = mlp_hidden(c, shape, s);
  const Buffer d_h = c.real(shape.h, "d mlp h");
  linear_dgrad({.d_y_TN = c.in(g.d_out_TD, shape.x),
                .w_NK = c.dense.weight(*c.tensors.mlp_down, shape.w_down),
                .d_x_TK = c.out(d_h, shape.h)},
               c.rank.ops);
  dense_wgrad(c, g, *c.tensors.mlp_down, c.in(g.d_out_TD, shape.x), c.in(h, shape.h));
  Buffer d_gate_up = c.real(shape.gate_up, "d mlp gate and up");
  swiglu_backward({.gate_up_RN = c.in(s.mlp_gate_up_TN, shape.gate_up),
                   .d_h_RF = c.in(d_h, shape.h),
                   .d_gate_up_RN = c.out(d_gate_up, shape.gate_up)},
                  c.rank.ops);
  Buffer d_normed_TD = c.real(shape.x, "d mlp normed");
  linear_dgrad({.d_y_TN = c.in(d_gate_up, shape.gate_up),
                .w_NK = c.dense.weight(*c.tensors.mlp_gate_up, shape.w_gate_up),
                .d_x_TK = c.out(d_normed_TD, shape.x)},
               c.rank.ops);
  dense_wgrad(c, g, *c.tensors.mlp_gate_up, c.in(d_gate_up, shape.gate_up),
              c.in(s.mlp_normed_TD, shape.x));
  keep_for_weights(g, h);
  keep_for_weights(g, d_gate_up);
  return d_normed_TD;
}

}  // namespace cambium
