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
// Napkin: forward 2 T S H Q FLOPs (causal half of 4), backward 5 T S H Q.
#pragma once

#include "kernels/op.h"

namespace cambium {

struct AttentionArgs {
  In<Real> q_THQ;  // rows may be strided: parts of a fused projection
  In<Real> k_TGQ;
  In<Real> v_TGQ;
  In<int32_t> document_start_T =
      {};  // optional: micro-batch index of the first token of t's document
  Out<Real> o_THQ;
  Out<float> lse_TH;
  int64_t sequence_length = 0;  // T is a multiple
  int64_t block_tokens = 0;
  float scale = 1.0f;
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
  Out<Real> d_k_TGQ;
  Out<Real> d_v_TGQ;
  Out<float> delta_TH;  // d_o . o of each row: an intermediate that the caller gives room for
  int64_t sequence_length = 0;
  int64_t block_tokens = 0;
  float scale = 1.0f;
};

// What both passes require of q, k, v and the scalars.
template <class Args>
void check_attention_inputs(const char* op, const Args& a) {
  const int64_t T = a.q_THQ[0], H = a.q_THQ[1], Q = a.q_THQ[2], G = a.k_TGQ[1];
  check_shape(op, "k_TGQ", a.k_TGQ, Shape(T, G, Q));
  check_shape(op, "v_TGQ", a.v_TGQ, Shape(T, G, Q));
  if (!a.document_start_T.empty()) {
    check_shape(op, "document_start_T", a.document_start_T, Shape(T));
  }
  CHECK_GE(G, 1);
  CHECK_EQ(H % G, 0);
  CHECK_GE(a.sequence_length, 1);
  CHECK_EQ(T % a.sequence_length, 0);
  CHECK_GE(a.block_tokens, 1);
}

inline void check_args(const AttentionArgs& a) {
  const int64_t T = a.q_THQ[0], H = a.q_THQ[1], Q = a.q_THQ[2];
  check_attention_inputs("attention", a);
  check_shape("attention", "o_THQ", a.o_THQ, Shape(T, H, Q));
  check_shape("attention", "lse_TH", a.lse_TH, Shape(T, H));
}

inline void check_args(const AttentionBackwardArgs& a) {
  const int64_t T = a.q_THQ[0], H = a.q_THQ[1], Q = a.q_THQ[2], G = a.k_TGQ[1];
  check_attention_inputs("attention_backward", a);
  check_shape("attention_backward", "o_THQ", a.o_THQ, Shape(T, H, Q));
  check_shape("attention_backward", "d_o_THQ", a.d_o_THQ, Shape(T, H, Q));
  check_shape("attention_backward", "lse_TH", a.lse_TH, Shape(T, H));
  check_shape("attention_backward", "d_q_THQ", a.d_q_THQ, Shape(T, H, Q));
  check_shape("attention_backward", "d_k_TGQ", a.d_k_TGQ, Shape(T, G, Q));
  check_shape("attention_backward", "d_v_TGQ", a.d_v_TGQ, Shape(T, G, Q));
  check_shape("attention_backward", "delta_TH", a.delta_TH, Shape(T, H));
}

// FLOPs of the causal half with its diagonal; a document mask does not lower the declared cost.
inline Cost cost(const AttentionArgs& a) {
  const int64_t T = a.q_THQ[0], H = a.q_THQ[1], Q = a.q_THQ[2], G = a.k_TGQ[1];
  const int64_t S = a.sequence_length, pairs = T * (S + 1) / 2 * H;
  const int64_t bytes = dtype_bytes(a.q_THQ.dtype) * T * 2 * (H + G) * Q + 4 * T * H;
  return {"attention", {T, H, Q, G, S}, pairs * (4 * Q + 5), bytes, 0};
}

inline Cost cost(const AttentionBackwardArgs& a) {
  const int64_t T = a.q_THQ[0], H = a.q_THQ[1], Q = a.q_THQ[2], G = a.k_TGQ[1];
  const int64_t S = a.sequence_length, pairs = T * (S + 1) / 2 * H;
  const int64_t bytes = dtype_bytes(a.q_THQ.dtype) * T * 4 * (H + G) * Q + 8 * T * H;
  return {"attention_backward", {T, H, Q, G, S}, pairs * (10 * Q + 6), bytes, 0};
}

template <class Visitor>
void visit_views(const AttentionArgs& a, Visitor&& visit) {
  visit("q_THQ", a.q_THQ);
  visit("k_TGQ", a.k_TGQ);
  visit("v_TGQ", a.v_TGQ);
  visit("document_start_T", a.document_start_T);
  visit("o_THQ", a.o_THQ);
  visit("lse_TH", a.lse_TH);
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
}

namespace reference {
void attention(const AttentionArgs& args, Workers& workers);
void attention_backward(const AttentionBackwardArgs& args, Workers& workers);
}  // namespace reference
namespace cuda {
void attention(const AttentionArgs& args, Stream& stream);
void attention_backward(const AttentionBackwardArgs& args, Stream& stream);
}  // namespace cuda

inline void attention(const AttentionArgs& args, OpContext& context) {
  execute(args, context, reference::attention, kHasCuda ? cuda::attention : nullptr);
}
inline void attention_backward(const AttentionBackwardArgs& args, OpContext& context) {
  execute(args, context, reference::attention_backward,
          kHasCuda ? cuda::attention_backward : nullptr);
}

}  // namespace cambium
