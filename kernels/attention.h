// Causal attention with grouped key/value heads, block by block (FlashAttention, arXiv 2205.14135).
//
//   o[t,h] = sum_j p_j v[j,g],  p = softmax_j(scale * q[t,h] . k[j,g]),  g = h * G / H
// over the tokens j <= t of t's sequence, and of t's document where document_start_T is given.
// lse_TH is the log of the softmax denominator (natural logarithm, scores scaled).
//
// Order (D2, D3): a sequence is cut into blocks of block_tokens positions, the last may be short.
// A query's key/value blocks are folded in position order by the online softmax, each block's
// partial output computed alone. Backward: dQ sums key/value blocks in position order; dK and dV
// sum the partials of query blocks in position order, each computed alone, one chain over (head of
// the group, position). No row depends on another sequence, nor on the number of threads.
//   d_v = sum p d_o,  ds = p * (d_o . v - d_o . o) * scale,  d_q = sum ds k,  d_k = sum ds q
// On the GPU (kernels/attention_*.cuh) blocks are the kernels' tiles of 128 positions, counted from
// each sequence's start, whatever block_tokens is: the forward pass folds a query's tiles from its
// own backwards, dQ sums them in position order, dK and dV sum (query tile, head of the group,
// position) over each half of the group's heads, or with `one_chain` over all. With bf16 storage P
// and dS are rounded to bf16, as operands of the tensor cores, in the reference too; the softmax
// sums unrounded P.
// Napkin: forward 2 T S H Q FLOPs (causal half of 4), backward 5 T S H Q.
// Context parallelism: with `share` of several ranks, q holds this rank's part of every sequence
// (zigzag: chunks `index` and 2 ranks - 1 - index of 2 ranks), k and v hold whole sequences. What
// the backward pass then leaves for the ranks that own the keys is the caller's choice:
//   sums      of this rank's queries, which a reduce-scatter adds to those of the others;
//   chain     one of the rank's two chunks of queries goes on from the sums that the chunks before
//             it left, in position order: the bits of one rank;
//   partials  of every query block apart (CPU alone), which `attention_key_fold` sums where the
//             keys are: the bits of one rank too, S / (2 block_tokens) times the bytes of a chain.
// On the GPU the chunks are whole tiles: S is a multiple of 2 ranks kAttentionTile.
// Ring attention (arXiv 2310.01889): k and v hold one rank's part of every sequence, laid out as q
// is, and a call folds it into what earlier calls left, in fp32: the online softmax goes on from o
// and its log-sum-exp, dQ is added to. dK and dV are of the part and of this rank's queries. On the
// GPU the first part is the rank's own.
#pragma once

#include "kernels/attention_cudnn.h"
#include "kernels/op.h"

namespace cambium {

constexpr int64_t kAttentionTile = 128;  // positions of a tile on the GPU

// Which part of a sequence of S positions a rank holds.
struct ContextShare {
  int64_t ranks = 1;
  int64_t index = 0;

