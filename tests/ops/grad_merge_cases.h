// Cases and oracles of grad_merge and grad_finish.
#pragma once

#include "kernels/grad_merge.h"
#include "tests/ops/op_test.h"

namespace cambium::test {

struct GradMergeCase {
  int64_t groups, elements, group_stride;
  int64_t left, right, destination;  // of four slots
};

inline const std::vector<GradMergeCase> kGradMergeCases = {
    {1, 1, 1, 0, 1, 2},         {3, 7, 16, 2, 0, 0},        {5, 100, 128, 1, 3, 3},
    {4, 33000, 33000, 3, 1, 0}, {2, 65536, 65600, 0, 2, 1},
};

constexpr int64_t kGradMergeSlots = 4;

// A group's data after the merge, from the slots before it; empty = absent.
inline std::vector<float> merge_oracle(const std::vector<float>& left,
                                       const std::vector<float>& right) {
  if (left.empty()) return right;
  if (right.empty()) return left;
  std::vector<float> sum(left.size());
  for (size_t i = 0; i < sum.size(); ++i) sum[i] = left[i] + right[i];
  return sum;
}

}  // namespace cambium::test
