// The canonical tree of block contributions, and the slots of kernels/grad_target.h.
//
// `walk_node` visits the present leaves of a node in ascending order and tells where their values
// meet; it is generic over what a leaf is and how two values merge. `resolve_store` applies the
// presence rules of one node-table row to one parameter group. `sum_small_group` is the whole of
// D3 for a group whose value fits a cache (norm weights, an embedding row).
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>

#include "kernels/grad_target.h"

namespace cambium::reference {

// Stack entries that `walk_node` uses: one per level of a tree of 2^31 leaves.
constexpr int kMaxTreeLevels = 32;

// Walks the node [first, end) of the canonical tree. `present_blocks` holds the blocks with a
// contribution, ascending; those outside the node are ignored. Calls leaf(index, level) for each
// one inside, `index` into present_blocks: stack entry `level` = that block's contribution; and
// merge(level): entry `level` = entry `level` + entry `level + 1`. Returns whether anything is
// present; if so the node's value is in entry `level` at the end.
template <class Leaf, class Merge>
bool walk_node(int64_t first, int64_t end, std::span<const int32_t> present_blocks,
               int64_t begin_index, int level, Leaf&& leaf, Merge&& merge) {
  const auto from = std::lower_bound(present_blocks.begin(), present_blocks.end(), first);
  const auto to = std::lower_bound(from, present_blocks.end(), end);
  if (from == to) return false;
  const int64_t index = begin_index + (from - present_blocks.begin());
  if (to - from == 1) {
    leaf(index, level);
    return true;
  }
  const std::span<const int32_t> inside(from, to);
  const int64_t middle = first + canonical_split(end - first);
  const bool left = walk_node(first, middle, inside, index, level, leaf, merge);
  const bool right = walk_node(middle, end, inside, index, level + (left ? 1 : 0), leaf, merge);
  if (left && right) merge(level);
  return true;
}

// One row of the node table.
struct NodeRow {
  int64_t first_block = 0;
  int64_t end_block = 0;
  int64_t destination = 0;
  std::span<const int32_t> folds;
};

inline NodeRow node_row(const GradTarget& target, int64_t node, int64_t slot_count) {
  const RawView& table = target.node_table_NC;
  const int32_t* row = static_cast<const int32_t*>(table.data) + node * table.row_stride;
  CHECK(row[kNodeFoldCount] >= 0 && row[kNodeFoldCount] <= kMaxFold);
  const NodeRow result{row[kNodeFirstBlock], row[kNodeEndBlock], row[kNodeDestination],
                       std::span(row + kNodeFirstFold, static_cast<size_t>(row[kNodeFoldCount]))};
  CHECK(0 <= result.first_block && result.first_block < result.end_block);
  CHECK_LE(result.end_block, target.total_blocks);
  CHECK(result.destination >= 0 && result.destination < slot_count);
  for (const int32_t slot : result.folds) CHECK(slot >= 0 && slot < slot_count);
  return result;
}

enum class Presence { absent, present };

// What remains to be done for one group and one row of the node table, absent operands left out.
struct NodeStore {
  bool value_present = false;  // the node itself has a contribution
  bool is_stored = false;      // anything is present, so the destination gets data
  int32_t destination = 0;
  int32_t fold_count = 0;
  int32_t folds[kMaxFold] = {};
};

// `present` is the group's flag in slot 0; flags of consecutive slots are `slot_step` apart. Sets
// the destination's flag: rows of a table must be resolved in order.
inline NodeStore resolve_store(const NodeRow& row, Presence value, uint8_t* present,
                               int64_t slot_step) {
  NodeStore store;
  store.value_present = value == Presence::present;
  store.destination = static_cast<int32_t>(row.destination);
  for (const int32_t slot : row.folds) {
    if (present[slot * slot_step] != 0) store.folds[store.fold_count++] = slot;
  }
  store.is_stored = store.value_present || store.fold_count > 0;
  present[row.destination * slot_step] = store.is_stored ? 1 : 0;
  return store;
}

// value = left + value, element by element.
inline void add_left(const float* left, float* value, int64_t elements) {
  for (int64_t i = 0; i < elements; ++i) value[i] = left[i] + value[i];
}

// value = value + right, element by element.
inline void add_right(float* value, const float* right, int64_t elements) {
  for (int64_t i = 0; i < elements; ++i) value[i] = value[i] + right[i];
}

// Folds and stores a node's value (contents are lost) into the slots of a group that starts at
// `slots`, `slot_stride` elements apart.
inline void store_node(const NodeStore& store, float* value, float* slots, int64_t slot_stride,
                       int64_t elements) {
  if (!store.is_stored) return;
  bool has_value = store.value_present;
  for (int32_t f = 0; f < store.fold_count; ++f) {
    const float* left = slots + store.folds[f] * slot_stride;
    if (has_value) {
      add_left(left, value, elements);
    } else {
      std::copy_n(left, elements, value);
      has_value = true;
    }
  }
  std::copy_n(value, elements, slots + store.destination * slot_stride);
}

// A parameter group of a few thousand elements in mode `nodes`, on one thread. `present_blocks` are
// the blocks that contribute, ascending; contribution(index, value) writes the contribution of
// present_blocks[index]. `stack` holds kMaxTreeLevels * elements floats.
struct SmallGroup {
  float* slots = nullptr;  // the group's elements in slot 0
  int64_t slot_stride = 0;
  int64_t slot_count = 0;
  uint8_t* present = nullptr;  // the group's flag in slot 0
  int64_t present_step = 1;
  int64_t elements = 0;
};

template <class Contribution>
void sum_small_group(const GradTarget& target, const SmallGroup& group,
                     std::span<const int32_t> present_blocks, float* stack,
                     Contribution&& contribution) {
  const int64_t n = group.elements;
  for (int64_t node = 0; node < target.node_table_NC[0]; ++node) {
    const NodeRow row = node_row(target, node, group.slot_count);
    const bool is_present = walk_node(
        row.first_block, row.end_block, present_blocks, 0, 0,
        [&](int64_t index, int level) { contribution(index, stack + level * n); },
        [&](int level) { add_right(stack + level * n, stack + (level + 1) * n, n); });
    const NodeStore store = resolve_store(row, is_present ? Presence::present : Presence::absent,
                                          group.present, group.present_step);
    store_node(store, stack, group.slots, group.slot_stride, n);
  }
}

}  // namespace cambium::reference
