// Cases and fp64 oracle of attention: whole softmax rows, plain loops.
#pragma once

#include <cmath>
#include <vector>

#include "kernels/attention.h"
#include "tests/ops/op_test.h"

namespace cambium::test {

// mixed: a document begins at every 13th token, long_ones: at every 150th, on average.
enum class Documents { absent, lengths_of_one, mixed, long_ones };

struct AttentionCase {
  int64_t sequences = 0;
  int64_t S = 0;
  int64_t H = 0;
  int64_t G = 0;
  int64_t Q = 0;
  int64_t block_tokens = 0;
  Documents documents = Documents::absent;
  int64_t T() const { return sequences * S; }
};

// One token; blocks of 16, 32 and S; S that is no multiple of the block; head sizes that are no
// multiple of a register; groups of 1, 2 and 4 heads; documents; the quickstart's heads.
inline const std::vector<AttentionCase> kAttentionCases = {
    {1, 1, 1, 1, 1, 16, Documents::absent},    {1, 7, 2, 1, 8, 16, Documents::absent},
    {2, 32, 4, 2, 16, 16, Documents::absent},  {1, 33, 4, 1, 32, 16, Documents::mixed},
    {2, 31, 3, 3, 20, 32, Documents::mixed},   {1, 96, 4, 2, 13, 32, Documents::mixed},
    {2, 65, 2, 2, 24, 32, Documents::absent},  {3, 64, 4, 2, 32, 64, Documents::mixed},
    {2, 128, 4, 2, 32, 32, Documents::absent}, {2, 40, 4, 2, 64, 8, Documents::mixed},
};

// Around the GPU kernels' tiles of 128 rows and warpgroups of 64, padded and whole head sizes.
inline const std::vector<AttentionCase> kAttentionTileCases = {
    {2, 1, 4, 1, 128, 32, Documents::absent},      {3, 64, 4, 1, 128, 32, Documents::absent},
    {2, 65, 2, 2, 64, 32, Documents::mixed},       {2, 127, 4, 4, 128, 32, Documents::absent},
    {1, 128, 8, 1, 128, 32, Documents::absent},    {2, 129, 8, 1, 128, 32, Documents::mixed},
    {2, 257, 4, 2, 32, 32, Documents::absent},     {1, 300, 4, 2, 64, 32, Documents::long_ones},
    {2, 513, 2, 1, 128, 32, Documents::long_ones}, {1, 640, 2, 1, 96, 32, Documents::mixed},
};

// Sequences that ranks share. On the GPU a zigzag chunk is whole tiles of 128.
struct SharedCase {
  AttentionCase whole;
  int64_t ranks = 0;
};
inline const std::vector<SharedCase> kSharedCases = {
    {{2, 64, 4, 2, 16, 8, Documents::absent}, 2},  {{1, 128, 2, 2, 24, 16, Documents::absent}, 4},
    {{3, 24, 4, 1, 8, 4, Documents::absent}, 3},   {{2, 64, 4, 2, 16, 8, Documents::mixed}, 2},
    {{1, 128, 2, 2, 24, 16, Documents::mixed}, 4}, {{3, 24, 4, 1, 8, 4, Documents::mixed}, 3},
};
inline const std::vector<SharedCase> kSharedTileCases = {
    {{2, 512, 4, 2, 64, 32, Documents::absent}, 2},
    {{1, 1024, 2, 1, 128, 32, Documents::absent}, 2},
    {{1, 1024, 8, 1, 96, 32, Documents::mixed}, 2},
    {{2, 1024, 3, 1, 128, 64, Documents::long_ones}, 4},
    {{2, 768, 4, 4, 128, 32, Documents::long_ones}, 3},
    {{1, 1536, 4, 2, 32, 128, Documents::mixed}, 2},
};

struct AttentionExpected {
  std::vector<double> o, lse, probs;  // probs [T, H, S]
};

struct AttentionValues {
  std::vector<double> q, k, v, document_start;  // document_start empty: no documents
};

inline int64_t first_key(const AttentionCase& c, const AttentionValues& in, int64_t t) {
  const int64_t sequence_row = t / c.S * c.S;
  if (in.document_start.empty()) return sequence_row;
  return std::max<int64_t>(sequence_row, static_cast<int64_t>(in.document_start[t]));
}

inline AttentionExpected attention_oracle(const AttentionCase& c, const AttentionValues& in,
                                          double scale) {
  AttentionExpected expected{std::vector<double>(c.T() * c.H * c.Q, 0.0),
                             std::vector<double>(c.T() * c.H),
                             std::vector<double>(c.T() * c.H * c.S, 0.0)};
  for (int64_t t = 0; t < c.T(); ++t) {
    for (int64_t h = 0; h < c.H; ++h) {
      const int64_t g = h / (c.H / c.G), first = first_key(c, in, t), row = t / c.S * c.S;
      double* probs = expected.probs.data() + (t * c.H + h) * c.S;
      double largest = -INFINITY, total = 0.0;
      for (int64_t j = first; j <= t; ++j) {
        double score = 0.0;
        for (int64_t d = 0; d < c.Q; ++d) {
          score += in.q[(t * c.H + h) * c.Q + d] * in.k[(j * c.G + g) * c.Q + d];
        }
        probs[j - row] = score * scale;
        largest = std::max(largest, score * scale);
      }
      for (int64_t j = first; j <= t; ++j) total += std::exp(probs[j - row] - largest);
      expected.lse[t * c.H + h] = largest + std::log(total);
      // Divided last: averages of integers are exact.
      for (int64_t j = first; j <= t; ++j) {
        double& p = probs[j - row];
        p = std::exp(p - largest);
        for (int64_t d = 0; d < c.Q; ++d) {
          expected.o[(t * c.H + h) * c.Q + d] += p * in.v[(j * c.G + g) * c.Q + d];
        }
        p /= total;
      }
      for (int64_t d = 0; d < c.Q; ++d) expected.o[(t * c.H + h) * c.Q + d] /= total;
    }
  }
  return expected;
}

struct AttentionGradients {
  std::vector<double> d_q, d_k, d_v;
};

// Of `share`, d_k and d_v are of its queries alone: [owner of the key][sequence][row there].
inline AttentionGradients attention_backward_oracle(const AttentionCase& c,
                                                    const AttentionValues& in,
                                                    const std::vector<double>& d_o, double scale,
                                                    const ContextShare& share = {}) {
  const AttentionExpected forward = attention_oracle(c, in, scale);
  AttentionGradients out{std::vector<double>(in.q.size(), 0.0),
                         std::vector<double>(in.k.size(), 0.0),
                         std::vector<double>(in.v.size(), 0.0)};
  for (int64_t t = 0; t < c.T(); ++t) {
    const bool is_own = share.owner(t % c.S, c.S) == share.index;
    for (int64_t h = 0; h < c.H; ++h) {
      const int64_t g = h / (c.H / c.G), row = t / c.S * c.S;
      const int64_t q_at = (t * c.H + h) * c.Q;
      double delta = 0.0;
      for (int64_t d = 0; d < c.Q; ++d) delta += d_o[q_at + d] * forward.o[q_at + d];
      for (int64_t j = first_key(c, in, t); j <= t; ++j) {
        const double p = forward.probs[(t * c.H + h) * c.S + j - row];
        const int64_t k_at = (j * c.G + g) * c.Q;
        const int64_t sum_row =
            (share.owner(j - row, c.S) * c.sequences + t / c.S) * (c.S / share.ranks) +
            share.row(j - row, c.S);
        const int64_t sum_at = (sum_row * c.G + g) * c.Q;
        double d_p = 0.0;
        for (int64_t d = 0; d < c.Q; ++d) d_p += d_o[q_at + d] * in.v[k_at + d];
        const double d_score = p * (d_p - delta) * scale;
        for (int64_t d = 0; d < c.Q; ++d) {
          out.d_q[q_at + d] += d_score * in.k[k_at + d];
          if (!is_own) continue;
          out.d_v[sum_at + d] += p * d_o[q_at + d];
          out.d_k[sum_at + d] += d_score * in.q[q_at + d];
        }
      }
    }
  }
  return out;
}

}  // namespace cambium::test
