// Folding a finished contribution into the nodes of a gradient forest (kernels/grad_target.h) in
// place: a group without a contribution whose only present value is its destination costs nothing,
// which is what most rows of an embedding are.
#pragma once

#include <algorithm>
#include <array>

#include "reference/tree_sum.h"

namespace cambium::reference {

// Slots of one op: group g of slot s begins at data + s * slot_stride + g * group_elements.
struct NodeSlots {
  float* data = nullptr;
  int64_t slot_stride = 0;
  int64_t group_elements = 0;
  uint8_t* present = nullptr;
  int64_t present_stride = 0;

  float* value(int64_t slot, int64_t group) const {
    return data + slot * slot_stride + group * group_elements;
  }
  uint8_t& is_present(int64_t slot, int64_t group) const {
    return present[slot * present_stride + group];
  }
};

// slots[destination] of `group` = folds of the left slots over `own` (null: absent). Elements
// [begin, end) only; presence is the caller's, because element ranges run on several threads.
// Returns whether anything is present.
inline bool fold_node(const NodeSlots& slots, const NodeRow& node, int64_t group, const float* own,
                      int64_t begin, int64_t end) {
  std::array<const float*, kMaxFold + 1> operands{};
  int64_t count = 0;
  if (own != nullptr) operands[count++] = own;
  for (const int32_t slot : node.folds) {
    if (slots.is_present(slot, group) != 0) operands[count++] = slots.value(slot, group);
  }
  float* to = slots.value(node.destination, group);
  if (count == 0) return false;
  if (count == 1) {
    if (operands[0] != to) std::copy(operands[0] + begin, operands[0] + end, to + begin);
    return true;
  }
  if (count == 2) {
    const float *right = operands[0], *left = operands[1];
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) to[i] = left[i] + right[i];
    return true;
  }
  // The destination may be any of the left slots, so an element is finished before it is stored.
  for (int64_t i = begin; i < end; ++i) {
    float value = operands[0][i];
    for (int64_t operand = 1; operand < count; ++operand) value = operands[operand][i] + value;
    to[i] = value;
  }
  return true;
}

}  // namespace cambium::reference
