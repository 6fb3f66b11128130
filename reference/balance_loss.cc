#include "kernels/balance_loss.h"

#include <vector>

#include "reference/chunks.h"

namespace cambium::reference {

namespace {

// fraction_E = counts of tokens [first, last) / (K * tokens). Counts are exact in fp32 up to 2^24.
void count_fractions(const BalanceLossArgs& a, int64_t first, int64_t last, float* fraction_E) {
  const int64_t E = a.probs_TE[1], K = a.expert_index_TK[1];
  for (int64_t e = 0; e < E; ++e) fraction_E[e] = 0;
  for (int64_t t = first; t < last; ++t) {
    const int32_t* index = a.expert_index_TK.pointer() + t * a.expert_index_TK.row_stride;
    for (int64_t k = 0; k < K; ++k) {
      CHECK(index[k] >= 0 && index[k] < E);
      fraction_E[index[k]] += 1.0f;
    }
  }
  const float choices = static_cast<float>(K * (last - first));
  for (int64_t e = 0; e < E; ++e) fraction_E[e] /= choices;
}

// The part of sum_e f_e P_e that the tokens [first, last) make, positions in order.
double weighted_mean(const BalanceLossArgs& a, int64_t first, int64_t last, const float* fraction_E,
                     float* mean_E) {
  const int64_t E = a.probs_TE[1];
  for (int64_t e = 0; e < E; ++e) mean_E[e] = 0;
  for (int64_t t = first; t < last; ++t) {
    const float* probs = a.probs_TE.pointer() + t * a.probs_TE.row_stride;
    for (int64_t e = 0; e < E; ++e) mean_E[e] += probs[e];
  }
  const float positions = static_cast<float>(a.positions);
  double sum = 0;
  for (int64_t e = 0; e < E; ++e) {
    sum += static_cast<double>(fraction_E[e]) * static_cast<double>(mean_E[e] / positions);
  }
  return sum;
}

}  // namespace

void balance_loss(const BalanceLossArgs& a, Workers& workers) {
  const int64_t T = a.probs_TE[0], E = a.probs_TE[1], S = a.sequence_length;
  const int64_t blocks = S / a.block_tokens;
  std::vector<float> shared_E;
  if (a.source == CountSource::micro_batch) {
    CHECK_LE(T * a.expert_index_TK[1], int64_t{1} << 24);
    shared_E.resize(static_cast<size_t>(E));
    count_fractions(a, 0, T, shared_E.data());
  }
  workers.parallel_for(T / S, [&](int64_t sequence, Scratch& scratch) {
    const int64_t first = sequence * S, last = first + S;
    const float* fraction_E = shared_E.data();
    if (a.source == CountSource::given) {
      const int64_t row = a.fraction_NE[0] == 1 ? 0 : sequence;
      fraction_E = a.fraction_NE.pointer() + row * a.fraction_NE.row_stride;
    }
    if (a.source == CountSource::own_sequence) {
      float* own_E = scratch.floats(0, E);
      count_fractions(a, first, last, own_E);
      fraction_E = own_E;
    }
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = first + block * a.block_tokens;
      const double sum =
          weighted_mean(a, begin, begin + a.block_tokens, fraction_E, scratch.floats(1, E));
      a.loss_leaf_B.pointer()[sequence * blocks + block] =
          static_cast<float>(a.loss_scale * static_cast<double>(E) * sum);
    }
    float* gradient_E = scratch.floats(2, E);
    const float coefficient =
        a.gradient_scale * static_cast<float>(E) / static_cast<float>(a.positions);
    for (int64_t e = 0; e < E; ++e) gradient_E[e] = coefficient * fraction_E[e];
    for (int64_t t = first; t < last; ++t) {
      float* d_probs = a.d_probs_TE.pointer() + t * a.d_probs_TE.row_stride;
      for (int64_t e = 0; e < E; ++e) d_probs[e] = gradient_E[e];
    }
  });
}

}  // namespace cambium::reference
