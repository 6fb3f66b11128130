// Embedding: x_TD[t] = w_VD[token_T[t]], and its weight gradient, whose groups are token ids.
//
// wgrad, `accumulate`: slot 0, row v += the rows of d_x_TD with token v, in position order;
// `store`: the same after zeros everywhere.
// wgrad, `nodes` (kernels/grad_target.h): the contribution of a (token id, block) is the sum of its
// rows from zero in position order; an id that does not occur in a block is absent there. Only
// touched rows cost arithmetic; the presence of all V rows of a destination is written, because
// slots are reused.
// Napkin: forward 8 T D bytes; wgrad 4 T D read and 8 D per distinct id; memory bound.
#pragma once

#include "kernels/grad_target.h"
#include "kernels/op.h"

namespace cambium {

struct EmbeddingArgs {
  In<Real> w_VD;
  In<int32_t> token_T;
  Out<Real> x_TD;
};

struct EmbeddingWgradArgs {
  In<Real> d_x_TD;
  In<int32_t> token_T;
  InOut<float>
      d_w_SVD;  // S slots; row_stride is the slot stride; `nodes` alone uses more than slot 0
  InOut<uint8_t> present_SV = {};  // mode `nodes` only
  GradTarget target = {};
  int64_t first_block = 0;   // canonical number of the block that row 0 begins; mode `nodes` only
  int64_t block_tokens = 0;  // rows per block, T is a multiple; mode `nodes` only
};

inline void check_args(const EmbeddingArgs& a) {
  const int64_t T = a.x_TD[0], D = a.w_VD[1];
  check_shape("embedding", "token_T", a.token_T, Shape(T));
  check_shape("embedding", "x_TD", a.x_TD, Shape(T, D));
  CHECK(a.w_VD.dtype == a.x_TD.dtype);
}

inline void check_args(const EmbeddingWgradArgs& a) {
  const int64_t T = a.d_x_TD[0], D = a.d_x_TD[1], S = a.d_w_SVD[0], V = a.d_w_SVD[1];
  check_shape("embedding_wgrad", "token_T", a.token_T, Shape(T));
  check_shape("embedding_wgrad", "d_w_SVD", a.d_w_SVD, Shape(S, V, D));
  check_grad_target("embedding_wgrad", a.target, a.d_w_SVD, a.present_SV, V);
  if (a.target.mode == GradMode::nodes) {
    CHECK_GE(a.block_tokens, 1);
    CHECK_EQ(T % a.block_tokens, 0);
    CHECK_LE(a.first_block + T / a.block_tokens, a.target.total_blocks);
  }
}

inline Cost cost(const EmbeddingArgs& a) {
  const int64_t T = a.x_TD[0], D = a.x_TD[1];
  return {"embedding", {T, D}, 0, 2 * dtype_bytes(a.x_TD.dtype) * T * D + 4 * T, 0};
}

// The additions of the canonical tree are not counted: FLOPs do not depend on the layout.
inline Cost cost(const EmbeddingWgradArgs& a) {
  const int64_t T = a.d_x_TD[0], D = a.d_x_TD[1];
  return {"embedding_wgrad", {T, D}, T * D, (dtype_bytes(a.d_x_TD.dtype) + 8) * T * D + 4 * T, 0};
}

template <class Visitor>
void visit_views(const EmbeddingArgs& a, Visitor&& visit) {
  visit("w_VD", a.w_VD);
  visit("token_T", a.token_T);
  visit("x_TD", a.x_TD);
}

template <class Visitor>
void visit_views(const EmbeddingWgradArgs& a, Visitor&& visit) {
  visit("d_x_TD", a.d_x_TD);
  visit("token_T", a.token_T);
  visit("d_w_SVD", a.d_w_SVD);
  visit("present_SV", a.present_SV);
  visit_views(a.target, visit);
}

namespace reference {
void embedding(const EmbeddingArgs& args, Workers& workers);
void embedding_wgrad(const EmbeddingWgradArgs& args, Workers& workers);
}  // namespace reference
namespace cuda {
void embedding(const EmbeddingArgs& args, Stream& stream);
void embedding_wgrad(const EmbeddingWgradArgs& args, Stream& stream);
}  // namespace cuda

inline void embedding(const EmbeddingArgs& args, OpCall call) {
  execute(args, call, reference::embedding, kHasCuda ? cuda::embedding : nullptr);
}
inline void embedding_wgrad(const EmbeddingWgradArgs& args, OpCall call) {
  execute(args, call, reference::embedding_wgrad, kHasCuda ? cuda::embedding_wgrad : nullptr);
}

}  // namespace cambium
