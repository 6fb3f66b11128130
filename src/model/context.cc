#include "src/model/context.h"

#include "kernels/copy.h"
#include "kernels/expert_load.h"
#include "kernels/metric_sum.h"
#include "kernels/permute.h"

namespace cambium {

ContextShare context_share(const Rank& rank) {
  return {.ranks = rank.mesh.cp, .index = rank.at.cp_index};
}

Buffer gather_context(const LayerContext& c, const MicroBatch& batch, In<Real> x_TC) {
  const int64_t T = x_TC[0], C = x_TC[1], rows = T * c.rank.mesh.cp;
  const auto pick = [&](In<Real> from, const Buffer& index, int64_t count, const char* what) {
    Buffer to = c.real(Shape(count, C), what);
    gather_rows({.x_TD = from,
                 .index_M = {index.as<int32_t>(), Shape(count)},
                 .y_MD = c.out(to, Shape(count, C))},
                c.rank.ops);
    return to;
  };
  const Buffer send = pick(x_TC, batch.own_row_T, T, "context send");
  const Buffer received = c.real(Shape(rows, C), "context received");
  c.rank.comm_waits_for_compute();
  c.rank.compute_waits(all_gather({.communicator = *c.rank.context,
                                   .stream = c.rank.comm,
                                   .send = send.data(),
                                   .recv = received.data(),
                                   .count = T * C,
                                   .dtype = c.dtype()}));
  return pick(c.in(received, Shape(rows, C)), batch.context_row_S, rows, "whole sequences");
}

void reduce_context(const LayerContext& c, const MicroBatch& batch, const Buffer& sum_SC,
                    const KeyGradients& d) {
  const int64_t T = d.d_k_TGQ[0], C = d.d_k_TGQ[1] * d.d_k_TGQ[2], count = T * 2 * C;
  const Buffer received = c.rank.activation(4 * count, "received key gradients");
  c.rank.comm_waits_for_compute();
  c.rank.compute_waits(reduce_scatter({.communicator = *c.rank.context,
                                       .stream = c.rank.comm,
                                       .send = sum_SC.data(),
                                       .recv = received.data(),
                                       .count = count}));
  const Buffer rounded = c.real(Shape(T, 2 * C), "key gradients");
  cast_real(
      {.from_N = In<float>(received.f32(), Shape(count)), .to_N = c.out(rounded, Shape(count))},
      c.rank.ops);
  const auto* first = rounded.as<std::byte>();
  for (const Out<Real>& d_x : {d.d_k_TGQ, d.d_v_TGQ}) {
    gather_rows({.x_TD = {first, c.dtype(), Shape(T, C), 2 * C},
                 .index_M = {batch.own_row_T.as<int32_t>(), Shape(T)},
                 .y_MD = {d_x.data, c.dtype(), Shape(T, C), d_x.row_stride}},
                c.rank.ops);
    first += C * dtype_bytes(c.dtype());
  }
}

void fold_context(const LayerContext& c, const MicroBatch& batch, const Buffer& partial_MC,
                  Out<Real> d_x_TGQ) {
  const int64_t C = d_x_TGQ[1] * d_x_TGQ[2], block = c.rank.config.numerics.block_tokens;
  const ContextShare share = context_share(c.rank);
  const int64_t rows = attention_partial_rows(d_x_TGQ[0], batch.sequence_length, block, share);
  const Buffer received = c.rank.activation(4 * rows * C, "received key gradients");
  const std::vector<int64_t> counts(static_cast<size_t>(share.ranks), rows / share.ranks * C);
  c.rank.comm_waits_for_compute();
  c.rank.compute_waits(all_to_all_v({.communicator = *c.rank.context,
                                     .stream = c.rank.comm,
                                     .send = partial_MC.data(),
                                     .recv = received.data(),
                                     .send_counts = counts,
                                     .recv_counts = counts}));
  In<int32_t> document_start;
  if (!batch.document_start_S.empty()) {
    document_start = {batch.document_start_S.as<int32_t>(), Shape(batch.tokens * share.ranks)};
  }
  attention_key_fold({.partial_MC = {received.f32(), Shape(rows, C)},
                      .document_start_S = document_start,
                      .d_x_TGQ = d_x_TGQ,
                      .sequence_length = batch.sequence_length,
                      .block_tokens = block,
                      .share = share},
                     c.rank.ops);
}

Buffer context_fractions(const LayerContext& c, const MicroBatch& batch,
                         In<int32_t> expert_index_TK, FractionOf of) {
  const int64_t E = c.model.experts, K = expert_index_TK[1];
  const int64_t share = batch.sequence_length / c.rank.mesh.cp;
  const int64_t rows = of == FractionOf::all ? batch.tokens : share;
  const int64_t N = batch.tokens / rows;
  const Buffer count_NE = c.rank.activation(4 * N * E, "counts of shared sequences");
  Buffer fraction_NE = c.rank.activation(4 * N * E, "fractions of shared sequences");
  c.rank.zero(count_NE);
  for (int64_t n = 0; n < N; ++n) {
    expert_histogram({.expert_index_TK = {expert_index_TK.pointer() + n * rows * K, Shape(rows, K)},
                      .count_E = {count_NE.as<int32_t>() + n * E, Shape(E)}},
                     c.rank.ops);
  }
  c.rank.comm_waits_for_compute();
  c.rank.compute_waits(all_reduce({.communicator = *c.rank.context,
                                   .stream = c.rank.comm,
                                   .send = count_NE.data(),
                                   .recv = count_NE.data(),
                                   .count = N * E,
                                   .dtype = DType::i32}));
  for (int64_t n = 0; n < N; ++n) {
    count_fraction({.count_E = {count_NE.as<int32_t>() + n * E, Shape(E)},
                    .fraction_E = {fraction_NE.f32() + n * E, Shape(E)}},
                   c.rank.ops);
  }
  return fraction_NE;
}

}  // namespace cambium
