// Cases and fp64 oracle of leaf_fold.
#pragma once

#include <vector>

#include "kernels/leaf_fold.h"
#include "tests/ops/op_test.h"

namespace cambium::test {

struct LeafFoldCase {
  int64_t blocks = 0;
  int64_t N = 0;
  int64_t rows_per_block = 1;
};

inline const std::vector<LeafFoldCase> kLeafFoldCases = {{1, 1, 1},   {2, 128, 1},  {5, 33, 1},
                                                         {8, 511, 1}, {13, 512, 1}, {32, 513, 1},
                                                         {32, 1, 32}, {7, 3, 16}};

// The canonical tree over leaves [first, first + count), in the arithmetic of Float: fp64 for
// tolerances, fp32 for bits.
template <class Float>
std::vector<Float> leaf_tree_oracle(const std::vector<double>& leaf, const LeafFoldCase& c,
                                    int64_t first, int64_t count) {
  std::vector<Float> total(static_cast<size_t>(c.N), Float{0});
  if (count == 1) {
    for (int64_t r = 0; r < c.rows_per_block; ++r) {
      for (int64_t i = 0; i < c.N; ++i) {
        total[i] += static_cast<Float>(leaf[(first * c.rows_per_block + r) * c.N + i]);
      }
    }
    return total;
  }
  int64_t split = 1;
  while (split * 2 < count) split *= 2;
  const std::vector<Float> left = leaf_tree_oracle<Float>(leaf, c, first, split);
  const std::vector<Float> right = leaf_tree_oracle<Float>(leaf, c, first + split, count - split);
  for (int64_t i = 0; i < c.N; ++i) total[i] = left[i] + right[i];
  return total;
}

}  // namespace cambium::test
