#include "src/parallel/grad_forest.h"

#include <algorithm>
#include <optional>
#include <span>

#include "kernels/grad_target.h"
#include "src/base/check.h"

namespace cambium {

namespace {

void cover_node(BlockRange node, BlockRange range, std::vector<BlockRange>& nodes) {
  if (range.end <= node.first || range.first >= node.end) return;
  if (range.first <= node.first && node.end <= range.end) {
    nodes.push_back(node);
    return;
  }
  const int64_t middle = node.first + canonical_split(node.count());
  cover_node({node.first, middle}, range, nodes);
  cover_node({middle, node.end}, range, nodes);
}

// The sibling and the parent of a canonical node; none for the root.
struct Family {
  BlockRange sibling;
  BlockRange parent;
};
std::optional<Family> family_of(int64_t total_blocks, BlockRange node) {
  BlockRange at{0, total_blocks};
  std::optional<Family> family;
  while (at != node) {
    const int64_t middle = at.first + canonical_split(at.count());
    const BlockRange left{at.first, middle}, right{middle, at.end};
    const bool goes_left = node.first < middle;
    family = Family{goes_left ? right : left, at};
    at = goes_left ? left : right;
    CHECK(at.first <= node.first && node.end <= at.end);
  }
  return family;
}

}  // namespace

std::vector<BlockRange> canonical_cover(int64_t total_blocks,
                                        const std::vector<BlockRange>& ranges) {
  std::vector<BlockRange> joined;
  for (const BlockRange& range : ranges) {
    if (range.count() == 0) continue;
    CHECK(range.first >= 0 && range.end <= total_blocks);
    if (!joined.empty() && joined.back().end == range.first) {
      joined.back().end = range.end;
    } else {
      joined.push_back(range);
    }
  }
  std::vector<BlockRange> nodes;
  for (const BlockRange& range : joined) cover_node({0, total_blocks}, range, nodes);
  return nodes;
}

int32_t GradForest::take_slot() {
  if (free_slots_.empty()) return slots_++;
  const int32_t slot = free_slots_.back();
  free_slots_.pop_back();
  return slot;
}

std::vector<NodePlan> GradForest::add(const std::vector<BlockRange>& ranges) {
  std::vector<NodePlan> plans;
  std::vector<int32_t> freed;
  int64_t arrived = 0;
  for (const BlockRange& range : canonical_cover(total_blocks_, ranges)) {
    NodePlan plan{range, arrived, 0, {}};
    arrived += range.count();
    BlockRange grown = range;
    for (auto family = family_of(total_blocks_, grown); family;
         family = family_of(total_blocks_, grown)) {
      // NOTE: addition commutes, so a right sibling that came first folds like a left one.
      auto held = std::find_if(nodes_.begin(), nodes_.end(), [&](const ForestNode& node) {
        return node.range == family->sibling;
      });
      if (held == nodes_.end()) break;
      plan.folds.push_back(held->slot);
      nodes_.erase(held);
      grown = family->parent;
    }
    if (plan.folds.empty()) {
      plan.destination = take_slot();
    } else {
      plan.destination = plan.folds.back();
      freed.insert(freed.end(), plan.folds.begin(), plan.folds.end() - 1);
    }
    // NOTE: rows of a node table run in order, so a later node of this call may fold this one.
    nodes_.push_back({grown, plan.destination});
    plans.push_back(std::move(plan));
  }
  free_slots_.insert(free_slots_.end(), freed.begin(), freed.end());
  std::sort(free_slots_.rbegin(), free_slots_.rend());
  std::ranges::sort(nodes_, {}, [](const ForestNode& node) { return node.range.first; });
  return plans;
}

namespace {

constexpr int32_t kIncomplete = -1;

// `inside`: the nodes that lie in `node`, ascending.
int32_t merge_node(BlockRange node, std::span<const ForestNode> inside, MergePlan& plan) {
  if (inside.empty()) return kIncomplete;
  if (inside.front().range == node) {
    CHECK_EQ(inside.size(), size_t{1});  // otherwise a block came twice
    return inside.front().slot;
  }
  CHECK_GE(node.count(), 2);
  const int64_t middle = node.first + canonical_split(node.count());
  const auto first_right = std::ranges::lower_bound(
      inside, middle, {}, [](const ForestNode& held) { return held.range.first; });
  const auto lefts = static_cast<size_t>(first_right - inside.begin());
  const int32_t left = merge_node({node.first, middle}, inside.first(lefts), plan);
  const int32_t right = merge_node({middle, node.end}, inside.subspan(lefts), plan);
  if (left != kIncomplete && right != kIncomplete) {
    plan.steps.push_back({left, right});
    return left;
  }
  if (left != kIncomplete) plan.held.push_back({{node.first, middle}, left});
  if (right != kIncomplete) plan.held.push_back({{middle, node.end}, right});
  return kIncomplete;
}

bool by_first_block(const ForestNode& a, const ForestNode& b) {
  return a.range.first < b.range.first;
}

}  // namespace

MergePlan plan_merges(int64_t total_blocks, std::vector<ForestNode> nodes) {
  std::ranges::sort(nodes, by_first_block);
  MergePlan plan;
  const BlockRange all{0, total_blocks};
  const int32_t root = merge_node(all, nodes, plan);
  if (root != kIncomplete) plan.held.push_back({all, root});
  std::ranges::sort(plan.held, by_first_block);
  return plan;
}

int32_t MergePlan::root(int64_t total_blocks) const {
  if (held.size() != 1 || held.front().range.count() != total_blocks) {
    fail(ExitCode::verification_mismatch,
         "the gradient forests of these ranks hold {} nodes and not the whole batch's {} blocks: "
         "tokens are missing, or gradients are summed over the wrong ranks",
         held.size(), total_blocks);
  }
  return held.front().slot;
}

}  // namespace cambium
