// The five stages (qwen3_moe.h). tidy: allow file-length: a layer reads in one place.
#include "src/model/qwen3_moe.h"

#include <numeric>

#include "kernels/attention.h"
#include "kernels/balance_loss.h"
#include "kernels/combine.h"
#include "kernels/copy.h"
#include "kernels/dispatch_plan.h"
#include "kernels/expert_load.h"
#include "kernels/grouped_gemm.h"
#include "kernels/leaf_fold.h"
#include "kernels/linear.h"
#include "kernels/metric_sum.h"
#include "kernels/permute.h"
#include "kernels/qk_norm_rope.h"
#include "kernels/rms_norm.h"
#include "kernels/router_topk.h"
#include "kernels/routing_sort.h"
#include "kernels/z_loss.h"

namespace cambium {

DType LayerContext::dtype() const {
  return rank.config.numerics.compute == ComputeType::bf16 ? DType::bf16 : DType::f32;
}

Buffer LayerContext::real(Shape shape, const char* what) const {
  return rank.arena.tensor(shape, dtype(), MemoryClass::activations, what);
}

In<Real> LayerContext::in(const Buffer& buffer, Shape shape, int64_t stride) const {
  return {buffer.data(), dtype(), shape, stride};
}

Out<Real> LayerContext::out(const Buffer& buffer, Shape shape, int64_t stride) const {
  return {buffer.data(), dtype(), shape, stride};
}

namespace {

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

Buffer floats(const LayerContext& c, int64_t count, const char* what) {
  return c.rank.activation(4 * count, what);
}
Buffer ints(const LayerContext& c, int64_t count, const char* what) {
  return c.rank.activation(4 * count, what);
}
In<float> in_f32(const Buffer& buffer, Shape shape) { return {buffer.f32(), shape}; }
Out<float> out_f32(const Buffer& buffer, Shape shape) { return {buffer.f32(), shape}; }
In<int32_t> in_i32(const Buffer& buffer, Shape shape) { return {buffer.as<int32_t>(), shape}; }
Out<int32_t> out_i32(const Buffer& buffer, Shape shape) { return {buffer.as<int32_t>(), shape}; }

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

bool is_exact(const LayerContext& c) {
  return c.rank.config.numerics.reduction == ReductionMode::exact;
}

In<Real> gain(const LayerContext& c, const ParamTensor* tensor) {
  if (tensor == nullptr) return {};
  return c.dense.weight(*tensor, Shape(tensor->elements));
}

// dW of a dense linear layer: y = x w^T.
void dense_wgrad(const LayerContext& c, const MicroBatch& batch, const ParamTensor& tensor,
                 In<Real> d_y_TN, In<Real> x_TK) {
  linear_wgrad({.d_y_TN = d_y_TN,
                .x_TK = x_TK,
                .d_w_SNK = c.dense.grad_slots(tensor, Shape(d_y_TN[1], x_TK[1])),
                .present_S = c.dense.grad_present(tensor, 0),
                .target = c.dense.target(),
                .first_block = batch.first_block,
                .block_tokens = c.rank.config.numerics.block_tokens},
               c.rank.ops);
}

// A norm gain's gradient from its per-block leaves.
void gain_wgrad(const LayerContext& c, const MicroBatch& batch, const ParamTensor& tensor,
                const Buffer& leaf, int64_t rows) {
  leaf_fold({.leaf_BN = in_f32(leaf, Shape(rows, tensor.elements)),
             .d_w_SN = c.dense.grad_slots(tensor, Shape(tensor.elements)),
             .present_S = c.dense.grad_present(tensor, 0),
             .target = c.dense.target(),
             .first_block = batch.first_block},
            c.rank.ops);
}

// Loads of this layer into the step's counts, and the balance losses of design.md section 3.
void balance_forward(const LayerContext& c, const MicroBatch& batch, const Buffer& logits_TE,
                     LayerState& s) {
  const Extents x(c, batch.tokens);
  const BalanceConfig& balance = c.rank.config.balance;
  const InOut<int32_t> count_E(c.router.count_LE.as<int32_t>() + c.layer * x.E, Shape(x.E));
  const In<int32_t> expert_index = in_i32(s.expert_index_TK, Shape(x.T, x.K));
  expert_histogram({.expert_index_TK = expert_index, .count_E = count_E}, c.rank.ops);
  if (balance.loss != BalanceLoss::none && batch.balance_gradient_scale > 0) {
    In<float> fraction;
    CountSource source = CountSource::own_sequence;
    if (balance.loss == BalanceLoss::micro_batch) source = CountSource::micro_batch;
    if (balance.loss == BalanceLoss::global_batch_lagged) {
      source = CountSource::given;
      fraction = {c.router.fraction_LE.f32() + c.layer * x.E, Shape(x.E)};
    }
    Buffer global_count;
    if (balance.loss == BalanceLoss::global_batch) {
      source = CountSource::given;
      global_count = ints(c, x.E, "global counts");
      c.rank.comm_waits_for_compute();
      c.rank.compute_waits(all_reduce({.communicator = *c.rank.data,
                                       .stream = c.rank.comm,
                                       .send = count_E.pointer(),
                                       .recv = global_count.data(),
                                       .count = x.E,
                                       .dtype = DType::i32}));
      count_fraction({.count_E = in_i32(global_count, Shape(x.E)),
                      .fraction_E = out_f32(c.router.global_fraction_E, Shape(x.E))},
                     c.rank.ops);
      fraction = in_f32(c.router.global_fraction_E, Shape(x.E));
    }
    const int64_t blocks = x.T / c.rank.config.numerics.block_tokens;
    const Buffer leaf = floats(c, blocks, "balance loss");
    s.d_probs_TE = floats(c, x.T * x.E, "d probs");
    balance_loss({.probs_TE = in_f32(s.probs_TE, Shape(x.T, x.E)),
                  .expert_index_TK = expert_index,
                  .fraction_E = fraction,
                  .sequence_length = batch.sequence_length,
                  .block_tokens = c.rank.config.numerics.block_tokens,
                  .source = source,
                  .loss_scale = static_cast<float>(balance.loss_weight),
                  .gradient_scale = static_cast<float>(batch.balance_gradient_scale),
                  .loss_leaf_B = out_f32(leaf, Shape(blocks)),
                  .d_probs_TE = out_f32(s.d_probs_TE, Shape(x.T, x.E))},
                 c.rank.ops);
    metric_sum({.value_N = in_f32(leaf, Shape(blocks)),
                .leaf_BM = batch.metric_leaf_BM,
                .column = kMetricBalance},
               c.rank.ops);
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
    metric_sum(
        {.value_N = in_f32(loss, Shape(x.T)), .leaf_BM = batch.metric_leaf_BM, .column = kMetricZ},
        c.rank.ops);
  }
}

void attention_forward(const LayerContext& c, const MicroBatch& batch, LayerState& s) {
  const Extents x(c, batch.tokens);
  OpContext& ops = c.rank.ops;
  s.attn_rstd_T = floats(c, x.T, "attention norm rstd");
  s.normed_TD = c.real(Shape(x.T, x.D), "normed input");
  rms_norm({.x_TD = c.in(s.x_TD, Shape(x.T, x.D)),
            .gain_D = gain(c, c.tensors.attn_norm),
            .y_TD = c.out(s.normed_TD, Shape(x.T, x.D)),
            .rstd_T = out_f32(s.attn_rstd_T, Shape(x.T)),
            .epsilon = static_cast<float>(c.model.norm_epsilon)},
           ops);
  s.qkv_TC = c.real(Shape(x.T, x.C), "qkv");
  linear({.x_TK = c.in(s.normed_TD, Shape(x.T, x.D)),
          .w_NK = c.dense.weight(*c.tensors.qkv, Shape(x.C, x.D)),
          .y_TN = c.out(s.qkv_TC, Shape(x.T, x.C))},
         ops);
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
  attention({.q_THQ = c.in(s.q_THQ, Shape(x.T, x.H, x.Q)),
             .k_TGQ = c.in(s.k_TGQ, Shape(x.T, x.G, x.Q)),
             .v_TGQ = qkv_part<In<Real>>(c, s.qkv_TC, x, (x.H + x.G) * x.Q, x.G),
             .document_start_T = batch.document_start_T.empty()
                                     ? In<int32_t>()
                                     : in_i32(batch.document_start_T, Shape(x.T)),
             .o_THQ = c.out(s.o_TC, Shape(x.T, x.H, x.Q)),
             .lse_TH = out_f32(s.lse_TH, Shape(x.T, x.H)),
             .sequence_length = batch.sequence_length,
             .block_tokens = c.rank.config.numerics.block_tokens,
             .scale = attention_scale(x.Q)},
            ops);
  s.sum_TD = c.real(Shape(x.T, x.D), "residual stream");
  linear({.x_TK = c.in(s.o_TC, Shape(x.T, x.H * x.Q)),
          .w_NK = c.dense.weight(*c.tensors.attn_out, Shape(x.D, x.H * x.Q)),
          .residual_TN = c.in(s.x_TD, Shape(x.T, x.D)),
          .y_TN = c.out(s.sum_TD, Shape(x.T, x.D))},
         ops);
}

void router_forward(const LayerContext& c, const MicroBatch& batch, LayerState& s) {
  const Extents x(c, batch.tokens);
  OpContext& ops = c.rank.ops;
  s.mlp_rstd_T = floats(c, x.T, "mlp norm rstd");
  s.mlp_normed_TD = c.real(Shape(x.T, x.D), "mlp normed");
  rms_norm({.x_TD = c.in(s.sum_TD, Shape(x.T, x.D)),
            .gain_D = gain(c, c.tensors.mlp_norm),
            .y_TD = c.out(s.mlp_normed_TD, Shape(x.T, x.D)),
            .rstd_T = out_f32(s.mlp_rstd_T, Shape(x.T)),
            .epsilon = static_cast<float>(c.model.norm_epsilon)},
           ops);
  const Buffer logits_TE = floats(c, x.T * x.E, "router logits");
  linear({.x_TK = c.in(s.mlp_normed_TD, Shape(x.T, x.D)),
          .w_NK = c.dense.weight(*c.tensors.router, Shape(x.E, x.D)),
          .y_TN = out_f32(logits_TE, Shape(x.T, x.E))},
         ops);
  s.probs_TE = floats(c, x.T * x.E, "router probs");
  s.expert_index_TK = ints(c, x.T * x.K, "expert index");
  s.weight_TK = floats(c, x.T * x.K, "routing weight");
  In<float> bias;
  if (!c.router.select_bias_LE.empty()) {
    bias = {c.router.select_bias_LE.f32() + c.layer * x.E, Shape(x.E)};
  }
  router_topk(
      {.logits_TE = in_f32(logits_TE, Shape(x.T, x.E)),
       .select_bias_E = bias,
       .probs_TE = out_f32(s.probs_TE, Shape(x.T, x.E)),
       .expert_index_TK = out_i32(s.expert_index_TK, Shape(x.T, x.K)),
       .weight_TK = out_f32(s.weight_TK, Shape(x.T, x.K)),
       .normalize = c.model.normalize_top_k ? TopkNormalize::over_top_k : TopkNormalize::none},
      ops);
  balance_forward(c, batch, logits_TE, s);
}

}  // namespace

void attend_forward(const LayerContext& c, const MicroBatch& batch, Buffer x_TD, LayerState& s) {
  const Extents x(c, batch.tokens);
  s.x_TD = std::move(x_TD);
  attention_forward(c, batch, s);
  router_forward(c, batch, s);
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

namespace {

// all-to-all of rows of `width` elements, `counts` rows per rank; compute waits for it.
void exchange_rows(const LayerContext& c, const void* send, void* recv,
                   const std::vector<int64_t>& send_rows, const std::vector<int64_t>& recv_rows,
                   int64_t width, DType dtype,
                   std::source_location site = std::source_location::current()) {
  std::vector<int64_t> send_counts(send_rows), recv_counts(recv_rows);
  for (int64_t& count : send_counts) count *= width;
  for (int64_t& count : recv_counts) count *= width;
  c.rank.compute_waits(all_to_all_v({.communicator = *c.rank.expert,
                                     .stream = c.rank.comm,
                                     .send = send,
                                     .recv = recv,
                                     .send_counts = send_counts,
                                     .recv_counts = recv_counts,
                                     .dtype = dtype,
                                     .site = site}));
}

// The host wait of an MoE layer: counts that stage 1 exchanged, reused in backward.
void read_counts(const LayerContext& c, DispatchState& d) {
  const int64_t P = c.rank.mesh.ep;
  c.rank.host.wait(d.counts_ticket);
  const auto* sent = d.send_count_P2.as<int32_t>();
  const auto* received = d.recv_count_P2.as<int32_t>();
  for (int64_t p = 0; p < P; ++p) {
    d.send_tokens.push_back(sent[2 * p]);
    d.send_rows.push_back(sent[2 * p + 1]);
    d.recv_tokens.push_back(received[2 * p]);
    d.recv_rows.push_back(received[2 * p + 1]);
  }
  auto total = [](const std::vector<int64_t>& counts) {
    return std::accumulate(counts.begin(), counts.end(), int64_t{0});
  };
  d.sent = total(d.send_tokens);
  d.received = total(d.recv_tokens);
  d.rows = total(d.recv_rows);
}

}  // namespace

void dispatch_forward(const LayerContext& c, const MicroBatch& batch, LayerState& s) {
  const Extents x(c, batch.tokens);
  DispatchState& d = s.dispatch;
  if (x.P == 1) {
    d.sent = d.received = x.T;
    d.rows = x.T * x.K;
    return;
  }
  read_counts(c, d);
  const Buffer send_x = c.real(Shape(d.sent, x.D), "dispatch send");
  const In<int32_t> send_token = in_i32(d.send_token_M, Shape(d.sent));
  gather_rows({.x_TD = c.in(s.mlp_normed_TD, Shape(x.T, x.D)),
               .index_M = send_token,
               .y_MD = c.out(send_x, Shape(d.sent, x.D))},
              c.rank.ops);
  Buffer send_block;
  if (is_exact(c)) {
    // NOTE: the gather moves bits unchanged, so block numbers travel as the floats of their bits.
    send_block = ints(c, d.sent, "dispatch send block");
    gather_scalars({.x_N = in_f32(batch.token_block_T, Shape(x.T)),
                    .index_M = send_token,
                    .y_M = out_f32(send_block, Shape(d.sent))},
                   c.rank.ops);
    d.recv_block_M = ints(c, d.received, "received block");
  }
  d.recv_x_MD = c.real(Shape(d.received, x.D), "received tokens");
  d.recv_expert_MK = ints(c, d.received * x.K, "received expert");
  d.recv_weight_MK = floats(c, d.received * x.K, "received weight");
  c.rank.comm_waits_for_compute();
  exchange_rows(c, send_x.data(), d.recv_x_MD.data(), d.send_tokens, d.recv_tokens, x.D, c.dtype());
  exchange_rows(c, d.send_expert_MK.data(), d.recv_expert_MK.data(), d.send_tokens, d.recv_tokens,
                x.K, DType::i32);
  exchange_rows(c, d.send_weight_MK.data(), d.recv_weight_MK.data(), d.send_tokens, d.recv_tokens,
                x.K, DType::f32);
  if (is_exact(c)) {
    exchange_rows(c, send_block.data(), d.recv_block_M.data(), d.send_tokens, d.recv_tokens, 1,
                  DType::i32);
  }
}

void expert_forward(const LayerContext& c, const MicroBatch& batch, LayerState& s, Keep keep) {
  const Extents x(c, batch.tokens);
  OpContext& ops = c.rank.ops;
  const DispatchState& d = s.dispatch;
  ExpertState& m = s.expert;
  const int64_t M = d.received, R = d.rows;
  const bool local = x.P == 1;
  m.expert_offset_e1 = ints(c, x.e + 1, "expert offset");
  m.row_token_R = ints(c, R, "row token");
  m.row_slot_R = ints(c, R, "row slot");
  m.ordered_row_R = ints(c, R, "ordered row");
  m.slot_row_MK = ints(c, M * x.K, "slot row");
  routing_sort(
      {.expert_index_TK = in_i32(local ? s.expert_index_TK : d.recv_expert_MK, Shape(M, x.K)),
       .experts = x.e,
       .expert_offset_e1 = out_i32(m.expert_offset_e1, Shape(x.e + 1)),
       .row_token_R = out_i32(m.row_token_R, Shape(R)),
       .row_slot_R = out_i32(m.row_slot_R, Shape(R)),
       .ordered_row_R = out_i32(m.ordered_row_R, Shape(R)),
       .slot_row_TK = out_i32(m.slot_row_MK, Shape(M, x.K)),
       .order = c.rank.has_fault("routing_order") ? RoutingOrder::reversed_within_expert
                                                  : RoutingOrder::stable},
      ops);
  m.weight_R = floats(c, R, "row weight");
  gather_scalars({.x_N = in_f32(local ? s.weight_TK : d.recv_weight_MK, Shape(M * x.K)),
                  .index_M = in_i32(m.row_slot_R, Shape(R)),
                  .y_M = out_f32(m.weight_R, Shape(R))},
                 ops);
  if (is_exact(c) && keep == Keep::for_backward) {
    m.row_block_R = ints(c, R, "row block");
    gather_row_blocks(
        {.token_block_T = in_i32(local ? batch.token_block_T : d.recv_block_M, Shape(M)),
         .row_token_R = in_i32(m.row_token_R, Shape(R)),
         .row_block_R = out_i32(m.row_block_R, Shape(R))},
        ops);
  }
  m.x_RD = c.real(Shape(R, x.D), "expert input rows");
  gather_rows({.x_TD = c.in(local ? s.mlp_normed_TD : d.recv_x_MD, Shape(M, x.D)),
               .index_M = in_i32(m.row_token_R, Shape(R)),
               .y_MD = c.out(m.x_RD, Shape(R, x.D))},
              ops);
  m.gate_up_RN = c.real(Shape(R, x.N), "gate and up");
  const Buffer h_RF = c.real(Shape(R, x.F), "h");
  const In<int32_t> offset = in_i32(m.expert_offset_e1, Shape(x.e + 1));
  grouped_up({.x_RD = c.in(m.x_RD, Shape(R, x.D)),
              .w_up_eND = c.expert.expert_weight(*c.tensors.gate_up, Shape(x.e, x.N, x.D)),
              .expert_offset_e1 = offset,
              .gate_up_RN = c.out(m.gate_up_RN, Shape(R, x.N)),
              .h_RF = c.out(h_RF, Shape(R, x.F))},
             ops);
  m.y_RD = c.real(Shape(R, x.D), "expert output rows");
  grouped_down({.h_RF = c.in(h_RF, Shape(R, x.F)),
                .w_down_eDF = c.expert.expert_weight(*c.tensors.down, Shape(x.e, x.D, x.F)),
                .expert_offset_e1 = offset,
                .weight_R = in_f32(m.weight_R, Shape(R)),
                .y_RD = c.out(m.y_RD, Shape(R, x.D))},
               ops);
}

namespace {

// Rows made on the expert side go home: exact one per (token, k), fast one partial sum per
// (token, rank). Returns what the token side sums. Stage 4, and stage 2's backward.
Buffer send_home(const LayerContext& c, LayerState& s, const Buffer& rows_RD) {
  const Extents x(c);
  const DispatchState& d = s.dispatch;
  const bool exact = is_exact(c);
  const int64_t send_rows = exact ? d.rows : d.received;
  const Buffer send = c.real(Shape(send_rows, x.D), "combine send");
  if (exact) {
    gather_rows({.x_TD = c.in(rows_RD, Shape(d.rows, x.D)),
                 .index_M = in_i32(s.expert.ordered_row_R, Shape(d.rows)),
                 .y_MD = c.out(send, Shape(d.rows, x.D))},
                c.rank.ops);
  } else {
    combine_rows({.y_RD = c.in(rows_RD, Shape(d.rows, x.D)),
                  .row_index_TK = in_i32(s.expert.slot_row_MK, Shape(d.received, x.K)),
                  .out_TD = c.out(send, Shape(d.received, x.D))},
                 c.rank.ops);
  }
  const auto& home = exact ? d.send_rows : d.send_tokens;
  const int64_t received = std::accumulate(home.begin(), home.end(), int64_t{0});
  Buffer recv = c.real(Shape(received, x.D), "combine received");
  c.rank.comm_waits_for_compute();
  exchange_rows(c, send.data(), recv.data(), exact ? d.recv_rows : d.recv_tokens, home, x.D,
                c.dtype());
  return recv;
}

// Sums what came home (or the local rows) per token and adds the residual.
void sum_rows(const LayerContext& c, int64_t tokens, LayerState& s, const Buffer& rows,
              In<Real> residual_TD, Out<Real> out_TD) {
  const Extents x(c, tokens);
  const DispatchState& d = s.dispatch;
  const int64_t home_rows = x.P == 1 || is_exact(c) ? x.T * x.K : d.sent;
  In<int32_t> index = in_i32(s.expert.slot_row_MK, Shape(x.T, x.K));
  if (x.P > 1) {
    index = is_exact(c) ? in_i32(d.return_row_TK, Shape(x.T, x.K))
                        : in_i32(d.token_part_TP, Shape(x.T, x.P));
  }
  combine_rows({.y_RD = c.in(rows, Shape(home_rows, x.D)),
                .row_index_TK = index,
                .residual_TD = residual_TD,
                .out_TD = out_TD},
               c.rank.ops);
}

}  // namespace

void combine_forward(const LayerContext& c, const MicroBatch&, LayerState& s) {
  if (c.rank.mesh.ep == 1) return;
  s.returned = send_home(c, s, s.expert.y_RD);
  s.expert.y_RD.reset();
}

Buffer aggregate_forward(const LayerContext& c, const MicroBatch& batch, LayerState& s) {
  const Extents x(c, batch.tokens);
  Buffer out_TD = c.real(Shape(x.T, x.D), "layer output");
  sum_rows(c, x.T, s, x.P == 1 ? s.expert.y_RD : s.returned, c.in(s.sum_TD, Shape(x.T, x.D)),
           c.out(out_TD, Shape(x.T, x.D)));
  s.expert.y_RD.reset();
  s.returned.reset();
  return out_TD;
}

void aggregate_backward(const LayerContext& c, const MicroBatch& batch, LayerState& s,
                        LayerGradients& g) {
  const Extents x(c, batch.tokens);
  const DispatchState& d = s.dispatch;
  Buffer recv;
  if (x.P > 1) {
    const Buffer send = c.real(Shape(d.sent, x.D), "combine backward send");
    gather_rows({.x_TD = c.in(g.d_out_TD, Shape(x.T, x.D)),
                 .index_M = in_i32(d.send_token_M, Shape(d.sent)),
                 .y_MD = c.out(send, Shape(d.sent, x.D))},
                c.rank.ops);
    recv = c.real(Shape(d.received, x.D), "combine backward received");
    c.rank.comm_waits_for_compute();
    exchange_rows(c, send.data(), recv.data(), d.send_tokens, d.recv_tokens, x.D, c.dtype());
  }
  g.d_y_RD = c.real(Shape(d.rows, x.D), "d expert output rows");
  gather_rows({.x_TD = c.in(x.P == 1 ? g.d_out_TD : recv, Shape(d.received, x.D)),
               .index_M = in_i32(s.expert.row_token_R, Shape(d.rows)),
               .y_MD = c.out(g.d_y_RD, Shape(d.rows, x.D))},
              c.rank.ops);
}

void expert_backward_input(const LayerContext& c, LayerState& s, LayerGradients& g) {
  const Extents x(c);
  const ExpertState& m = s.expert;
  const int64_t R = s.dispatch.rows;
  const In<int32_t> offset = in_i32(m.expert_offset_e1, Shape(x.e + 1));
  g.d_gate_up_RN = c.real(Shape(R, x.N), "d gate and up");
  g.d_weight_R = floats(c, R, "d row weight");
  g.weighted_h_RF = c.real(Shape(R, x.F), "weighted h");
  grouped_down_dgrad({.d_y_RD = c.in(g.d_y_RD, Shape(R, x.D)),
                      .w_down_eDF = c.expert.expert_weight(*c.tensors.down, Shape(x.e, x.D, x.F)),
                      .gate_up_RN = c.in(m.gate_up_RN, Shape(R, x.N)),
                      .expert_offset_e1 = offset,
                      .weight_R = in_f32(m.weight_R, Shape(R)),
                      .d_gate_up_RN = c.out(g.d_gate_up_RN, Shape(R, x.N)),
                      .d_weight_R = out_f32(g.d_weight_R, Shape(R)),
                      .weighted_h_RF = c.out(g.weighted_h_RF, Shape(R, x.F))},
                     c.rank.ops);
  g.d_x_RD = c.real(Shape(R, x.D), "d expert input rows");
  grouped_up_dgrad({.d_gate_up_RN = c.in(g.d_gate_up_RN, Shape(R, x.N)),
                    .w_up_eND = c.expert.expert_weight(*c.tensors.gate_up, Shape(x.e, x.N, x.D)),
                    .expert_offset_e1 = offset,
                    .d_x_RD = c.out(g.d_x_RD, Shape(R, x.D))},
                   c.rank.ops);
}

namespace {

void grouped_expert_wgrad(const LayerContext& c, const ExpertState& m, const ParamTensor& tensor,
                          In<Real> d_y_RN, In<Real> x_RK, int64_t experts) {
  grouped_wgrad(
      {.d_y_RN = d_y_RN,
       .x_RK = x_RK,
       .expert_offset_e1 = in_i32(m.expert_offset_e1, Shape(experts + 1)),
       .row_block_R = m.row_block_R.empty() ? In<int32_t>() : in_i32(m.row_block_R, Shape(x_RK[0])),
       .d_w_SeNK = c.expert.grad_slots(tensor, Shape(experts, d_y_RN[1], x_RK[1])),
       .present_Se = c.expert.grad_present(tensor, experts),
       .target = c.expert.target(),
       .expert_stride = c.expert.expert_stride(tensor)},
      c.rank.ops);
}

}  // namespace

void expert_backward_weight(const LayerContext& c, LayerState& s, LayerGradients& g) {
  const Extents x(c);
  const int64_t R = s.dispatch.rows;
  grouped_expert_wgrad(c, s.expert, *c.tensors.down, c.in(g.d_y_RD, Shape(R, x.D)),
                       c.in(g.weighted_h_RF, Shape(R, x.F)), x.e);
  grouped_expert_wgrad(c, s.expert, *c.tensors.gate_up, c.in(g.d_gate_up_RN, Shape(R, x.N)),
                       c.in(s.expert.x_RD, Shape(R, x.D)), x.e);
  g.d_y_RD.reset();
  g.weighted_h_RF.reset();
  g.d_gate_up_RN.reset();
  s.expert.x_RD.reset();
  s.expert.gate_up_RN.reset();
}

void dispatch_backward(const LayerContext& c, LayerState& s, LayerGradients& g) {
  if (c.rank.mesh.ep == 1) return;
  const Extents x(c);
  const DispatchState& d = s.dispatch;
  g.d_returned = send_home(c, s, g.d_x_RD);
  // Weight gradients go home one per (token, k) in either mode.
  const Buffer send = floats(c, d.rows, "d weight send");
  gather_scalars({.x_N = in_f32(g.d_weight_R, Shape(d.rows)),
                  .index_M = in_i32(s.expert.ordered_row_R, Shape(d.rows)),
                  .y_M = out_f32(send, Shape(d.rows))},
                 c.rank.ops);
  const int64_t home = std::accumulate(d.send_rows.begin(), d.send_rows.end(), int64_t{0});
  g.d_returned_weight = floats(c, home, "d weight received");
  c.rank.comm_waits_for_compute();
  exchange_rows(c, send.data(), g.d_returned_weight.data(), d.recv_rows, d.send_rows, 1,
                DType::f32);
  g.d_x_RD.reset();
  g.d_weight_R.reset();
}

namespace {

// Gradient of the second norm's output: the experts' part, then the router's on top.
Buffer router_backward(const LayerContext& c, const MicroBatch& batch, LayerState& s,
                       LayerGradients& g) {
  const Extents x(c, batch.tokens);
  OpContext& ops = c.rank.ops;
  const bool local = x.P == 1;
  const Buffer d_weight_TK = floats(c, x.T * x.K, "d routing weight");
  gather_scalars(
      {.x_N = in_f32(local ? g.d_weight_R : g.d_returned_weight, Shape(x.T * x.K)),
       .index_M = in_i32(local ? s.expert.slot_row_MK : s.dispatch.return_row_TK, Shape(x.T * x.K)),
       .y_M = out_f32(d_weight_TK, Shape(x.T * x.K))},
      ops);
  const Buffer d_logits_TE = floats(c, x.T * x.E, "d router logits");
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
  Buffer d_normed_TD = c.real(Shape(x.T, x.D), "d mlp normed");
  sum_rows(c, x.T, s, local ? g.d_x_RD : g.d_returned, {}, c.out(d_normed_TD, Shape(x.T, x.D)));
  linear_dgrad({.d_y_TN = in_f32(d_logits_TE, Shape(x.T, x.E)),
                .w_NK = c.dense.weight(*c.tensors.router, Shape(x.E, x.D)),
                .residual_TK = c.in(d_normed_TD, Shape(x.T, x.D)),
                .d_x_TK = c.out(d_normed_TD, Shape(x.T, x.D))},
               ops);
  dense_wgrad(c, batch, *c.tensors.router, in_f32(d_logits_TE, Shape(x.T, x.E)),
              c.in(s.mlp_normed_TD, Shape(x.T, x.D)));
  return d_normed_TD;
}

// Backward of an RMSNorm whose input is also the residual stream.
Buffer norm_backward(const LayerContext& c, const MicroBatch& batch, const ParamTensor& tensor,
                     const Buffer& d_y_TD, const Buffer& x_TD, const Buffer& rstd_T,
                     const Buffer& d_residual_TD) {
  const Extents x(c, batch.tokens);
  const int64_t block = c.rank.config.numerics.block_tokens, blocks = x.T / block;
  Buffer d_x_TD = c.real(Shape(x.T, x.D), "d norm input");
  const Buffer leaf = floats(c, blocks * x.D, "d gain leaves");
  rms_norm_backward({.d_y_TD = c.in(d_y_TD, Shape(x.T, x.D)),
                     .x_TD = c.in(x_TD, Shape(x.T, x.D)),
                     .gain_D = gain(c, &tensor),
                     .rstd_T = in_f32(rstd_T, Shape(x.T)),
                     .d_residual_TD = c.in(d_residual_TD, Shape(x.T, x.D)),
                     .d_x_TD = c.out(d_x_TD, Shape(x.T, x.D)),
                     .d_gain_leaf_BD = out_f32(leaf, Shape(blocks, x.D)),
                     .block_tokens = block},
                    c.rank.ops);
  gain_wgrad(c, batch, tensor, leaf, blocks);
  return d_x_TD;
}

// From the gradient of the attention block's output to that of the qkv projection's output.
Buffer attention_backward_qkv(const LayerContext& c, const MicroBatch& batch, LayerState& s,
                              const Buffer& d_sum_TD) {
  const Extents x(c, batch.tokens);
  OpContext& ops = c.rank.ops;
  const Buffer d_o = c.real(Shape(x.T, x.H, x.Q), "d attention output");
  linear_dgrad({.d_y_TN = c.in(d_sum_TD, Shape(x.T, x.D)),
                .w_NK = c.dense.weight(*c.tensors.attn_out, Shape(x.D, x.H * x.Q)),
                .d_x_TK = c.out(d_o, Shape(x.T, x.H * x.Q))},
               ops);
  dense_wgrad(c, batch, *c.tensors.attn_out, c.in(d_sum_TD, Shape(x.T, x.D)),
              c.in(s.o_TC, Shape(x.T, x.H * x.Q)));
  const Buffer d_q = c.real(Shape(x.T, x.H, x.Q), "d q");
  const Buffer d_k = c.real(Shape(x.T, x.G, x.Q), "d k");
  Buffer d_qkv = c.real(Shape(x.T, x.C), "d qkv");
  const Buffer delta = floats(c, x.T * x.H, "attention delta");
  attention_backward({.q_THQ = c.in(s.q_THQ, Shape(x.T, x.H, x.Q)),
                      .k_TGQ = c.in(s.k_TGQ, Shape(x.T, x.G, x.Q)),
                      .v_TGQ = qkv_part<In<Real>>(c, s.qkv_TC, x, (x.H + x.G) * x.Q, x.G),
                      .o_THQ = c.in(s.o_TC, Shape(x.T, x.H, x.Q)),
                      .d_o_THQ = c.in(d_o, Shape(x.T, x.H, x.Q)),
                      .lse_TH = in_f32(s.lse_TH, Shape(x.T, x.H)),
                      .document_start_T = batch.document_start_T.empty()
                                              ? In<int32_t>()
                                              : in_i32(batch.document_start_T, Shape(x.T)),
                      .d_q_THQ = c.out(d_q, Shape(x.T, x.H, x.Q)),
                      .d_k_TGQ = c.out(d_k, Shape(x.T, x.G, x.Q)),
                      .d_v_TGQ = qkv_part<Out<Real>>(c, d_qkv, x, (x.H + x.G) * x.Q, x.G),
                      .delta_TH = out_f32(delta, Shape(x.T, x.H)),
                      .sequence_length = batch.sequence_length,
                      .block_tokens = c.rank.config.numerics.block_tokens,
                      .scale = attention_scale(x.Q)},
                     ops);
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
    gain_wgrad(c, batch, *c.tensors.q_norm, q_leaf, blocks);
    gain_wgrad(c, batch, *c.tensors.k_norm, k_leaf, blocks);
  }
  return d_qkv;
}

}  // namespace

Buffer attend_backward(const LayerContext& c, const MicroBatch& batch, LayerState& s,
                       LayerGradients& g) {
  const Extents x(c, batch.tokens);
  const Buffer d_mlp_normed = router_backward(c, batch, s, g);
  const Buffer d_sum_TD = norm_backward(c, batch, *c.tensors.mlp_norm, d_mlp_normed, s.sum_TD,
                                        s.mlp_rstd_T, g.d_out_TD);
  const Buffer d_qkv = attention_backward_qkv(c, batch, s, d_sum_TD);
  const Buffer d_normed = c.real(Shape(x.T, x.D), "d normed input");
  linear_dgrad({.d_y_TN = c.in(d_qkv, Shape(x.T, x.C)),
                .w_NK = c.dense.weight(*c.tensors.qkv, Shape(x.C, x.D)),
                .d_x_TK = c.out(d_normed, Shape(x.T, x.D))},
               c.rank.ops);
  dense_wgrad(c, batch, *c.tensors.qkv, c.in(d_qkv, Shape(x.T, x.C)),
              c.in(s.normed_TD, Shape(x.T, x.D)));
  return norm_backward(c, batch, *c.tensors.attn_norm, d_normed, s.x_TD, s.attn_rstd_T, d_sum_TD);
}

}  // namespace cambium
