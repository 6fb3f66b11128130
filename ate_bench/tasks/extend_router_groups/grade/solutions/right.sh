cat >kernels/group_topk.h <<'H'
// Group-limited sigmoid router (DeepSeek-V3, arXiv 2412.19437, sections 2.1.2 and 3.2.2).
//
//   score = sigmoid(logits), choice = score + bias; a group's mark is the sum of its two largest
//   choices; of the kept groups' experts the K largest choices, ties to the lower number
//   weight = scaling * score / sum of the selected scores
#pragma once

#include "kernels/op.h"

namespace cambium {

struct GroupTopkArgs {
  In<float> logits_TE;
  In<float> bias_E;
  Out<int32_t> expert_index_TK;
  Out<float> weight_TK;
  int64_t groups = 1, kept_groups = 1;
  float scaling = 1;
};

inline void check_args(const GroupTopkArgs& a) {
  const int64_t T = a.logits_TE[0], E = a.logits_TE[1], K = a.expert_index_TK[1];
  check_shape("group_topk", "bias_E", a.bias_E, Shape(E));
  check_shape("group_topk", "weight_TK", a.weight_TK, Shape(T, K));
  CHECK_EQ(E % a.groups, 0);
  CHECK_GE(E / a.groups, 2);
  CHECK_LE(a.kept_groups, a.groups);
  CHECK_LE(K, a.kept_groups * (E / a.groups));
}

namespace reference {
void group_topk(const GroupTopkArgs& args, Workers& workers);
}

}  // namespace cambium
H
cat >reference/group_topk.cc <<'H'
#include "kernels/group_topk.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "src/base/fmath.h"

namespace cambium::reference {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

void route(const GroupTopkArgs& a, int64_t t) {
  const int64_t E = a.logits_TE[1], K = a.expert_index_TK[1], width = E / a.groups;
  const float* logits = a.logits_TE.pointer() + t * a.logits_TE.row_stride;
  int32_t* index = a.expert_index_TK.pointer() + t * K;
  float* weight = a.weight_TK.pointer() + t * K;
  std::vector<float> score(E), choice(E), mark(a.groups), allowed(E, kNever);
  for (int64_t e = 0; e < E; ++e) {
    score[e] = 1.0f / (1.0f + fmath::exp(-logits[e]));
    choice[e] = score[e] + a.bias_E.pointer()[e];
  }
  for (int64_t g = 0; g < a.groups; ++g) {
    std::vector<float> own(choice.begin() + g * width, choice.begin() + (g + 1) * width);
    std::partial_sort(own.begin(), own.begin() + 2, own.end(), std::greater<float>());
    mark[g] = own[0] + own[1];
  }
  for (int64_t kept = 0; kept < a.kept_groups; ++kept) {
    const int64_t g = std::max_element(mark.begin(), mark.end()) - mark.begin();
    mark[g] = kNever;
    std::copy_n(choice.begin() + g * width, width, allowed.begin() + g * width);
  }
  float total = 0;
  for (int64_t k = 0; k < K; ++k) {
    const int64_t e = std::max_element(allowed.begin(), allowed.end()) - allowed.begin();
    allowed[e] = kNever;
    index[k] = static_cast<int32_t>(e);
    weight[k] = score[e];
    total += weight[k];
  }
  for (int64_t k = 0; k < K; ++k) weight[k] *= a.scaling / total;
}

}  // namespace

void group_topk(const GroupTopkArgs& a, Workers& workers) {
  check_args(a);
  workers.parallel_for(a.logits_TE[0], [&](int64_t t, Scratch&) { route(a, t); });
}

}  // namespace cambium::reference
H
