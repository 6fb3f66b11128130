// Stage 1, the router: norm, logits, top-k, balance losses, dispatch plan; and its backward.
#include "kernels/balance_loss.h"
#include "kernels/copy.h"
#include "kernels/dispatch_plan.h"
#include "kernels/expert_load.h"
#include "kernels/linear.h"
#include "kernels/metric_sum.h"
#include "kernels/permute.h"
#include "kernels/rms_norm.h"
#include "kernels/router_topk.h"
#include "kernels/z_loss.h"
#include "src/model/context.h"
#include "src/model/layer_tools.h"

namespace cambium {

namespace {

// What balance_loss counts over: the fractions, the buffer that holds them, or how to count.
struct BalanceCounts {
  CountSource source = CountSource::own_sequence;
  In<float> fraction_NE;
  Buffer held;
};

BalanceCounts balance_counts(const LayerContext& c, const MicroBatch& batch,
                             In<int32_t> expert_index_TK, In<int32_t> count_E) {
  const Extents x(c, batch.tokens);
  const BalanceLoss loss = c.rank.config.balance.loss;
  BalanceCounts counts;
  if (loss == BalanceLoss::global_batch_lagged) {
    counts.source = CountSource::given;
    counts.fraction_NE = {c.router.fraction_LE.f32() + c.layer * x.E, Shape(1, x.E)};
  } else if (loss == BalanceLoss::global_batch) {
    counts.source = CountSource::given;
    counts.held = ints(c, x.E, "global counts");
    c.rank.comm_waits_for_compute();
    c.rank.compute_waits(all_reduce({.communicator = *c.rank.data,
                                     .stream = c.rank.comm,
                                     .send = count_E.pointer(),
                                     .recv = counts.held.data(),
                                     .count = x.E,
                                     .dtype = DType::i32}));
    count_fraction({.count_E = in_i32(counts.held, Shape(x.E)),
                    .fraction_E = out_f32(c.router.global_fraction_E, Shape(x.E))},
                   c.rank.ops);
    counts.fraction_NE = in_f32(c.router.global_fraction_E, Shape(1, x.E));
  } else if (c.rank.mesh.cp > 1) {
    const bool each = loss == BalanceLoss::sequence;
    const int64_t sequences = x.T * c.rank.mesh.cp / batch.sequence_length;
    counts.source = CountSource::given;
    counts.held = context_fractions(c, batch, expert_index_TK,
                                    each ? FractionOf::each_sequence : FractionOf::all);
    counts.fraction_NE = in_f32(counts.held, Shape(each ? sequences : 1, x.E));
  } else if (loss == BalanceLoss::micro_batch) {
    counts.source = CountSource::micro_batch;
  }
  return counts;
}

// Loads of this layer into the step's counts, and the balance losses of design.md section 3.
void balance_forward(const LayerContext& c, const MicroBatch& batch, const Buffer& logits_TE,
                     LayerState& s) {
  const Extents x(c, batch.tokens);
  const BalanceConfig& balance = c.rank.config.balance;
  const InOut<int32_t> count_E(c.router.count_LE.as<int32_t>() + c.layer * x.E, Shape(x.E));
  const In<int32_t> expert_index = in_i32(s.expert_index_TK, Shape(x.T, x.K));
  const bool counts = c.keep != Keep::recomputing;
  if (counts) expert_histogram({.expert_index_TK = expert_index, .count_E = count_E}, c.rank.ops);
  const bool is_stored = !s.d_probs_TE.empty();
  if (balance.loss != BalanceLoss::none && batch.balance_gradient_scale > 0 && !is_stored) {
    const BalanceCounts fractions =
        balance_counts(c, batch, expert_index, {count_E.pointer(), Shape(x.E)});
    const int64_t blocks = x.T / c.rank.config.numerics.block_tokens;
    const Buffer leaf = floats(c, blocks, "balance loss");
    s.d_probs_TE = floats(c, x.T * x.E, "d probs");
    balance_loss({.probs_TE = in_f32(s.probs_TE, Shape(x.T, x.E)),
                  .expert_index_TK = expert_index,
                  .fraction_NE = fractions.fraction_NE,
                  .sequence_length = batch.sequence_length / c.rank.mesh.cp,
                  .positions = batch.sequence_length,
                  .block_tokens = c.rank.config.numerics.block_tokens,
                  .source = fractions.source,
                  .loss_scale = static_cast<float>(balance.loss_weight),
                  .gradient_scale = static_cast<float>(batch.balance_gradient_scale),
                  .loss_leaf_B = out_f32(leaf, Shape(blocks)),
                  .d_probs_TE = out_f32(s.d_probs_TE, Shape(x.T, x.E))},
                 c.rank.ops);
    if (counts) {
      metric_sum({.value_N = in_f32(leaf, Shape(blocks)),
                  .leaf_BM = batch.metric_leaf_BM,
                  .column = metric_column(c.rank.config, kMetricBalance, c.layer)},
                 c.rank.ops);
    }
  }
  if (balance.z_loss_weight > 0 && batch.z_gradient_scale > 0) {
    const Buffer loss = floats(c, x.T, "z loss");
    s.d_logits_TE = floats(c, x.T * x.E, "z loss d logits");
    z_loss({.logits_TE = in_f32(logits_TE, Shape(x.T, x.E)),
            .loss_scale = static_cast<float>(balance.z_loss_weight),
            .gradient_scale = static_cast<float>(batch.z_gradient_scale),
            .loss_T = out_f32(loss, Shape(x.T)),
            .d_logits_TE = out_f32(s.d_logits_TE, Shape(x.T, x.E))},
           c.rank.ops);
    if (!counts) return;
    metric_sum({.value_N = in_f32(loss, Shape(x.T)),
                .leaf_BM = batch.metric_leaf_BM,
                .column = metric_column(c.rank.config, kMetricZ, c.layer)},
               c.rank.ops);
  }
}

// The choice into the trace of the step, where there is one.
void trace_choice(const LayerContext& c, const MicroBatch& batch, const LayerState& s) {
  if (batch.traced_L.empty() || c.keep == Keep::recomputing) return;
  const TracedChoice& to = batch.traced_L[c.layer];
  const auto keep = [&](const Buffer& from, void* data) {
    const Shape bytes(from.size_bytes());
    copy_bytes(
        {.from_N = {from.as<uint8_t>(), bytes}, .to_N = {static_cast<uint8_t*>(data), bytes}},
        c.rank.ops);
  };
  keep(s.expert_index_TK, to.expert_index_TK.data);
  keep(s.weight_TK, to.weight_TK.data);
}

}  // namespace

void mlp_norm_forward(const LayerContext& c, int64_t tokens, LayerState& s) {
  const Extents x(c, tokens);
  s.mlp_rstd_T = floats(c, x.T, "mlp norm rstd");
  s.mlp_normed_TD = c.real(Shape(x.T, x.D), "mlp normed");
  rms_norm({.x_TD = c.in(s.sum_TD, Shape(x.T, x.D)),
            .gain_D = gain(c, c.tensors.mlp_norm),
            .y_TD = c.out(s.mlp_normed_TD, Shape(x.T, x.D)),
            .rstd_T = out_f32(s.mlp_rstd_T, Shape(x.T)),
            .epsilon = static_cast<float>(c.model.norm_epsilon)},
           c.rank.ops);
}

void router_forward(const LayerContext& c, const MicroBatch& batch, LayerState& s) {
  const Extents x(c, batch.tokens);
  OpContext& ops = c.rank.ops;
  const Buffer logits_TE = floats(c, x.T * x.E, "router logits");
  linear({.x_TK = c.in(s.mlp_normed_TD, Shape(x.T, x.D)),
          .w_NK = c.dense.weight(*c.tensors.router, Shape(x.E, x.D)),
          .y_TN = out_f32(logits_TE, Shape(x.T, x.E))},
         ops);
  s.probs_TE = floats(c, x.T * x.E, "router probs");
  // A second forward takes the experts that the first one chose.
  const bool stored = !s.expert_index_TK.empty();
  const Buffer chosen = stored ? std::move(s.expert_index_TK) : Buffer();
  s.expert_index_TK = ints(c, x.T * x.K, "expert index");
  s.weight_TK = floats(c, x.T * x.K, "routing weight");
  In<float> bias;
  if (!c.router.select_bias_LE.empty()) {
    bias = {c.router.select_bias_LE.f32() + c.layer * x.E, Shape(x.E)};
  }
  In<int32_t> forced;
  if (!batch.forced_index_LTK.empty()) forced = batch.forced_index_LTK[c.layer];
  if (stored) forced = in_i32(chosen, Shape(x.T, x.K));
  router_topk(
      {.logits_TE = in_f32(logits_TE, Shape(x.T, x.E)),
       .select_bias_E = bias,
       .probs_TE = out_f32(s.probs_TE, Shape(x.T, x.E)),
       .expert_index_TK = out_i32(s.expert_index_TK, Shape(x.T, x.K)),
       .weight_TK = out_f32(s.weight_TK, Shape(x.T, x.K)),
       .normalize = c.model.normalize_top_k ? TopkNormalize::over_top_k : TopkNormalize::none,
       .forced_index_TK = forced},
      ops);
  trace_choice(c, batch, s);
  balance_forward(c, batch, logits_TE, s);
}

void plan_dispatch(const LayerContext& c, const MicroBatch& batch, LayerState& s) {
  const Extents x(c, batch.tokens);
  if (x.P == 1) return;
  DispatchState& d = s.dispatch;
  const int64_t capacity = dispatch_capacity(x.T, x.K, x.P);
  d.send_count_P2 = ints(c, 2 * x.P, "send counts");
  d.recv_count_P2 = ints(c, 2 * x.P, "received counts");
  d.send_token_M = ints(c, capacity, "send token");
  d.send_expert_MK = ints(c, capacity * x.K, "send expert");
  d.send_weight_MK = floats(c, capacity * x.K, "send weight");
  d.return_row_TK = ints(c, x.T * x.K, "return row");
  d.token_part_TP = ints(c, x.T * x.P, "token part");
  dispatch_plan({.expert_index_TK = in_i32(s.expert_index_TK, Shape(x.T, x.K)),
                 .weight_TK = in_f32(s.weight_TK, Shape(x.T, x.K)),
                 .ranks = x.P,
                 .experts_per_rank = x.e,
                 .send_count_P2 = out_i32(d.send_count_P2, Shape(x.P, 2)),
                 .send_token_M = out_i32(d.send_token_M, Shape(capacity)),
                 .send_expert_MK = out_i32(d.send_expert_MK, Shape(capacity, x.K)),
                 .send_weight_MK = out_f32(d.send_weight_MK, Shape(capacity, x.K)),
                 .return_row_TK = out_i32(d.return_row_TK, Shape(x.T, x.K)),
                 .token_part_TP = out_i32(d.token_part_TP, Shape(x.T, x.P))},
                c.rank.ops);
  const std::vector<int64_t> two_each(x.P, 2);
  c.rank.comm_waits_for_compute();
  d.counts_ticket = all_to_all_v({.communicator = *c.rank.expert,
                                  .stream = c.rank.comm,
                                  .send = d.send_count_P2.data(),
                                  .recv = d.recv_count_P2.data(),
                                  .send_counts = two_each,
                                  .recv_counts = two_each,
                                  .dtype = DType::i32});
}

Buffer router_backward(const LayerContext& c, const MicroBatch& batch, LayerState& s,
                       LayerGradients& g) {
  const Extents x(c, batch.tokens);
  OpContext& ops = c.rank.ops;
  const bool local = x.P == 1;
  g.returning.land(c);
  const Buffer d_weight_TK = floats(c, x.T * x.K, "d routing weight");
  gather_scalars(
      {.x_N = in_f32(local ? g.d_weight_R : g.d_returned_weight, Shape(x.T * x.K)),
       .index_M = in_i32(local ? s.expert.slot_row_MK : s.dispatch.return_row_TK, Shape(x.T * x.K)),
       .y_M = out_f32(d_weight_TK, Shape(x.T * x.K))},
      ops);
  Buffer d_logits_TE = floats(c, x.T * x.E, "d router logits");
  auto optional_TE = [&](const Buffer& buffer) {
    return buffer.empty() ? In<float>() : in_f32(buffer, Shape(x.T, x.E));
  };
  router_topk_backward(
      {.probs_TE = in_f32(s.probs_TE, Shape(x.T, x.E)),
       .expert_index_TK = in_i32(s.expert_index_TK, Shape(x.T, x.K)),
       .d_weight_TK = in_f32(d_weight_TK, Shape(x.T, x.K)),
       .d_probs_TE = optional_TE(s.d_probs_TE),
       .d_logits_in_TE = optional_TE(s.d_logits_TE),
       .d_logits_TE = out_f32(d_logits_TE, Shape(x.T, x.E)),
       .normalize = c.model.normalize_top_k ? TopkNormalize::over_top_k : TopkNormalize::none},
      ops);
  // Products take operands of one type: the gradient of the logits is rounded as activations are.
  Buffer d_logits_real;
  In<Real> d_logits = in_f32(d_logits_TE, Shape(x.T, x.E));
  if (c.dtype() == DType::bf16) {
    d_logits_real = c.real(Shape(x.T, x.E), "d router logits in bf16");
    cast_real({.from_N = {d_logits_TE.data(), DType::f32, Shape(x.T * x.E)},
               .to_N = c.out(d_logits_real, Shape(x.T * x.E))},
              ops);
    d_logits = c.in(d_logits_real, Shape(x.T, x.E));
  }
  Buffer d_normed_TD = c.real(Shape(x.T, x.D), "d mlp normed");
  sum_rows(c, x.T, s, local ? g.d_x_RD : g.d_returned,
           g.d_shared_TD.empty() ? In<Real>() : c.in(g.d_shared_TD, Shape(x.T, x.D)),
           c.out(d_normed_TD, Shape(x.T, x.D)));
  linear_dgrad({.d_y_TN = d_logits,
                .w_NK = c.dense.weight(*c.tensors.router, Shape(x.E, x.D)),
                .residual_TK = c.in(d_normed_TD, Shape(x.T, x.D)),
                .d_x_TK = c.out(d_normed_TD, Shape(x.T, x.D))},
               ops);
  dense_wgrad(c, g, *c.tensors.router, d_logits, c.in(s.mlp_normed_TD, Shape(x.T, x.D)));
  keep_for_weights(g, d_logits_real.empty() ? d_logits_TE : d_logits_real);
  return d_normed_TD;
}
}  // namespace cambium
