// Routing sort: the row of every (token, k) in the expert-grouped buffer. The permutation that
// `permute` and `combine` follow.
//
// Rows are sorted stably by (expert, token, k): expert e's rows are
// [expert_offset_e1[e], expert_offset_e1[e + 1]), tokens ascending within. A counting sort over
// fixed chunks of tokens: positions never depend on threads or atomics (D1).
// Napkin: 8 T K bytes read, 4 T K + 12 R written.
#pragma once

#include "kernels/op.h"

namespace cambium {

// The order of rows within an expert. `stable` is the contract; the other one is what the injected
// fault `routing_order` asks for, so that tests prove it is noticed.
enum class RoutingOrder : uint8_t { stable, reversed_within_expert };

struct RoutingSortArgs {
  In<int32_t> expert_index_TK;    // numbers in [0, experts); -1 = not on this rank
  int64_t experts = 0;            // e, on this rank
  Out<int32_t> expert_offset_e1;  // first row of each expert; [experts] = real row count
  // R >= real row count (T * K always suffices); entries past the real count are -1.
  Out<int32_t> row_token_R;    // the token of each row
  Out<int32_t> row_slot_R;     // t * K + k of each row: indexes weight_TK flattened
  Out<int32_t> ordered_row_R;  // rows listed in (token, k) order
  Out<int32_t> slot_row_TK;    // inverse of row_slot_R; -1 where expert_index is -1
  RoutingOrder order = RoutingOrder::stable;
};

inline void check_args(const RoutingSortArgs& a) {
  const int64_t T = a.expert_index_TK[0], K = a.expert_index_TK[1], R = a.row_token_R[0];
  check_shape("routing_sort", "expert_index_TK", a.expert_index_TK, Shape(T, K));
  check_shape("routing_sort", "expert_offset_e1", a.expert_offset_e1, Shape(a.experts + 1));
  check_shape("routing_sort", "row_token_R", a.row_token_R, Shape(R));
  check_shape("routing_sort", "row_slot_R", a.row_slot_R, Shape(R));
  check_shape("routing_sort", "ordered_row_R", a.ordered_row_R, Shape(R));
  check_shape("routing_sort", "slot_row_TK", a.slot_row_TK, Shape(T, K));
  CHECK_GE(a.experts, 1);
  CHECK_LT(T * K, int64_t{1} << 31);
}

inline Cost cost(const RoutingSortArgs& a) {
  const int64_t T = a.expert_index_TK[0], K = a.expert_index_TK[1], R = a.row_token_R[0];
  return {"routing_sort", {T, a.experts, K}, 0, 12 * T * K + 12 * R, 0};
}

template <class Visitor>
void visit_views(const RoutingSortArgs& a, Visitor&& visit) {
  visit("expert_index_TK", a.expert_index_TK);
  visit("expert_offset_e1", a.expert_offset_e1);
  visit("row_token_R", a.row_token_R);
  visit("row_slot_R", a.row_slot_R);
  visit("ordered_row_R", a.ordered_row_R);
  visit("slot_row_TK", a.slot_row_TK);
}

namespace reference {
void routing_sort(const RoutingSortArgs& args, Workers& workers);
}
namespace cuda {
void routing_sort(const RoutingSortArgs& args, Stream& stream);
}  // namespace cuda

inline void routing_sort(const RoutingSortArgs& args, OpCall call) {
  execute(args, call, reference::routing_sort, kHasCuda ? cuda::routing_sort : nullptr);
}

}  // namespace cambium
