// Dispatch plan: who gets which token, each token once per destination rank (dedup). The one op
// whose results the host reads (send_count_P2), after waiting for an event behind it.
//
// Expert x lives on rank x / experts_per_rank under the local number x % experts_per_rank. An entry
// m of the send buffers is one (destination, token): destinations ascending, tokens ascending
// within. Column k of an entry says what the destination does for the token's choice k.
// Rows come back (stage 4, exact mode) in (destination, token, k) order; partial sums (fast mode)
// come back one per entry, in the order of the entries.
// Napkin: 8 T K bytes read; 4 T (2 K min(K, P) + K + P) written.
#pragma once

#include <algorithm>

#include "kernels/op.h"

namespace cambium {

struct DispatchPlanArgs {
  In<int32_t> expert_index_TK;  // global numbers in [0, ranks * experts_per_rank)
  In<float> weight_TK;
  int64_t ranks = 0;  // P
  int64_t experts_per_rank = 0;
  Out<int32_t> send_count_P2;   // per destination: tokens after dedup, rows
  Out<int32_t> send_token_M;    // M = dispatch_capacity(T, K, P); -1 past the last entry
  Out<int32_t> send_expert_MK;  // local number on the destination, -1 where k goes elsewhere
  Out<float> send_weight_MK;    // 0 where send_expert_MK is -1
  Out<int32_t> return_row_TK;   // position of (t, k) among rows in (destination, token, k) order
  Out<int32_t> token_part_TP;   // entry m of (t, destination), -1 where t does not go there
};

// Entries that T tokens can need at most.
constexpr int64_t dispatch_capacity(int64_t token_count, int64_t top_k, int64_t ranks) {
  return token_count * std::min(top_k, ranks);
}

inline void check_args(const DispatchPlanArgs& a) {
  const int64_t T = a.expert_index_TK[0], K = a.expert_index_TK[1], P = a.ranks;
  const int64_t M = dispatch_capacity(T, K, P);
  CHECK_GE(P, 1);
  CHECK_GE(a.experts_per_rank, 1);
  check_shape("dispatch_plan", "expert_index_TK", a.expert_index_TK, Shape(T, K));
  check_shape("dispatch_plan", "weight_TK", a.weight_TK, Shape(T, K));
  check_shape("dispatch_plan", "send_count_P2", a.send_count_P2, Shape(P, 2));
  check_shape("dispatch_plan", "send_token_M", a.send_token_M, Shape(M));
  check_shape("dispatch_plan", "send_expert_MK", a.send_expert_MK, Shape(M, K));
  check_shape("dispatch_plan", "send_weight_MK", a.send_weight_MK, Shape(M, K));
  check_shape("dispatch_plan", "return_row_TK", a.return_row_TK, Shape(T, K));
  check_shape("dispatch_plan", "token_part_TP", a.token_part_TP, Shape(T, P));
  CHECK_LT(T * K, int64_t{1} << 31);
}

inline Cost cost(const DispatchPlanArgs& a) {
  const int64_t T = a.expert_index_TK[0], K = a.expert_index_TK[1], P = a.ranks;
  const int64_t M = dispatch_capacity(T, K, P);
  return {"dispatch_plan", {T, P, K}, 0, 4 * (3 * T * K + M + 2 * M * K + T * P + 2 * P), 0};
}

template <class Visitor>
void visit_views(const DispatchPlanArgs& a, Visitor&& visit) {
  visit("expert_index_TK", a.expert_index_TK);
  visit("weight_TK", a.weight_TK);
  visit("send_count_P2", a.send_count_P2);
  visit("send_token_M", a.send_token_M);
  visit("send_expert_MK", a.send_expert_MK);
  visit("send_weight_MK", a.send_weight_MK);
  visit("return_row_TK", a.return_row_TK);
  visit("token_part_TP", a.token_part_TP);
}

namespace reference {
void dispatch_plan(const DispatchPlanArgs& args, Workers& workers);
}
namespace cuda {
void dispatch_plan(const DispatchPlanArgs& args, Stream& stream);
}  // namespace cuda

inline void dispatch_plan(const DispatchPlanArgs& args, OpCall call) {
  execute(args, call, reference::dispatch_plan, kHasCuda ? cuda::dispatch_plan : nullptr);
}

}  // namespace cambium
