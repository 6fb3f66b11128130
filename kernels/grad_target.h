// GradTarget: where an op that makes weight gradients puts them (design.md section 3, D3).
//
// Fast: `accumulate` adds to slot 0; `store`, of a step's first contribution, makes slot 0 what
// adding to zeros would, whatever was there. Exact: `nodes` fills slots of a forest. Blocks of
// tokens are numbered canonically 0..total_blocks-1; a range of count c splits at the largest power
// of two below c, which makes one fixed binary tree. A node is a range [first, end) of that tree;
// the shape below it depends on its count alone, so a call may number its blocks as their rows
// arrive (context parallelism, other ranks' tokens) and give nodes in those numbers. A node's value
// for a parameter group (a tensor, an expert's matrix) is the tree sum of its blocks'
// contributions, each computed alone from zero with tokens in order; an absent contribution (an
// expert without tokens in the block) is skipped, never added as zero.
//
// For each row of the node table, in order: v = value of [first, end); for each left slot l of the
// row, v = value(l) + v; then slots[destination] = v. An absent operand is skipped, so that the
// other is copied bit for bit. Where nothing is present the destination's presence becomes 0 and
// its data is not touched. The destination may be one of the left slots. A later row sees what an
// earlier one stored.
#pragma once

#include "kernels/op.h"

namespace cambium {

enum class GradMode : uint8_t { accumulate, store, nodes };

constexpr int64_t kMaxFold = 24;  // left siblings above one node: the depth of any sensible tree

// Columns of the node table.
enum NodeColumn : int {
  kNodeFirstBlock = 0,
  kNodeEndBlock = 1,
  kNodeDestination = 2,
  kNodeFoldCount = 3,
  kNodeFirstFold = 4,  // ... kMaxFold slots, in the order in which they are folded
};
constexpr int64_t kNodeColumns = kNodeFirstFold + kMaxFold;

struct GradTarget {
  GradMode mode = GradMode::accumulate;
  In<int32_t> node_table_NC;  // [nodes, kNodeColumns]; mode `nodes` only
  int64_t total_blocks = 0;   // leaves of the canonical tree; mode `nodes` only
};

// Bytes of slots that a weight gradient of `elements` elements moves.
inline int64_t grad_bytes(const GradTarget& target, int64_t elements) {
  return (target.mode == GradMode::store ? 4 : 8) * elements;
}

// The largest power of two below `count`: where a canonical range of `count` > 1 blocks splits.
constexpr int64_t canonical_split(int64_t count) {
  int64_t left = 1;
  while (left * 2 < count) left *= 2;
  return left;
}
static_assert(canonical_split(2) == 1 && canonical_split(3) == 2 && canonical_split(4) == 2 &&
              canonical_split(5) == 4 && canonical_split(32) == 16);

// Shape checks that wgrad ops share: `groups` is 0 for an op with one group (presence per slot).
inline void check_grad_target(const char* op, const GradTarget& target, const RawView& slots,
                              const RawView& present, int64_t groups) {
  CHECK(slots.dtype == DType::f32);
  CHECK_GE(slots.shape[0], 1);
  if (target.mode != GradMode::nodes) return;
  const int64_t nodes = target.node_table_NC[0];
  check_shape(op, "node_table_NC", target.node_table_NC, Shape(nodes, kNodeColumns));
  const int64_t slot_count = slots.shape[0];
  check_shape(op, "present", present, groups == 0 ? Shape(slot_count) : Shape(slot_count, groups));
  CHECK_GE(target.total_blocks, 1);
}

template <class Visitor>
void visit_views(const GradTarget& target, Visitor&& visit) {
  visit("node_table_NC", target.node_table_NC);
}

}  // namespace cambium
