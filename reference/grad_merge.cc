// Merging and finishing gradient nodes (kernels/grad_merge.h): pieces of groups in parallel, so
// that one large group uses all threads.
#include "kernels/grad_merge.h"

#include <algorithm>

#include "reference/tree_sum.h"

namespace cambium::reference {

namespace {

constexpr int64_t kMergeChunkElements = 32768;  // 384 KB of traffic

// Calls body(group, begin, count) for pieces of every group, in parallel.
template <class Body>
void for_each_piece(Workers& workers, int64_t groups, int64_t elements, Body&& body) {
  const int64_t pieces = (elements + kMergeChunkElements - 1) / kMergeChunkElements;
  workers.parallel_for(groups * pieces, [&](int64_t chunk, Scratch&) {
    const int64_t begin = chunk % pieces * kMergeChunkElements;
    body(chunk / pieces, begin, std::min(kMergeChunkElements, elements - begin));
  });
}

}  // namespace

void grad_merge(const GradMergeArgs& a, Workers& workers) {
  const int64_t G = a.slots_SGN[1], N = a.slots_SGN[2];
  auto slot_data = [&](int64_t slot) {
    return a.slots_SGN.pointer() + slot * a.slots_SGN.row_stride;
  };
  auto flags = [&](int64_t slot) {
    return a.present_SG.pointer() + slot * a.present_SG.row_stride;
  };
  const uint8_t* left_present = flags(a.left_slot);
  const uint8_t* right_present = flags(a.right_slot);
  for_each_piece(workers, G, N, [&](int64_t group, int64_t begin, int64_t count) {
    const int64_t offset = group * a.group_stride + begin;
    const float* left = slot_data(a.left_slot) + offset;
    const float* right = slot_data(a.right_slot) + offset;
    float* destination = slot_data(a.destination_slot) + offset;
    if (left_present[group] != 0 && right_present[group] != 0) {
      for (int64_t i = 0; i < count; ++i) destination[i] = left[i] + right[i];
    } else if (left_present[group] != 0 || right_present[group] != 0) {
      const float* only = left_present[group] != 0 ? left : right;
      if (only != destination) std::copy_n(only, count, destination);
    }
  });
  uint8_t* destination_present = flags(a.destination_slot);
  for (int64_t group = 0; group < G; ++group) {
    destination_present[group] = left_present[group] != 0 || right_present[group] != 0 ? 1 : 0;
  }
}

void grad_finish(const GradFinishArgs& a, Workers& workers) {
  const int64_t G = a.slots_SGN[1], N = a.slots_SGN[2];
  const float* slot = a.slots_SGN.pointer() + a.slot * a.slots_SGN.row_stride;
  const uint8_t* present = a.present_SG.pointer() + a.slot * a.present_SG.row_stride;
  for_each_piece(workers, G, N, [&](int64_t group, int64_t begin, int64_t count) {
    float* gradient = a.gradient_GN.pointer() + group * a.gradient_GN.row_stride + begin;
    if (present[group] != 0) {
      std::copy_n(slot + group * a.group_stride + begin, count, gradient);
    } else {
      std::fill_n(gradient, count, 0.0f);
    }
  });
}

}  // namespace cambium::reference
