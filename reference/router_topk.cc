#include "kernels/router_topk.h"

#include <algorithm>
#include <limits>

#include "reference/chunks.h"
#include "reference/lane_math.h"
#include "src/base/fmath.h"

namespace cambium::reference {

namespace {

// The K best (score, index) pairs seen so far, best first; equal scores keep the lower index first
// because indices arrive in ascending order and only a strictly larger score moves ahead.
struct Selection {
  float score[kMaxTopk];
  int32_t index[kMaxTopk];
  int64_t filled = 0;

  void offer(float candidate, int32_t candidate_index, int64_t K) {
    if (filled == K && !(candidate > score[K - 1])) return;
    int64_t position = filled < K ? filled++ : K - 1;
    for (; position > 0 && candidate > score[position - 1]; --position) {
      score[position] = score[position - 1];
      index[position] = index[position - 1];
    }
    score[position] = candidate;
    index[position] = candidate_index;
  }
};

void softmax_row(const float* logits, float* probs, int64_t E) {
  const float most = max_of(logits, E);
  for (int64_t e = 0; e < E; ++e) probs[e] = fmath::exp(logits[e] - most);
  const float total = sum(probs, E);
  for (int64_t e = 0; e < E; ++e) probs[e] /= total;
}

// A NaN score counts as -infinity, so that indices are always valid and distinct; the NaN itself
// stays in the probabilities and stops the step.
void select_row(const float* probs, const float* bias, int64_t E, int64_t K, int32_t* index) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  Selection selection;
  for (int64_t e = 0; e < E; ++e) {
    const float score = bias == nullptr ? probs[e] : probs[e] + bias[e];
    selection.offer(score == score ? score : kLowest, static_cast<int32_t>(e), K);
  }
  std::copy_n(selection.index, K, index);
}

void force_row(const int32_t* forced, int64_t E, int64_t K, int32_t* index) {
  for (int64_t k = 0; k < K; ++k) {
    CHECK(forced[k] >= 0 && forced[k] < E);
    index[k] = forced[k];
  }
}

void weigh_row(const float* probs, const int32_t* index, int64_t K, TopkNormalize normalize,
               float* weight) {
  float sum = 0;
  for (int64_t k = 0; k < K; ++k) {
    weight[k] = probs[index[k]];
    sum += weight[k];
  }
  if (normalize == TopkNormalize::none) return;
  for (int64_t k = 0; k < K; ++k) weight[k] /= sum;
}

// Gradient of the selected probabilities: d_weight_K taken back through the normalisation.
void selected_gradient(const float* probs, const int32_t* index, const float* d_weight, int64_t K,
                       TopkNormalize normalize, float* d_selected) {
  if (normalize == TopkNormalize::none) {
    for (int64_t k = 0; k < K; ++k) d_selected[k] = d_weight[k];
    return;
  }
  float sum = 0, dot = 0;
  for (int64_t k = 0; k < K; ++k) sum += probs[index[k]];
  for (int64_t k = 0; k < K; ++k) dot += d_weight[k] * (probs[index[k]] / sum);
  for (int64_t k = 0; k < K; ++k) d_selected[k] = (d_weight[k] - dot) / sum;
}

}  // namespace

void router_topk(const RouterTopkArgs& a, Workers& workers) {
  const int64_t T = a.logits_TE[0], E = a.logits_TE[1], K = a.expert_index_TK[1];
  for_ranges(workers, T, items_per_chunk(E), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* probs = a.probs_TE.pointer() + t * a.probs_TE.row_stride;
      softmax_row(a.logits_TE.pointer() + t * a.logits_TE.row_stride, probs, E);
      int32_t* index = a.expert_index_TK.pointer() + t * a.expert_index_TK.row_stride;
      if (a.forced_index_TK.empty()) {
        select_row(probs, a.select_bias_E.pointer(), E, K, index);
      } else {
        force_row(a.forced_index_TK.pointer() + t * a.forced_index_TK.row_stride, E, K, index);
      }
      weigh_row(probs, index, K, a.normalize, a.weight_TK.pointer() + t * a.weight_TK.row_stride);
    }
  });
}

void router_topk_backward(const RouterTopkBackwardArgs& a, Workers& workers) {
  const int64_t T = a.probs_TE[0], E = a.probs_TE[1], K = a.expert_index_TK[1];
  for_ranges(workers, T, items_per_chunk(E), [&](int64_t begin, int64_t end) {
    float d_selected[kMaxTopk];
    for (int64_t t = begin; t < end; ++t) {
      const float* probs = a.probs_TE.pointer() + t * a.probs_TE.row_stride;
      const int32_t* index = a.expert_index_TK.pointer() + t * a.expert_index_TK.row_stride;
      float* d_logits = a.d_logits_TE.pointer() + t * a.d_logits_TE.row_stride;
      selected_gradient(probs, index, a.d_weight_TK.pointer() + t * a.d_weight_TK.row_stride, K,
                        a.normalize, d_selected);
      const float* d_probs = nullptr;
      float mean = 0;  // sum over experts of g * probs
      for (int64_t k = 0; k < K; ++k) mean += d_selected[k] * probs[index[k]];
      if (!a.d_probs_TE.empty()) {
        d_probs = a.d_probs_TE.pointer() + t * a.d_probs_TE.row_stride;
        mean += dot(d_probs, probs, E);
        for (int64_t e = 0; e < E; ++e) d_logits[e] = probs[e] * (d_probs[e] - mean);
      } else {
        for (int64_t e = 0; e < E; ++e) d_logits[e] = probs[e] * -mean;
      }
      for (int64_t k = 0; k < K; ++k) {
        const int32_t e = index[k];
        const float direct = d_probs == nullptr ? 0.0f : d_probs[e];
        d_logits[e] = probs[e] * ((direct + d_selected[k]) - mean);
      }
      if (a.d_logits_in_TE.empty()) continue;
      const float* d_logits_in = a.d_logits_in_TE.pointer() + t * a.d_logits_in_TE.row_stride;
      for (int64_t e = 0; e < E; ++e) d_logits[e] += d_logits_in[e];
    }
  });
}

}  // namespace cambium::reference
