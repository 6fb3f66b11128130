#include "src/model/context.h"

#include <utility>

#include "kernels/copy.h"
#include "kernels/expert_load.h"
#include "kernels/metric_sum.h"
#include "kernels/permute.h"

namespace cambium {

ContextShare context_share(const Rank& rank) {
  return {.ranks = rank.mesh.cp, .index = rank.at.cp_index};
}

namespace {

void compact_rows(const LayerContext& c, const MicroBatch& batch, In<Real> x_TC, Out<Real> y_TC) {
  gather_rows(
      {.x_TD = x_TC, .index_M = {batch.own_row_T.as<int32_t>(), Shape(x_TC[0])}, .y_MD = y_TC},
      c.rank.ops);
}

// `count` elements to the rank `hops` further, and as many from the one as far behind.
struct RingMessage {
  const void* send = nullptr;
  void* recv = nullptr;
  int64_t count = 0;
};
Ticket pass_on(const LayerContext& c, std::span<const RingMessage> messages, int64_t hops,
               DType dtype) {
  const ContextShare share = context_share(c.rank);
  const auto next = static_cast<int>((share.index + hops) % share.ranks);
  const auto before = static_cast<int>((share.index - hops + share.ranks) % share.ranks);
  std::vector<Message> sends, recvs;
  for (const RingMessage& message : messages) {
    sends.push_back({next, const_cast<void*>(message.send), message.count});
    recvs.push_back({before, message.recv, message.count});
  }
  c.rank.comm_waits_for_compute();
  return exchange({.communicator = *c.rank.context,
                   .stream = c.rank.comm,
                   .sends = sends,
                   .recvs = recvs,
                   .dtype = dtype});
}

// This rank's keys and values, or those that it got, go on by a hop.
Ticket pass_keys_on(const LayerContext& c, std::array<RingMessage, 2> messages, int64_t hop) {
  // The fault `swapped_send`: two messages of this rank to one peer change places.
  if (hop == 0 && c.rank.has_fault("swapped_send")) std::swap(messages[0].send, messages[1].send);
  return pass_on(c, messages, 1, c.dtype());
}

// Rows [rank][T, C] in position order.
Buffer in_position_order(const LayerContext& c, const MicroBatch& batch, const Buffer& by_rank,
                         Shape shape) {
  Buffer whole = c.real(shape, "whole sequences");
  gather_rows({.x_TD = c.in(by_rank, shape),
               .index_M = {batch.context_row_S.as<int32_t>(), Shape(shape[0])},
               .y_MD = c.out(whole, shape)},
              c.rank.ops);
  return whole;
}

// The same bytes as two all-gathers, hop by hop: what came is kept, and goes on.
std::pair<Buffer, Buffer> gather_by_ring(const LayerContext& c, const MicroBatch& batch,
                                         std::span<const In<Real>, 2> own) {
  const ContextShare share = context_share(c.rank);
  const int64_t T = own[0][0], C = own[0][1], count = T * C;
  const Shape whole(T * share.ranks, C);
  Buffer all[] = {c.real(whole, "context received"), c.real(whole, "context received")};
  const auto part_of = [&](const Buffer& rows, int64_t rank) {
    return rows.as<std::byte>() + rank * count * dtype_bytes(c.dtype());
  };
  for (int i = 0; i < 2; ++i) {
    compact_rows(c, batch, own[i], {part_of(all[i], share.index), c.dtype(), Shape(T, C)});
  }
  for (int64_t hop = 0; hop + 1 < share.ranks; ++hop) {
    const int64_t held = (share.index - hop + share.ranks) % share.ranks;
    const int64_t next = (held - 1 + share.ranks) % share.ranks;
    const auto message = [&](const Buffer& rows) {
      return RingMessage{part_of(rows, held), part_of(rows, next), count};
    };
    c.rank.compute_waits(pass_keys_on(c, {message(all[0]), message(all[1])}, hop));
  }
  Buffer k_SC = in_position_order(c, batch, all[0], whole);
  all[0].reset();
  return {std::move(k_SC), in_position_order(c, batch, all[1], whole)};
}

}  // namespace

std::pair<Buffer, Buffer> gather_context(const LayerContext& c, const MicroBatch& batch,
                                         const KeyRows& own) {
  const int64_t T = own.k_TGQ[0], C = own.k_TGQ[1] * own.k_TGQ[2];
  const In<Real> rows[] = {{own.k_TGQ.data, c.dtype(), Shape(T, C), own.k_TGQ.row_stride},
                           {own.v_TGQ.data, c.dtype(), Shape(T, C), own.v_TGQ.row_stride}};
  if (c.rank.config.parallel.context == ContextExchange::ring) {
    return gather_by_ring(c, batch, rows);
  }
  const auto gather = [&](In<Real> x_TC) {
    const Buffer send = c.real(Shape(T, C), "context send");
    compact_rows(c, batch, x_TC, c.out(send, Shape(T, C)));
    const Shape whole(T * c.rank.mesh.cp, C);
    const Buffer received = c.real(whole, "context received");
    c.rank.comm_waits_for_compute();
    c.rank.compute_waits(all_gather({.communicator = *c.rank.context,
                                     .stream = c.rank.comm,
                                     .send = send.data(),
                                     .recv = received.data(),
                                     .count = T * C,
                                     .dtype = c.dtype()}));
    return in_position_order(c, batch, received, whole);
  };
  Buffer k_SC = gather(rows[0]);
  return {std::move(k_SC), gather(rows[1])};
}

namespace {

// dK and dV of this rank's keys from their sums [T, 2 G Q], a key's dK beside its dV.
void store_key_gradients(const LayerContext& c, const MicroBatch& batch, const Buffer& sum,
                         const KeyGradients& d) {
  const int64_t T = d.d_k_TGQ[0], C = d.d_k_TGQ[1] * d.d_k_TGQ[2];
  const Buffer rounded = c.real(Shape(T, 2 * C), "key gradients");
  cast_real(
      {.from_N = In<float>(sum.f32(), Shape(T * 2 * C)), .to_N = c.out(rounded, Shape(T * 2 * C))},
      c.rank.ops);
  const auto* first = rounded.as<std::byte>();
  for (const Out<Real>& d_x : {d.d_k_TGQ, d.d_v_TGQ}) {
    compact_rows(c, batch, {first, c.dtype(), Shape(T, C), 2 * C},
                 {d_x.data, c.dtype(), Shape(T, C), d_x.row_stride});
    first += C * dtype_bytes(c.dtype());
  }
}

}  // namespace

void reduce_context(const LayerContext& c, const MicroBatch& batch, const Buffer& sum_SC,
                    const KeyGradients& d) {
  const int64_t count = d.d_k_TGQ[0] * 2 * d.d_k_TGQ[1] * d.d_k_TGQ[2];
  const Buffer received = c.rank.activation(4 * count, "received key gradients");
  c.rank.comm_waits_for_compute();
  c.rank.compute_waits(reduce_scatter({.communicator = *c.rank.context,
                                       .stream = c.rank.comm,
                                       .send = sum_SC.data(),
                                       .recv = received.data(),
                                       .count = count}));
  store_key_gradients(c, batch, received, d);
}

namespace {

// The partials of every rank's query blocks for this rank's keys, `count` of each rank.
void send_partials(const LayerContext& c, const Buffer& partial, const Buffer& received,
                   int64_t count) {
  const ContextShare share = context_share(c.rank);
  const auto part_of = [&](const Buffer& all, int64_t rank) { return all.f32() + rank * count; };
  const Shape bytes(4 * count);
  copy_bytes({.from_N = {reinterpret_cast<uint8_t*>(part_of(partial, share.index)), bytes},
              .to_N = {reinterpret_cast<uint8_t*>(part_of(received, share.index)), bytes}},
             c.rank.ops);
  for (int64_t hops = 1; hops < share.ranks; ++hops) {
    const RingMessage message{part_of(partial, (share.index + hops) % share.ranks),
                              part_of(received, (share.index - hops + share.ranks) % share.ranks),
                              count};
    c.rank.compute_waits(pass_on(c, {&message, 1}, hops, DType::f32));
  }
}

}  // namespace

void fold_context(const LayerContext& c, const MicroBatch& batch, const Buffer& partial_MC,
                  Out<Real> d_x_TGQ) {
  const int64_t C = d_x_TGQ[1] * d_x_TGQ[2], block = c.rank.config.numerics.block_tokens;
  const ContextShare share = context_share(c.rank);
  const int64_t rows = attention_partial_rows(d_x_TGQ[0], batch.sequence_length, block, share);
  const Buffer received = c.rank.activation(4 * rows * C, "received key gradients");
  send_partials(c, partial_MC, received, rows / share.ranks * C);
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

namespace {

void send_and_receive(const LayerContext& c, std::span<const Message> sends,
                      std::span<const Message> recvs) {
  if (sends.empty() && recvs.empty()) return;
  c.rank.comm_waits_for_compute();
  c.rank.compute_waits(exchange({.communicator = *c.rank.context,
                                 .stream = c.rank.comm,
                                 .sends = sends,
                                 .recvs = recvs,
                                 .dtype = DType::f32}));
}

}  // namespace

void chain_context(const LayerContext& c, const MicroBatch& batch, const KeyGradients& d,
                   AttentionBackwardArgs args) {
  const ContextShare share = context_share(c.rank);
  const int64_t T = d.d_k_TGQ[0], width = d.d_k_TGQ[1] * d.d_k_TGQ[2];
  const int64_t count = T * 2 * width, last = share.ranks - 1;
  const Shape rows(T * share.ranks, width);
  const Buffer sums = c.rank.activation(4 * count * share.ranks, "key gradients so far");
  if (share.index == 0) c.rank.zero(sums);
  args.one_chain = true;
  args.d_k_chain_SC = {sums.f32(), rows, 2 * width};
  args.d_v_chain_SC = {sums.f32() + width, rows, 2 * width};
  // Near chunks lie in the ranks' order, far ones the other way round: up, and down again.
  const auto with = [&](int64_t index) -> std::vector<Message> {
    if (index < 0 || index > last) return {};
    return {{static_cast<int>(index), sums.data(), count * share.ranks}};
  };
  for (const auto& [queries, step] :
       {std::pair(QueryChunk::near, 1), std::pair(QueryChunk::far, -1)}) {
    send_and_receive(c, {}, with(share.index - step));
    args.queries = queries;
    attention_backward(args, c.rank.ops);
    send_and_receive(c, with(share.index + step), {});
  }
  // Rank 0, which holds the last chunk, has the sums of all.
  if (share.index > 0) {
    const Message own{0, sums.data(), count};
    send_and_receive(c, {}, {&own, 1});
  } else {
    std::vector<Message> parts;
    for (int64_t index = 1; index <= last; ++index) {
      parts.push_back({static_cast<int>(index), sums.f32() + index * count, count});
    }
    send_and_receive(c, parts, {});
  }
  store_key_gradients(c, batch, sums, d);
}

bool attends_by_parts(const LayerContext& c) {
  return c.rank.mesh.cp > 1 && c.rank.config.parallel.context == ContextExchange::ring &&
         c.rank.config.numerics.reduction == ReductionMode::fast;
}

namespace {

// A rank's keys and values on their way round: K, then V.
class RingParts {
 public:
  RingParts(const LayerContext& c, const MicroBatch& batch, const KeyRows& own)
      : c_(c), rows_(own.k_TGQ.shape), share_(context_share(c.rank)) {
    part_ = make();
    const Shape matrix(rows_[0], rows_[1] * rows_[2]);
    int64_t which = 0;
    for (const In<Real>& from : {own.k_TGQ, own.v_TGQ}) {
      compact_rows(c, batch, {from.data, c.dtype(), matrix, from.row_stride},
                   {at(part_, which++), c.dtype(), matrix});
    }
  }
  // The part at hand goes on its way, and the next one comes: before attention reads the first.
  void start_next() {
    if (is_last()) return;
    next_ = make();
    const int64_t count = rows_.elements();
    ticket_ = pass_keys_on(
        c_, {{{at(part_, 0), at(next_, 0), count}, {at(part_, 1), at(next_, 1), count}}}, step_);
  }
  // False when every rank's part has been here.
  bool advance() {
    if (is_last()) return false;
    c_.rank.compute_waits(ticket_);
    part_ = std::move(next_);
    ++step_;
    return true;
  }
  template <class Args>
  void give(Args& args) const {
    args.k_TGQ = {at(part_, 0), c_.dtype(), rows_};
    args.v_TGQ = {at(part_, 1), c_.dtype(), rows_};
    args.part = is_first() ? KeyPart::first : KeyPart::next;
    args.key_rank = (share_.index - step_ + share_.ranks) % share_.ranks;
  }
  bool is_first() const { return step_ == 0; }
  bool is_last() const { return step_ + 1 == share_.ranks; }

 private:
  Buffer make() const {
    return c_.real(Shape(2 * rows_[0], rows_[1], rows_[2]), "a rank's keys and values");
  }
  std::byte* at(const Buffer& part, int64_t which) const {
    return part.as<std::byte>() + which * rows_.elements() * dtype_bytes(c_.dtype());
  }

  const LayerContext& c_;
  Shape rows_;
  ContextShare share_;
  Buffer part_, next_;
  Ticket ticket_;
  int64_t step_ = 0;
};

// fp32 sums over the parts, rounded into `to` at the end.
InOut<float> sums_of(const Buffer& buffer, const RawView& to) { return {buffer.f32(), to.shape}; }
void round_sums(const LayerContext& c, const Buffer& sum, Out<Real> to) {
  const Shape all(to.shape.elements());
  CHECK_EQ(to.row_stride, to[1] * to[2]);
  cast_real({.from_N = In<float>(sum.f32(), all), .to_N = {to.data, c.dtype(), all}}, c.rank.ops);
}

}  // namespace

void ring_attention(const LayerContext& c, const MicroBatch& batch, const KeyRows& own,
                    AttentionArgs args) {
  const Out<Real> o_THQ = std::exchange(args.o_THQ, {});
  const Out<float> lse_TH = std::exchange(args.lse_TH, {});
  const Buffer sum = c.rank.activation(4 * o_THQ.shape.elements(), "attention output so far");
  args.o_sum_THQ = sums_of(sum, o_THQ);
  args.lse_sum_TH = {lse_TH.pointer(), lse_TH.shape};
  RingParts parts(c, batch, own);
  do {
    parts.start_next();
    parts.give(args);
    attention(args, c.rank.ops);
  } while (parts.advance());
  round_sums(c, sum, o_THQ);
}

void ring_attention_backward(const LayerContext& c, const MicroBatch& batch, const KeyRows& own,
                             const KeyGradients& d, AttentionBackwardArgs args) {
  const int64_t T = own.k_TGQ[0], width = own.k_TGQ[1] * own.k_TGQ[2], count = T * 2 * width;
  const Out<Real> d_q_THQ = std::exchange(args.d_q_THQ, {});
  const Buffer d_q_sum = c.rank.activation(4 * d_q_THQ.shape.elements(), "d q so far");
  args.d_q_sum_THQ = sums_of(d_q_sum, d_q_THQ);
  RingParts parts(c, batch, own);
  // The sums of the part at hand: this rank's, and those that come from the ranks before.
  Buffer sent, arriving;
  Ticket ticket;
  do {
    parts.start_next();
    parts.give(args);
    Buffer sum = c.rank.activation(4 * count, "key gradients of own queries");
    args.d_k_sum_SC = {sum.f32(), Shape(T, width), 2 * width};
    args.d_v_sum_SC = {sum.f32() + width, Shape(T, width), 2 * width};
    attention_backward(args, c.rank.ops);
    if (!parts.is_first()) {
      c.rank.compute_waits(ticket);
      add_values({.sum_N = {sum.f32(), Shape(count)}, .addend_N = {arriving.f32(), Shape(count)}},
                 c.rank.ops);
    }
    arriving.reset();
    sent = std::move(sum);
    arriving = c.rank.activation(4 * count, "key gradients on their way");
    const RingMessage message{sent.data(), arriving.data(), count};
    ticket = pass_on(c, {&message, 1}, 1, DType::f32);
  } while (parts.advance());
  c.rank.compute_waits(ticket);  // the last hop brings this rank's own home
  round_sums(c, d_q_sum, d_q_THQ);
  store_key_gradients(c, batch, arriving, d);
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
