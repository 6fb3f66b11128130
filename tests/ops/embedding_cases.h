// Cases and oracles of embedding.
#pragma once

#include <optional>
#include <vector>

#include "kernels/embedding.h"
#include "tests/ops/op_test.h"

namespace cambium::test {

struct EmbeddingCase {
  int64_t blocks = 0;
  int64_t block_tokens = 0;
  int64_t V = 0;
  int64_t D = 0;
  int64_t T() const { return blocks * block_tokens; }
};

// One token, primes, one id for all tokens (V = 1), more ids than tokens, the quickstart's shape.
inline const std::vector<EmbeddingCase> kEmbeddingCases = {{1, 1, 3, 1},      {3, 5, 7, 13},
                                                           {4, 16, 1, 32},    {5, 8, 11, 33},
                                                           {13, 16, 300, 64}, {32, 32, 1024, 128}};

// Contribution of one id over blocks [first, first + count): absent blocks are skipped. In the
// arithmetic of Float: fp64 for tolerances, fp32 for bits. Independent of the op's sorting.
template <class Float>
std::optional<std::vector<Float>> embedding_tree_oracle(const std::vector<double>& d_x,
                                                        const std::vector<double>& token,
                                                        const EmbeddingCase& c, int64_t id,
                                                        int64_t first, int64_t count) {
  if (count == 1) {
    std::vector<Float> sum(static_cast<size_t>(c.D), Float{0});
    bool is_present = false;
    for (int64_t t = first * c.block_tokens; t < (first + 1) * c.block_tokens; ++t) {
      if (static_cast<int64_t>(token[t]) != id) continue;
      is_present = true;
      for (int64_t i = 0; i < c.D; ++i) sum[i] += static_cast<Float>(d_x[t * c.D + i]);
    }
    return is_present ? std::optional(sum) : std::nullopt;
  }
  int64_t split = 1;
  while (split * 2 < count) split *= 2;
  auto left = embedding_tree_oracle<Float>(d_x, token, c, id, first, split);
  auto right = embedding_tree_oracle<Float>(d_x, token, c, id, first + split, count - split);
  if (!left) return right;
  if (!right) return left;
  for (int64_t i = 0; i < c.D; ++i) (*left)[i] += (*right)[i];
  return left;
}

}  // namespace cambium::test
