// Router: probabilities, the k largest experts of each token, and their weights.
//
//   probs_TE = softmax(logits_TE)                      (over experts, fp32)
//   expert_index_TK = indices of the K largest of probs_TE + select_bias_E, largest first,
//                     ties to the lower index
//   weight_TK = probs of the selected, divided by their sum when `normalize` is `over_top_k`
//
// The bias (DeepSeek-V3, arXiv 2412.19437, section 2.1.2) chooses; it never weighs. With
// `forced_index_TK` nothing is chosen: expert_index_TK = forced_index_TK, whose ids are distinct
// within a token, and probabilities, weights and gradients are as if they had been.
// Backward: d_logits_TE = probs * (g - sum_e g_e probs_e), where g is d_weight_TK taken back
// through the normalisation and scattered to its experts, plus d_probs_TE (balance losses).
// Napkin, forward: 4 T E bytes read, 4 T E + 8 T K written, about 6 T E FLOPs; memory bound.
#pragma once

#include "kernels/op.h"

namespace cambium {

enum class TopkNormalize : uint8_t { none, over_top_k };

struct RouterTopkArgs {
  In<float> logits_TE;
  In<float> select_bias_E;  // optional
  Out<float> probs_TE;
  Out<int32_t> expert_index_TK;
  Out<float> weight_TK;
  TopkNormalize normalize = TopkNormalize::over_top_k;
  In<int32_t> forced_index_TK = {};  // optional: replaces the choice
};

struct RouterTopkBackwardArgs {
  In<float> probs_TE;
  In<int32_t> expert_index_TK;
  In<float> d_weight_TK;
  In<float> d_probs_TE;      // optional: gradient that reaches the probabilities directly
  In<float> d_logits_in_TE;  // optional: added last (z-loss)
  Out<float> d_logits_TE;
  TopkNormalize normalize = TopkNormalize::over_top_k;
};

constexpr int64_t kMaxTopk = 32;       // one warp holds a token's selection
constexpr int64_t kMaxExperts = 1024;  // 32 lanes x 32 registers

inline void check_args(const RouterTopkArgs& a) {
  const int64_t T = a.logits_TE[0], E = a.logits_TE[1], K = a.expert_index_TK[1];
  check_shape("router_topk", "logits_TE", a.logits_TE, Shape(T, E));
  check_shape("router_topk", "probs_TE", a.probs_TE, Shape(T, E));
  check_shape("router_topk", "expert_index_TK", a.expert_index_TK, Shape(T, K));
  check_shape("router_topk", "weight_TK", a.weight_TK, Shape(T, K));
  if (!a.select_bias_E.empty()) {
    check_shape("router_topk", "select_bias_E", a.select_bias_E, Shape(E));
  }
  if (!a.forced_index_TK.empty()) {
    check_shape("router_topk", "forced_index_TK", a.forced_index_TK, Shape(T, K));
  }
  CHECK_LE(K, E);
  CHECK_LE(K, kMaxTopk);
  CHECK_LE(E, kMaxExperts);
}

inline void check_args(const RouterTopkBackwardArgs& a) {
  const int64_t T = a.probs_TE[0], E = a.probs_TE[1], K = a.expert_index_TK[1];
  check_shape("router_topk_backward", "expert_index_TK", a.expert_index_TK, Shape(T, K));
  check_shape("router_topk_backward", "d_weight_TK", a.d_weight_TK, Shape(T, K));
  check_shape("router_topk_backward", "d_logits_TE", a.d_logits_TE, Shape(T, E));
  CHECK_LE(K, kMaxTopk);
  CHECK_LE(E, kMaxExperts);
}

inline Cost cost(const RouterTopkArgs& a) {
  const int64_t T = a.logits_TE[0], E = a.logits_TE[1], K = a.expert_index_TK[1];
  const bool chooses = a.forced_index_TK.empty();
  return {"router_topk",
          {T, E, K},
          6 * T * E + (chooses ? 2 * T * E * K : 0),
          8 * T * E + (chooses ? 8 : 12) * T * K,
          0};
}

inline Cost cost(const RouterTopkBackwardArgs& a) {
  const int64_t T = a.probs_TE[0], E = a.probs_TE[1], K = a.expert_index_TK[1];
  return {"router_topk_backward", {T, E, K}, 6 * T * E, 8 * T * E + 8 * T * K, 0};
}

template <class Visitor>
void visit_views(const RouterTopkArgs& a, Visitor&& visit) {
  visit("logits_TE", a.logits_TE);
  visit("select_bias_E", a.select_bias_E);
  visit("forced_index_TK", a.forced_index_TK);
  visit("probs_TE", a.probs_TE);
  visit("expert_index_TK", a.expert_index_TK);
  visit("weight_TK", a.weight_TK);
}

template <class Visitor>
void visit_views(const RouterTopkBackwardArgs& a, Visitor&& visit) {
  visit("probs_TE", a.probs_TE);
  visit("expert_index_TK", a.expert_index_TK);
  visit("d_weight_TK", a.d_weight_TK);
  visit("d_probs_TE", a.d_probs_TE);
  visit("d_logits_in_TE", a.d_logits_in_TE);
  visit("d_logits_TE", a.d_logits_TE);
}

namespace reference {
void router_topk(const RouterTopkArgs& args, Workers& workers);
void router_topk_backward(const RouterTopkBackwardArgs& args, Workers& workers);
}  // namespace reference
namespace cuda {
void router_topk(const RouterTopkArgs& args, Stream& stream);
void router_topk_backward(const RouterTopkBackwardArgs& args, Stream& stream);
}  // namespace cuda

inline void router_topk(const RouterTopkArgs& args, OpCall call) {
  execute(args, call, reference::router_topk, kHasCuda ? cuda::router_topk : nullptr);
}
inline void router_topk_backward(const RouterTopkBackwardArgs& args, OpCall call) {
  execute(args, call, reference::router_topk_backward,
          kHasCuda ? cuda::router_topk_backward : nullptr);
}

}  // namespace cambium
