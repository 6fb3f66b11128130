// Stages 2 to 5 (qwen3_moe.h): tokens to the experts' ranks, experts, and back.
#include "src/model/qwen3_moe.h"

#include <numeric>

#include "kernels/combine.h"
#include "kernels/grouped_gemm.h"
#include "kernels/permute.h"
#include "kernels/routing_sort.h"
#include "src/model/layer_tools.h"

namespace cambium {

namespace {

// all-to-all of rows of `width` elements, `counts` rows per rank. Whoever reads them waits for the
// ticket, or for a later one of the comm stream, in a Flight.
Ticket exchange_rows(const LayerContext& c, const void* send, void* recv,
                     const std::vector<int64_t>& send_rows, const std::vector<int64_t>& recv_rows,
                     int64_t width, DType dtype,
                     std::source_location site = std::source_location::current()) {
  std::vector<int64_t> send_counts(send_rows), recv_counts(recv_rows);
  for (int64_t& count : send_counts) count *= width;
  for (int64_t& count : recv_counts) count *= width;
  return all_to_all_v({.communicator = *c.rank.expert,
                       .stream = c.rank.comm,
                       .send = send,
                       .recv = recv,
                       .send_counts = send_counts,
                       .recv_counts = recv_counts,
                       .dtype = dtype,
                       .site = site});
}

// The host wait of an MoE layer: counts that stage 1 exchanged, reused in backward.
void read_counts(const LayerContext& c, DispatchState& d) {
  const int64_t P = c.rank.mesh.ep;
  c.rank.compute_waits(d.counts_ticket);
  const auto* sent = c.rank.download<int32_t>(d.send_count_P2);
  const auto* received = c.rank.download<int32_t>(d.recv_count_P2);
  c.rank.host.wait(c.rank.compute.record());
  if (ShapeOnlyRun* shapes = c.rank.environment.shape_only()) {
    DispatchCounts counts = shapes->dispatch_counts(c.rank.environment.place);
    d.send_tokens = std::move(counts.send_tokens);
    d.send_rows = std::move(counts.send_rows);
    d.recv_tokens = std::move(counts.recv_tokens);
    d.recv_rows = std::move(counts.recv_rows);
  } else {
    for (const auto* counts : {sent, received}) c.rank.landed(counts, 2 * P);
    for (int64_t p = 0; p < P; ++p) {
      d.send_tokens.push_back(sent[2 * p]);
      d.send_rows.push_back(sent[2 * p + 1]);
      d.recv_tokens.push_back(received[2 * p]);
      d.recv_rows.push_back(received[2 * p + 1]);
    }
  }
  auto total = [](const std::vector<int64_t>& counts) {
    return std::accumulate(counts.begin(), counts.end(), int64_t{0});
  };
  d.sent = total(d.send_tokens);
  d.received = total(d.recv_tokens);
  d.rows = total(d.recv_rows);
}

}  // namespace

void Flight::launch(Ticket ticket, std::vector<Buffer> sent) {
  CHECK(is_landed() && !sent.empty());
  ticket_ = ticket;
  sent_ = std::move(sent);
}

void Flight::land(const LayerContext& c, std::source_location site) {
  if (is_landed()) return;
  c.rank.compute_waits(ticket_, site);
  sent_.clear();
}

namespace {

void shared_expert_forward(const LayerContext& c, const MicroBatch& batch, LayerState& s) {
  if (!c.has_shared_expert()) return;
  c.enter(WorkStage::expert, WorkPass::forward, batch.index);
  s.shared_TD = mlp_forward(c, batch, s);
}

void shared_expert_backward(const LayerContext& c, const MicroBatch& batch, LayerState& s,
                            LayerGradients& g) {
  if (!c.has_shared_expert()) return;
  c.enter(WorkStage::expert, WorkPass::backward, batch.index);
  g.d_shared_TD = mlp_backward(c, batch, s, g);
}

}  // namespace

void dispatch_forward(const LayerContext& c, const MicroBatch& batch, LayerState& s) {
  const Extents x(c, batch.tokens);
  c.enter(WorkStage::dispatch, WorkPass::forward, batch.index);
  DispatchState& d = s.dispatch;
  if (x.P == 1) {
    d.sent = d.received = x.T;
    d.rows = x.T * x.K;
    return shared_expert_forward(c, batch, s);
  }
  read_counts(c, d);
  std::vector<Buffer> sent;
  sent.push_back(c.real(Shape(d.sent, x.D), "dispatch send"));
  const void* send_x = sent[0].data();
  const In<int32_t> send_token = in_i32(d.send_token_M, Shape(d.sent));
  gather_rows({.x_TD = c.in(s.mlp_normed_TD, Shape(x.T, x.D)),
               .index_M = send_token,
               .y_MD = c.out(sent[0], Shape(d.sent, x.D))},
              c.rank.ops);
  if (is_exact(c)) {
    // NOTE: the gather moves bits unchanged, so block numbers travel as the floats of their bits.
    sent.push_back(ints(c, d.sent, "dispatch send block"));
    gather_scalars({.x_N = in_f32(batch.token_block_T, Shape(x.T)),
                    .index_M = send_token,
                    .y_M = out_f32(sent[1], Shape(d.sent))},
                   c.rank.ops);
    d.recv_block_M = ints(c, d.received, "received block");
  }
  d.recv_x_MD = c.real(Shape(d.received, x.D), "received tokens");
  d.recv_expert_MK = ints(c, d.received * x.K, "received expert");
  d.recv_weight_MK = floats(c, d.received * x.K, "received weight");
  c.rank.comm_waits_for_compute();
  exchange_rows(c, send_x, d.recv_x_MD.data(), d.send_tokens, d.recv_tokens, x.D, c.dtype());
  exchange_rows(c, d.send_expert_MK.data(), d.recv_expert_MK.data(), d.send_tokens, d.recv_tokens,
                x.K, DType::i32);
  Ticket last = exchange_rows(c, d.send_weight_MK.data(), d.recv_weight_MK.data(), d.send_tokens,
                              d.recv_tokens, x.K, DType::f32);
  if (is_exact(c)) {
    last = exchange_rows(c, sent[1].data(), d.recv_block_M.data(), d.send_tokens, d.recv_tokens, 1,
                         DType::i32);
  }
  d.flight.launch(last, std::move(sent));
  shared_expert_forward(c, batch, s);
}

namespace {

// What the experts' rows are gathered from: local tokens, or received ones.
In<Real> expert_tokens(const LayerContext& c, const LayerState& s) {
  const DispatchState& d = s.dispatch;
  return c.in(c.rank.mesh.ep == 1 ? s.mlp_normed_TD : d.recv_x_MD,
              Shape(d.received, c.model.hidden));
}

}  // namespace

void expert_forward(const LayerContext& c, const MicroBatch& batch, LayerState& s) {
  const Extents x(c, batch.tokens);
  c.enter(WorkStage::expert, WorkPass::forward, batch.index);
  OpContext& ops = c.rank.ops;
  DispatchState& d = s.dispatch;
  ExpertState& m = s.expert;
  d.flight.land(c);
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
  if (is_exact(c) && c.keep != Keep::nothing) {
    m.row_block_R = ints(c, R, "row block");
    gather_row_blocks(
        {.token_block_T = in_i32(local ? batch.token_block_T : d.recv_block_M, Shape(M)),
         .row_token_R = in_i32(m.row_token_R, Shape(R)),
         .row_block_R = out_i32(m.row_block_R, Shape(R))},
        ops);
  }
  m.gate_up_RN = c.real(Shape(R, x.N), "gate and up");
  const Buffer h_RF = c.real(Shape(R, x.F), "h");
  const In<int32_t> offset = in_i32(m.expert_offset_e1, Shape(x.e + 1));
  grouped_up({.x_RD = expert_tokens(c, s),
              .w_up_eND = c.expert->expert_weight(*c.tensors.gate_up, Shape(x.e, x.N, x.D)),
              .expert_offset_e1 = offset,
              .gate_up_RN = c.out(m.gate_up_RN, Shape(R, x.N)),
              .h_RF = c.out(h_RF, Shape(R, x.F)),
              .row_token_R = in_i32(m.row_token_R, Shape(R))},
             ops);
  if (c.keep == Keep::recomputing) return;
  m.y_RD = c.real(Shape(R, x.D), "expert output rows");
  grouped_down({.h_RF = c.in(h_RF, Shape(R, x.F)),
                .w_down_eDF = c.expert->expert_weight(*c.tensors.down, Shape(x.e, x.D, x.F)),
                .expert_offset_e1 = offset,
                .weight_R = in_f32(m.weight_R, Shape(R)),
                .y_RD = c.out(m.y_RD, Shape(R, x.D))},
               ops);
}

namespace {

// Rows made on the expert side go home: exact one per (token, k), fast one partial sum per
// (token, rank). `home` gets what the token side sums. Stage 4, and stage 2's backward.
struct HomeRows {
  Buffer sent;
  Ticket ticket;
};
HomeRows send_home(const LayerContext& c, LayerState& s, const Buffer& rows_RD, Buffer& home) {
  const Extents x(c);
  const DispatchState& d = s.dispatch;
  const bool exact = is_exact(c);
  const int64_t send_rows = exact ? d.rows : d.received;
  Buffer send = c.real(Shape(send_rows, x.D), "combine send");
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
  const auto& counts = exact ? d.send_rows : d.send_tokens;
  const int64_t received = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  home = c.real(Shape(received, x.D), "combine received");
  c.rank.comm_waits_for_compute();
  const Ticket ticket = exchange_rows(c, send.data(), home.data(),
                                      exact ? d.recv_rows : d.recv_tokens, counts, x.D, c.dtype());
  return {std::move(send), ticket};
}

std::vector<Buffer> one_buffer(Buffer buffer) {
  std::vector<Buffer> buffers;
  buffers.push_back(std::move(buffer));
  return buffers;
}

}  // namespace

void combine_forward(const LayerContext& c, const MicroBatch& batch, LayerState& s) {
  c.enter(WorkStage::combine, WorkPass::forward, batch.index);
  if (c.rank.mesh.ep == 1) return;
  HomeRows rows = send_home(c, s, s.expert.y_RD, s.returned);
  s.returning.launch(rows.ticket, one_buffer(std::move(rows.sent)));
  s.expert.y_RD.reset();
}

Buffer aggregate_forward(const LayerContext& c, const MicroBatch& batch, LayerState& s) {
  const Extents x(c, batch.tokens);
  c.enter(WorkStage::aggregate, WorkPass::forward, batch.index);
  s.returning.land(c);
  Buffer out_TD = c.real(Shape(x.T, x.D), "layer output");
  const Buffer& residual_TD = c.has_shared_expert() ? s.shared_TD : s.sum_TD;
  sum_rows(c, x.T, s, x.P == 1 ? s.expert.y_RD : s.returned, c.in(residual_TD, Shape(x.T, x.D)),
           c.out(out_TD, Shape(x.T, x.D)));
  s.shared_TD.reset();
  s.expert.y_RD.reset();
  s.returned.reset();
  return out_TD;
}

void aggregate_backward(const LayerContext& c, const MicroBatch& batch, LayerState& s,
                        LayerGradients& g) {
  c.enter(WorkStage::combine, WorkPass::backward, batch.index);
  if (c.rank.mesh.ep == 1) return shared_expert_backward(c, batch, s, g);
  const Extents x(c, batch.tokens);
  const DispatchState& d = s.dispatch;
  Buffer send = c.real(Shape(d.sent, x.D), "combine backward send");
  gather_rows({.x_TD = c.in(g.d_out_TD, Shape(x.T, x.D)),
               .index_M = in_i32(d.send_token_M, Shape(d.sent)),
               .y_MD = c.out(send, Shape(d.sent, x.D))},
              c.rank.ops);
  g.d_y_MD = c.real(Shape(d.received, x.D), "combine backward received");
  c.rank.comm_waits_for_compute();
  const Ticket arrival =
      exchange_rows(c, send.data(), g.d_y_MD.data(), d.send_tokens, d.recv_tokens, x.D, c.dtype());
  g.arriving.launch(arrival, one_buffer(std::move(send)));
  shared_expert_backward(c, batch, s, g);
}

namespace {

// The gradients that the experts' rows are gathered from.
In<Real> expert_token_gradients(const LayerContext& c, const LayerState& s,
                                const LayerGradients& g) {
  return c.in(c.rank.mesh.ep == 1 ? g.d_out_TD : g.d_y_MD,
              Shape(s.dispatch.received, c.model.hidden));
}

}  // namespace

void expert_backward_input(const LayerContext& c, LayerState& s, LayerGradients& g) {
  c.enter(WorkStage::expert, WorkPass::backward, s.micro_batch);
  g.arriving.land(c);
  const Extents x(c);
  const ExpertState& m = s.expert;
  const int64_t R = s.dispatch.rows;
  const In<int32_t> offset = in_i32(m.expert_offset_e1, Shape(x.e + 1));
  g.d_gate_up_RN = c.real(Shape(R, x.N), "d gate and up");
  g.d_weight_R = floats(c, R, "d row weight");
  g.weighted_h_RF = c.real(Shape(R, x.F), "weighted h");
  grouped_down_dgrad({.d_y_RD = expert_token_gradients(c, s, g),
                      .w_down_eDF = c.expert->expert_weight(*c.tensors.down, Shape(x.e, x.D, x.F)),
                      .gate_up_RN = c.in(m.gate_up_RN, Shape(R, x.N)),
                      .expert_offset_e1 = offset,
                      .weight_R = in_f32(m.weight_R, Shape(R)),
                      .d_gate_up_RN = c.out(g.d_gate_up_RN, Shape(R, x.N)),
                      .d_weight_R = out_f32(g.d_weight_R, Shape(R)),
                      .weighted_h_RF = c.out(g.weighted_h_RF, Shape(R, x.F)),
                      .row_token_R = in_i32(m.row_token_R, Shape(R))},
                     c.rank.ops);
  g.d_x_RD = c.real(Shape(R, x.D), "d expert input rows");
  grouped_up_dgrad({.d_gate_up_RN = c.in(g.d_gate_up_RN, Shape(R, x.N)),
                    .w_up_eND = c.expert->expert_weight(*c.tensors.gate_up, Shape(x.e, x.N, x.D)),
                    .expert_offset_e1 = offset,
                    .d_x_RD = c.out(g.d_x_RD, Shape(R, x.D))},
                   c.rank.ops);
}

void expert_backward_weight(const LayerContext& c, LayerState& s, LayerGradients& g) {
  c.enter(WorkStage::expert, WorkPass::weights, s.micro_batch);
  const Extents x(c);
  const ExpertState& m = s.expert;
  const int64_t R = s.dispatch.rows;
  const In<int32_t> token = in_i32(m.row_token_R, Shape(R));
  const auto wgrad_into = [&](const ParamTensor& tensor, Shape matrix) {
    return GroupedWgradArgs{
        .expert_offset_e1 = in_i32(m.expert_offset_e1, Shape(x.e + 1)),
        .row_block_R = m.row_block_R.empty() ? In<int32_t>() : in_i32(m.row_block_R, Shape(R)),
        .d_w_SeNK = c.expert->grad_slots(tensor, Shape(x.e, matrix[0], matrix[1])),
        .present_Se = c.expert->grad_present(tensor, x.e),
        .target = c.expert->grad_target(tensor, x.e),
        .expert_stride = c.expert->expert_stride(tensor)};
  };
  GroupedWgradArgs down = wgrad_into(*c.tensors.down, Shape(x.D, x.F));
  down.d_y_RN = expert_token_gradients(c, s, g);
  down.d_y_token_R = token;
  down.x_RK = c.in(g.weighted_h_RF, Shape(R, x.F));
  grouped_wgrad(down, c.rank.ops);
  GroupedWgradArgs up = wgrad_into(*c.tensors.gate_up, Shape(x.N, x.D));
  up.d_y_RN = c.in(g.d_gate_up_RN, Shape(R, x.N));
  up.x_RK = expert_tokens(c, s);
  up.x_token_R = token;
  grouped_wgrad(up, c.rank.ops);
  g.d_y_MD.reset();
  g.weighted_h_RF.reset();
  g.d_gate_up_RN.reset();
  s.dispatch.recv_x_MD.reset();
  s.expert.gate_up_RN.reset();
}

void dispatch_backward(const LayerContext& c, LayerState& s, LayerGradients& g) {
  c.enter(WorkStage::dispatch, WorkPass::backward, s.micro_batch);
  if (c.rank.mesh.ep == 1) return;
  const Extents x(c);
  const DispatchState& d = s.dispatch;
  HomeRows rows = send_home(c, s, g.d_x_RD, g.d_returned);
  // Weight gradients go home one per (token, k) in either mode.
  Buffer send = floats(c, d.rows, "d weight send");
  gather_scalars({.x_N = in_f32(g.d_weight_R, Shape(d.rows)),
                  .index_M = in_i32(s.expert.ordered_row_R, Shape(d.rows)),
                  .y_M = out_f32(send, Shape(d.rows))},
                 c.rank.ops);
  const int64_t home = std::accumulate(d.send_rows.begin(), d.send_rows.end(), int64_t{0});
  g.d_returned_weight = floats(c, home, "d weight received");
  c.rank.comm_waits_for_compute();
  const Ticket last = exchange_rows(c, send.data(), g.d_returned_weight.data(), d.recv_rows,
                                    d.send_rows, 1, DType::f32);
  std::vector<Buffer> sent = one_buffer(std::move(rows.sent));
  sent.push_back(std::move(send));
  g.returning.launch(last, std::move(sent));
  g.d_x_RD.reset();
  g.d_weight_R.reset();
}

void release_for_weights(LayerState& s, LayerGradients& g) {
  LayerState kept;
  kept.micro_batch = s.micro_batch;
  kept.normed_TD = std::move(s.normed_TD);
  kept.o_TC = std::move(s.o_TC);
  kept.mlp_normed_TD = std::move(s.mlp_normed_TD);
  kept.dispatch.rows = s.dispatch.rows;
  kept.dispatch.received = s.dispatch.received;
  kept.dispatch.recv_x_MD = std::move(s.dispatch.recv_x_MD);
  kept.expert.expert_offset_e1 = std::move(s.expert.expert_offset_e1);
  kept.expert.row_token_R = std::move(s.expert.row_token_R);
  kept.expert.row_block_R = std::move(s.expert.row_block_R);
  // The experts' gradients are gathered from it with ep = 1; the shared expert's are it.
  const bool reads_d_out = kept.dispatch.recv_x_MD.empty() || !g.d_shared_TD.empty();
  s = std::move(kept);
  if (!reads_d_out) g.d_out_TD.reset();
  for (Buffer* done :
       {&g.d_x_RD, &g.d_weight_R, &g.d_returned, &g.d_returned_weight, &g.d_shared_TD}) {
    done->reset();
  }
}

void layer_backward_weight(const LayerContext& c, LayerState& s, LayerGradients& g) {
  CHECK(g.weights == WeightGradients::later);
  g.weights = WeightGradients::now;
  if (!c.is_dense()) expert_backward_weight(c, s, g);
  c.enter(WorkStage::attend, WorkPass::weights, s.micro_batch);
  for (const DenseWgrad& wait : g.dense_wgrads) {
    dense_wgrad(c, g, *wait.tensor, wait.d_y_TN, wait.x_TK);
  }
  for (GainWgrad& wait : g.gain_wgrads) {
    gain_wgrad(c, g, std::move(wait));
  }
}

}  // namespace cambium