  // The place in its sequence of row t of this rank's part.
  constexpr int64_t position(int64_t t, int64_t S) const {
    if (ranks == 1) return t;
    const int64_t chunk = S / (2 * ranks);
    return t < chunk ? index * chunk + t : (2 * ranks - 1 - index) * chunk + (t - chunk);
  }
  // The rank that holds a position, and its row there.
  constexpr int64_t owner(int64_t position, int64_t S) const {
    if (ranks == 1) return 0;
    const int64_t chunk = position / (S / (2 * ranks));
    return chunk < ranks ? chunk : 2 * ranks - 1 - chunk;
  }
  constexpr int64_t row(int64_t position, int64_t S) const {
    if (ranks == 1) return position;
    const int64_t size = S / (2 * ranks);
    return position % size + (position / size < ranks ? 0 : size);
  }
};

// Which of a share's two chunks of queries a chain's call takes.
enum class QueryChunk : uint8_t { both, near, far };

// Which keys k and v hold: those of whole sequences, or a rank's part of them, the first or a later
// one of a ring.
enum class KeyPart : uint8_t { all, first, next };

struct AttentionArgs {
  In<Real> q_THQ;  // rows may be strided: parts of a fused projection
  In<Real> k_TGQ;
  In<Real> v_TGQ;
  In<int32_t> document_start_T = {};  // optional: row of k that begins t's document
  Out<Real> o_THQ;                    // empty with a part of the keys, as lse_TH
  Out<float> lse_TH;
  int64_t sequence_length = 0;  // S; T is a multiple of S / share.ranks
  int64_t block_tokens = 0;
  float scale = 1.0f;
  AttentionKernel kernel = AttentionKernel::own;  // on a GPU
  ContextShare share = {};
  KeyPart part = KeyPart::all;
  int64_t key_rank = 0;          // whose part
  InOut<float> o_sum_THQ = {};   // over the parts so far; 0 and -infinity where a query has
  InOut<float> lse_sum_TH = {};  // seen no key yet
};

struct AttentionBackwardArgs {
  In<Real> q_THQ;
  In<Real> k_TGQ;
  In<Real> v_TGQ;
  In<Real> o_THQ;
  In<Real> d_o_THQ;
  In<float> lse_TH;
  In<int32_t> document_start_T = {};  // optional
  Out<Real> d_q_THQ;                  // rows may be strided; must not overlap the inputs
  Out<Real> d_k_TGQ;  // empty with a share of several ranks, which fills sums or partials instead
  Out<Real> d_v_TGQ;
  Out<float> delta_TH;  // d_o . o of each row: an intermediate that the caller gives room for
  int64_t sequence_length = 0;
  int64_t block_tokens = 0;
  float scale = 1.0f;
  AttentionKernel kernel = AttentionKernel::own;
  ContextShare share = {};
  // [rank that owns the key][sequence][key row there], C = G Q: every row is written. Rows may be
  // strided.
  Out<float> d_k_sum_SC = {};
  Out<float> d_v_sum_SC = {};
  KeyPart part = KeyPart::all;
  int64_t key_rank = 0;
  InOut<float> d_q_sum_THQ =
      {};  // with a part, in place of d_q_THQ; d_k_sum_SC has the part's T rows
  // A key's dK and dV as one chain over its queries, which ranks may share: exact mode.
  bool one_chain = false;
  // One chunk's queries go on from the chunks before it. Of the keys that it does not see nothing
  // changes. Laid out as the sums; before the last chunk d_k is what the device adds, not scaled.
  QueryChunk queries = QueryChunk::both;
  InOut<float> d_k_chain_SC = {};
  InOut<float> d_v_chain_SC = {};
  // [rank that owns the key][sequence][query block of this rank][key row there][G Q], flattened to
  // rows of G Q; rows of blocks that the query block does not see are not touched.
  Out<float> d_k_partial_MC = {};
  Out<float> d_v_partial_MC = {};
};

// One of dK and dV from the partials of all ranks' query blocks, in position order:
//   d_x[t] = (... (partial of t's own block + that of the next) + ...)
struct AttentionKeyFoldArgs {
  In<float> partial_MC;  // [rank of the query][sequence][query block there][key row here], C = G Q
  In<int32_t> document_start_S = {};  // optional: of whole sequences
  Out<Real> d_x_TGQ;
  int64_t sequence_length = 0;
  int64_t block_tokens = 0;
  ContextShare share;
};

// Rows of the partials: every key row for each query block of a sequence.
inline int64_t attention_partial_rows(int64_t T, int64_t S, int64_t block_tokens,
                                      const ContextShare& share) {
  return T * (S / share.ranks / block_tokens) * share.ranks;
}

// What both passes require of q, k, v and the scalars.
template <class Args>
void check_attention_inputs(const char* op, const Args& a) {
  const int64_t T = a.q_THQ[0], H = a.q_THQ[1], Q = a.q_THQ[2], G = a.k_TGQ[1];
  const int64_t key_rows = a.part == KeyPart::all ? T * a.share.ranks : T;
  check_shape(op, "k_TGQ", a.k_TGQ, Shape(key_rows, G, Q));
  check_shape(op, "v_TGQ", a.v_TGQ, Shape(key_rows, G, Q));
  CHECK(a.part == KeyPart::all || a.share.ranks > 1);
  CHECK(a.key_rank >= 0 && a.key_rank < a.share.ranks);
  if (!a.document_start_T.empty()) {
    check_shape(op, "document_start_T", a.document_start_T, Shape(T));
  }
  CHECK_GE(G, 1);
  CHECK_EQ(H % G, 0);
  CHECK_GE(a.sequence_length, 1);
  CHECK_EQ(T * a.share.ranks % a.sequence_length, 0);
  CHECK_GE(a.block_tokens, 1);
  if (a.kernel == AttentionKernel::cudnn) {
    CHECK(a.share.ranks == 1 && a.document_start_T.empty());
    CHECK_EQ(Q % kCudnnHeadStep, 0);
    CHECK_LE(Q, kCudnnMostHeadColumns);
  }
  if (a.share.ranks > 1) {
    CHECK_EQ(a.sequence_length % (2 * a.share.ranks * a.block_tokens), 0);
    CHECK(a.share.index >= 0 && a.share.index < a.share.ranks);
  }
}

inline void check_args(const AttentionArgs& a) {
  const int64_t T = a.q_THQ[0], H = a.q_THQ[1], Q = a.q_THQ[2];
  check_attention_inputs("attention", a);
  if (a.part == KeyPart::all) {
    check_shape("attention", "o_THQ", a.o_THQ, Shape(T, H, Q));
    check_shape("attention", "lse_TH", a.lse_TH, Shape(T, H));
    CHECK(a.o_sum_THQ.empty() && a.lse_sum_TH.empty());
    return;
  }
  check_shape("attention", "o_sum_THQ", a.o_sum_THQ, Shape(T, H, Q));
  check_shape("attention", "lse_sum_TH", a.lse_sum_TH, Shape(T, H));
  CHECK(a.o_THQ.empty() && a.lse_TH.empty());
}

inline void check_args(const AttentionBackwardArgs& a) {
  const int64_t T = a.q_THQ[0], H = a.q_THQ[1], Q = a.q_THQ[2], G = a.k_TGQ[1];
  check_attention_inputs("attention_backward", a);
  check_shape("attention_backward", "o_THQ", a.o_THQ, Shape(T, H, Q));
  check_shape("attention_backward", "d_o_THQ", a.d_o_THQ, Shape(T, H, Q));
  check_shape("attention_backward", "lse_TH", a.lse_TH, Shape(T, H));
  check_shape("attention_backward", "delta_TH", a.delta_TH, Shape(T, H));
  if (a.part != KeyPart::all) {
    check_shape("attention_backward", "d_q_sum_THQ", a.d_q_sum_THQ, Shape(T, H, Q));
    check_shape("attention_backward", "d_k_sum_SC", a.d_k_sum_SC, Shape(T, G * Q));
    check_shape("attention_backward", "d_v_sum_SC", a.d_v_sum_SC, Shape(T, G * Q));
    CHECK(a.d_q_THQ.empty() && a.d_k_TGQ.empty() && a.d_v_TGQ.empty());
    CHECK(a.d_k_partial_MC.empty() && a.d_v_partial_MC.empty());
    return;
  }
  check_shape("attention_backward", "d_q_THQ", a.d_q_THQ, Shape(T, H, Q));
  CHECK(a.d_q_sum_THQ.empty());
  const int asked = !a.d_k_sum_SC.empty() + !a.d_k_chain_SC.empty() + !a.d_k_partial_MC.empty();
  CHECK_EQ(asked, a.share.ranks > 1 ? 1 : 0);
  CHECK_EQ(a.queries != QueryChunk::both, !a.d_k_chain_SC.empty());
  if (a.share.ranks > 1) {
    CHECK(a.d_k_TGQ.empty() && a.d_v_TGQ.empty());
    const Shape whole(T * a.share.ranks, G * Q);
    if (!a.d_k_chain_SC.empty()) {
      CHECK(a.one_chain);
      check_shape("attention_backward", "d_k_chain_SC", a.d_k_chain_SC, whole);
      check_shape("attention_backward", "d_v_chain_SC", a.d_v_chain_SC, whole);
      return;
    }
    if (!a.d_k_sum_SC.empty()) {
      check_shape("attention_backward", "d_k_sum_SC", a.d_k_sum_SC, whole);
      check_shape("attention_backward", "d_v_sum_SC", a.d_v_sum_SC, whole);
      return;
    }
    const Shape rows(attention_partial_rows(T, a.sequence_length, a.block_tokens, a.share), G * Q);
    check_shape("attention_backward", "d_k_partial_MC", a.d_k_partial_MC, rows);
    check_shape("attention_backward", "d_v_partial_MC", a.d_v_partial_MC, rows);
    return;
  }
  check_shape("attention_backward", "d_k_TGQ", a.d_k_TGQ, Shape(T, G, Q));
  check_shape("attention_backward", "d_v_TGQ", a.d_v_TGQ, Shape(T, G, Q));
}

inline void check_args(const AttentionKeyFoldArgs& a) {
  const int64_t T = a.d_x_TGQ[0], C = a.d_x_TGQ[1] * a.d_x_TGQ[2], S = a.sequence_length;
  CHECK_GE(a.share.ranks, 2);
  CHECK_EQ(S % (2 * a.share.ranks * a.block_tokens), 0);
  CHECK_EQ(T * a.share.ranks % S, 0);
  check_shape("attention_key_fold", "partial_MC", a.partial_MC,
              Shape(attention_partial_rows(T, S, a.block_tokens, a.share), C));
  if (!a.document_start_S.empty()) {
    check_shape("attention_key_fold", "document_start_S", a.document_start_S,
                Shape(T * a.share.ranks));
  }
}

// (query, key) pairs of a head: the causal half with its diagonal. Of a zigzag share any rank's
// part of the keys is half of its queries' square, its own with the diagonal.
template <class Args>
int64_t attention_pairs(const Args& a) {
  const int64_t T = a.q_THQ[0], S = a.sequence_length;
  if (a.part == KeyPart::all) return T * (S + 1) / 2;
  const int64_t part = S / a.share.ranks;
  return T * (a.key_rank == a.share.index ? part + 1 : part) / 2;
}

// Those of one chunk of the queries: its own half square, and the whole of the chunks before it.
inline int64_t attention_pairs_of_chunk(const AttentionBackwardArgs& a) {
  if (a.queries == QueryChunk::both) return attention_pairs(a);
  const int64_t rows = a.q_THQ[0] / 2, chunk = a.sequence_length / (2 * a.share.ranks);
  const int64_t place =
      a.queries == QueryChunk::near ? a.share.index : 2 * a.share.ranks - 1 - a.share.index;
  return rows * (2 * place * chunk + chunk + 1) / 2;
}

// A document mask does not lower the declared cost.
inline Cost cost(const AttentionArgs& a) {
  const int64_t T = a.q_THQ[0], H = a.q_THQ[1], Q = a.q_THQ[2], G = a.k_TGQ[1];
  const int64_t S = a.sequence_length, pairs = attention_pairs(a) * H;
  const int64_t bytes = dtype_bytes(a.q_THQ.dtype) * T * 2 * (H + G) * Q + 4 * T * H;
  return {"attention", {T, H, Q, G, S}, pairs * (4 * Q + 5), bytes, 0};
}

inline Cost cost(const AttentionBackwardArgs& a) {
  const int64_t T = a.q_THQ[0], H = a.q_THQ[1], Q = a.q_THQ[2], G = a.k_TGQ[1];
  const int64_t S = a.sequence_length, pairs = attention_pairs_of_chunk(a) * H;
  const int64_t rows = a.queries == QueryChunk::both ? T : T / 2;
  const int64_t bytes = dtype_bytes(a.q_THQ.dtype) * rows * 4 * (H + G) * Q + 8 * rows * H;
  return {"attention_backward", {T, H, Q, G, S}, pairs * (10 * Q + 6), bytes, 0};
}

// The additions are those that attention_backward of one rank does on its way: none are counted.
inline Cost cost(const AttentionKeyFoldArgs& a) {
  const int64_t T = a.d_x_TGQ[0], C = a.d_x_TGQ[1] * a.d_x_TGQ[2];
  return {"attention_key_fold", {T, C, a.sequence_length}, 0, 4 * a.partial_MC.elements() / 2, 0};
}

template <class Visitor>
void visit_views(const AttentionArgs& a, Visitor&& visit) {
  visit("q_THQ", a.q_THQ);
  visit("k_TGQ", a.k_TGQ);
  visit("v_TGQ", a.v_TGQ);
  visit("document_start_T", a.document_start_T);
  visit("o_THQ", a.o_THQ);
  visit("lse_TH", a.lse_TH);
  visit("o_sum_THQ", a.o_sum_THQ);
  visit("lse_sum_TH", a.lse_sum_TH);
}

template <class Visitor>
void visit_views(const AttentionBackwardArgs& a, Visitor&& visit) {
  visit("q_THQ", a.q_THQ);
  visit("k_TGQ", a.k_TGQ);
  visit("v_TGQ", a.v_TGQ);
  visit("o_THQ", a.o_THQ);
  visit("d_o_THQ", a.d_o_THQ);
  visit("lse_TH", a.lse_TH);
  visit("document_start_T", a.document_start_T);
  visit("d_q_THQ", a.d_q_THQ);
  visit("d_k_TGQ", a.d_k_TGQ);
  visit("d_v_TGQ", a.d_v_TGQ);
  visit("delta_TH", a.delta_TH);
  visit("d_q_sum_THQ", a.d_q_sum_THQ);
  visit("d_k_sum_SC", a.d_k_sum_SC);
  visit("d_v_sum_SC", a.d_v_sum_SC);
  visit("d_k_chain_SC", a.d_k_chain_SC);
  visit("d_v_chain_SC", a.d_v_chain_SC);
  visit("d_k_partial_MC", a.d_k_partial_MC);
  visit("d_v_partial_MC", a.d_v_partial_MC);
}

template <class Visitor>
void visit_views(const AttentionKeyFoldArgs& a, Visitor&& visit) {
  visit("partial_MC", a.partial_MC);
  visit("document_start_S", a.document_start_S);
  visit("d_x_TGQ", a.d_x_TGQ);
}

namespace reference {
void attention(const AttentionArgs& args, Workers& workers);
void attention_backward(const AttentionBackwardArgs& args, Workers& workers);
void attention_key_fold(const AttentionKeyFoldArgs& args, Workers& workers);
}  // namespace reference
namespace cuda {
void attention(const AttentionArgs& args, Stream& stream);
void attention_backward(const AttentionBackwardArgs& args, Stream& stream);
}  // namespace cuda

inline void attention(const AttentionArgs& args, OpCall call) {
  execute(args, call, reference::attention, kHasCuda ? cuda::attention : nullptr);
}
inline void attention_backward(const AttentionBackwardArgs& args, OpCall call) {
  execute(args, call, reference::attention_backward, kHasCuda ? cuda::attention_backward : nullptr);
}
inline void attention_key_fold(const AttentionKeyFoldArgs& args, OpCall call) {
  execute(args, call, reference::attention_key_fold, kCpuOnly);
}

}  // namespace cambium
