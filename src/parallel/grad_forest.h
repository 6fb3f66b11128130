// GradForest: which nodes of the canonical summation tree a rank holds (numerics contract D3).
//
// Blocks 0..total_blocks-1 of the global batch are summed by one fixed binary tree: a range of c
// blocks splits at the largest power of two below c. A rank holds a forest of complete nodes, each
// in a slot of a gradient buffer. A micro-batch adds nodes; a node whose sibling is already held
// folds it in the weight-gradient kernel itself, so accumulation costs what plain accumulation
// does. Everything here is host arithmetic on indices, the same on every rank for any rank: a
// receiver knows its peers' forests without asking.
#pragma once

#include <cstdint>
#include <vector>

namespace cambium {

struct BlockRange {
  int64_t first = 0;
  int64_t end = 0;
  int64_t count() const { return end - first; }
  bool operator==(const BlockRange&) const = default;
};

// The fewest canonical nodes that tile `ranges` in the order in which their rows arrive: disjoint,
// in any order; a range that continues the one before it is joined to it.
std::vector<BlockRange> canonical_cover(int64_t total_blocks,
                                        const std::vector<BlockRange>& ranges);

// One weight-gradient call's view of one new node.
struct NodePlan {
  BlockRange range;            // computed from this call's rows
  int64_t first_arrival = 0;   // place of its first block among the call's blocks
  int32_t destination = 0;     // slot that receives the result
  std::vector<int32_t> folds;  // slots whose value is added, in order
};

struct ForestNode {
  BlockRange range;
  int32_t slot = 0;
};

class GradForest {
 public:
  explicit GradForest(int64_t total_blocks) : total_blocks_(total_blocks) {}
  // The nodes that processing `ranges` adds. The forest is updated as if the call had run.
  std::vector<NodePlan> add(const std::vector<BlockRange>& ranges);
  // Held nodes in ascending block order.
  const std::vector<ForestNode>& nodes() const { return nodes_; }
  // Slots ever used: how many the gradient buffer needs.
  int32_t slots() const { return slots_; }

 private:
  int32_t take_slot();

  int64_t total_blocks_;
  int32_t slots_ = 0;
  std::vector<int32_t> free_slots_;
  std::vector<ForestNode> nodes_;
};

// How to merge siblings among `nodes`, level by level, until none are left: add `right` into
// `left` in this order (both are slots of `nodes`). `held` is what remains, ascending.
struct MergeStep {
  int32_t left = 0;
  int32_t right = 0;
};
struct MergePlan {
  std::vector<MergeStep> steps;
  std::vector<ForestNode> held;
  // The slot of [0, total_blocks), which must be all that remains.
  int32_t root(int64_t total_blocks) const;
};
MergePlan plan_merges(int64_t total_blocks, std::vector<ForestNode> nodes);

}  // namespace cambium
