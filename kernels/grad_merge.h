// Merging and finishing nodes of a gradient forest outside a weight-gradient op (D3).
//
//   merge   slots[destination] = slots[left] + slots[right], group by group
//   finish  gradient = slots[slot], zeros for an absent group
//
// Presence rules are those of kernels/grad_target.h: an absent operand is skipped (the other is
// copied bit for bit), and where both are absent the destination becomes absent, its data
// untouched. The destination may be one of the operands. Napkin: 12 bytes per element merged;
// memory bound.
#pragma once

#include "kernels/op.h"

namespace cambium {

struct GradMergeArgs {
  InOut<float> slots_SGN;  // S slots of G groups of N elements; row_stride is the slot stride
  InOut<uint8_t> present_SG;
  int64_t group_stride = 0;  // elements between groups of a slot, >= N
  int64_t left_slot = 0;     // the lower block numbers
  int64_t right_slot = 0;
  int64_t destination_slot = 0;
};

struct GradFinishArgs {
  In<float> slots_SGN;
  In<uint8_t> present_SG;
  Out<float> gradient_GN;    // row_stride is the distance between groups; padding is not touched
  int64_t group_stride = 0;  // of slots_SGN
  int64_t slot = 0;
};

inline void check_args(const GradMergeArgs& a) {
  const int64_t S = a.slots_SGN[0], G = a.slots_SGN[1], N = a.slots_SGN[2];
  check_shape("grad_merge", "slots_SGN", a.slots_SGN, Shape(S, G, N));
  check_shape("grad_merge", "present_SG", a.present_SG, Shape(S, G));
  CHECK_GE(a.group_stride, N);
  CHECK(a.left_slot >= 0 && a.left_slot < S);
  CHECK(a.right_slot >= 0 && a.right_slot < S);
  CHECK(a.destination_slot >= 0 && a.destination_slot < S);
  CHECK_NE(a.left_slot, a.right_slot);
}

inline void check_args(const GradFinishArgs& a) {
  const int64_t S = a.slots_SGN[0], G = a.slots_SGN[1], N = a.slots_SGN[2];
  check_shape("grad_finish", "slots_SGN", a.slots_SGN, Shape(S, G, N));
  check_shape("grad_finish", "present_SG", a.present_SG, Shape(S, G));
  check_shape("grad_finish", "gradient_GN", a.gradient_GN, Shape(G, N));
  CHECK_GE(a.group_stride, N);
  CHECK(a.slot >= 0 && a.slot < S);
}

// The additions of the canonical tree are not counted: FLOPs do not depend on the layout.
inline Cost cost(const GradMergeArgs& a) {
  const int64_t G = a.slots_SGN[1], N = a.slots_SGN[2];
  return {"grad_merge", {G, N}, 0, 12 * G * N, 0};
}

inline Cost cost(const GradFinishArgs& a) {
  const int64_t G = a.slots_SGN[1], N = a.slots_SGN[2];
  return {"grad_finish", {G, N}, 0, 8 * G * N, 0};
}

template <class Visitor>
void visit_views(const GradMergeArgs& a, Visitor&& visit) {
  visit("slots_SGN", a.slots_SGN);
  visit("present_SG", a.present_SG);
}

template <class Visitor>
void visit_views(const GradFinishArgs& a, Visitor&& visit) {
  visit("slots_SGN", a.slots_SGN);
  visit("present_SG", a.present_SG);
  visit("gradient_GN", a.gradient_GN);
}

namespace reference {
void grad_merge(const GradMergeArgs& args, Workers& workers);
void grad_finish(const GradFinishArgs& args, Workers& workers);
}  // namespace reference
namespace cuda {
void grad_merge(const GradMergeArgs& args, Stream& stream);
void grad_finish(const GradFinishArgs& args, Stream& stream);
}  // namespace cuda

inline void grad_merge(const GradMergeArgs& args, OpCall call) {
  execute(args, call, reference::grad_merge, kHasCuda ? cuda::grad_merge : nullptr);
}
inline void grad_finish(const GradFinishArgs& args, OpCall call) {
  execute(args, call, reference::grad_finish, kHasCuda ? cuda::grad_finish : nullptr);
}

}  // namespace cambium
