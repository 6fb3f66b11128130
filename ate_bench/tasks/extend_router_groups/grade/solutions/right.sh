cat >kernels/group_topk.h <<'H'
// Group-limited sigmoid router (DeepSeek-V3, arXiv 2412.19437, sections 2.1.2 and 3.2.2).
//
//   score = sigmoid(logits), choice = score + bias; a group's mark is the sum of its two largest
//   choices; of the kept groups' experts the K largest choices, ties to the lower number
//   weight = scaling * score / sum of the selected scores
//   backward: d_score = scaling (d_weight - sum d_weight score / sum score) / sum score of the
//   selected, d_logits = d_score score (1 - score)
// Napkin: 4 T E bytes read and written, about 6 T E FLOPs; memory bound.
#pragma once

#include "kernels/op.h"

namespace cambium {

struct GroupTopkArgs {
  In<float> logits_TE;
  In<float> bias_E;  // optional
  Out<float> score_TE;
  Out<int32_t> expert_index_TK;
  Out<float> weight_TK;
  int64_t groups = 1, kept_groups = 1;
  float scaling = 1;
};

struct GroupTopkBackwardArgs {
  In<float> score_TE;
  In<int32_t> expert_index_TK;
  In<float> d_weight_TK;
  Out<float> d_logits_TE;
  float scaling = 1;
};

inline void check_args(const GroupTopkArgs& a) {
  const int64_t T = a.logits_TE[0], E = a.logits_TE[1], K = a.expert_index_TK[1];
  if (!a.bias_E.empty()) check_shape("group_topk", "bias_E", a.bias_E, Shape(E));
  check_shape("group_topk", "score_TE", a.score_TE, Shape(T, E));
  check_shape("group_topk", "weight_TK", a.weight_TK, Shape(T, K));
  CHECK_EQ(E % a.groups, 0);
  CHECK_GE(E / a.groups, 2);
  CHECK_LE(a.kept_groups, a.groups);
  CHECK_LE(K, a.kept_groups * (E / a.groups));
}

inline void check_args(const GroupTopkBackwardArgs& a) {
  const int64_t T = a.score_TE[0], E = a.score_TE[1], K = a.expert_index_TK[1];
  check_shape("group_topk_backward", "d_weight_TK", a.d_weight_TK, Shape(T, K));
  check_shape("group_topk_backward", "d_logits_TE", a.d_logits_TE, Shape(T, E));
}

inline Cost cost(const GroupTopkArgs& a) {
  const int64_t T = a.logits_TE[0], E = a.logits_TE[1], K = a.expert_index_TK[1];
  return {"group_topk", {T, E, K}, 6 * T * E, 8 * T * E + 8 * T * K, 0};
}

inline Cost cost(const GroupTopkBackwardArgs& a) {
  const int64_t T = a.score_TE[0], E = a.score_TE[1], K = a.expert_index_TK[1];
  return {"group_topk_backward", {T, E, K}, 8 * T * K, 8 * T * E + 8 * T * K, 0};
}

template <class Visitor>
void visit_views(const GroupTopkArgs& a, Visitor&& visit) {
  visit("logits_TE", a.logits_TE);
  visit("bias_E", a.bias_E);
  visit("score_TE", a.score_TE);
  visit("expert_index_TK", a.expert_index_TK);
  visit("weight_TK", a.weight_TK);
}

template <class Visitor>
void visit_views(const GroupTopkBackwardArgs& a, Visitor&& visit) {
  visit("score_TE", a.score_TE);
  visit("expert_index_TK", a.expert_index_TK);
  visit("d_weight_TK", a.d_weight_TK);
  visit("d_logits_TE", a.d_logits_TE);
}

namespace reference {
void group_topk(const GroupTopkArgs& args, Workers& workers);
void group_topk_backward(const GroupTopkBackwardArgs& args, Workers& workers);
}  // namespace reference

inline void group_topk(const GroupTopkArgs& args, OpContext& context) {
  execute(args, context, reference::group_topk, kCpuOnly);
}
inline void group_topk_backward(const GroupTopkBackwardArgs& args, OpContext& context) {
  execute(args, context, reference::group_topk_backward, kCpuOnly);
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
  float* score = a.score_TE.pointer() + t * E;
  std::vector<float> choice(E), mark(a.groups), allowed(E, kNever);
  for (int64_t e = 0; e < E; ++e) {
    score[e] = 1.0f / (1.0f + fmath::exp(-logits[e]));
    choice[e] = a.bias_E.empty() ? score[e] : score[e] + a.bias_E.pointer()[e];
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

void group_topk_backward(const GroupTopkBackwardArgs& a, Workers& workers) {
  check_args(a);
  const int64_t E = a.score_TE[1], K = a.expert_index_TK[1];
  workers.parallel_for(a.score_TE[0], [&](int64_t t, Scratch&) {
    const float* score = a.score_TE.pointer() + t * E;
    const float* d_weight = a.d_weight_TK.pointer() + t * K;
    const int32_t* index = a.expert_index_TK.pointer() + t * K;
    float* d_logits = a.d_logits_TE.pointer() + t * E;
    std::fill(d_logits, d_logits + E, 0.0f);
    float total = 0, dot = 0;
    for (int64_t k = 0; k < K; ++k) total += score[index[k]];
    for (int64_t k = 0; k < K; ++k) dot += d_weight[k] * (score[index[k]] / total);
    for (int64_t k = 0; k < K; ++k) {
      const float s = score[index[k]];
      d_logits[index[k]] = a.scaling * ((d_weight[k] - dot) / total) * (s * (1.0f - s));
    }
  });
}

}  // namespace cambium::reference
H
python3 - <<'P'
def edit(path, old, new):
    text = open(path).read()
    assert text.count(old) == 1, (path, old, text.count(old))
    open(path, "w").write(text.replace(old, new))

edit("CMakeLists.txt", "cambium_sources(reference_helpers reference/shared_*.cc)",
     "cambium_sources(reference_helpers reference/shared_*.cc reference/group_topk.cc)")
edit("src/config/config.h", "  double norm_epsilon = 1e-6;\n",
     """  int64_t router_groups = 0;  // of experts, scored by a sigmoid; 0 = softmax over all experts
  int64_t router_kept_groups = 1;
  double router_scaling = 1.0;
  double norm_epsilon = 1e-6;
""")
edit("src/config/schema.cc", """    {"model",
     "norm_epsilon",""", """    {"model", "router_groups", in_section<kModel, &Model::router_groups>, kDimensionOrZero, kNoChoices,
     kSame, "of the path, else 0", "groups of experts of the sigmoid router; 0 = softmax router"},
    {"model", "router_kept_groups", in_section<kModel, &Model::router_kept_groups>, kDimension,
     kNoChoices, kSame, "of the path, else 1", "groups that a token may choose experts of"},
    {"model", "router_scaling", in_section<kModel, &Model::router_scaling>, kWeight, kNoChoices, kSame,
     "of the path, else 1.0", "factor of the weights with model.router_groups"},
    {"model",
     "norm_epsilon",""")
edit("src/config/derive.cc", """void check_routing(const Config& config) {
""", """void check_router_groups(const Config& config) {
  const ModelConfig& m = config.model;
  if (m.router_groups == 0) return;
  const int64_t width = m.experts / m.router_groups;
  if (m.experts % m.router_groups != 0 || width < 2 || m.router_kept_groups > m.router_groups ||
      m.top_k > m.router_kept_groups * width) {
    fail(ExitCode::usage,
         "model.router_groups = {}: equal groups of at least 2 of the {} experts are needed, of which "
         "model.router_kept_groups = {} hold model.top_k = {}",
         m.router_groups, m.experts, m.router_kept_groups, m.top_k);
  }
  const BalanceConfig& balance = config.balance;
  if (balance.loss != BalanceLoss::none || balance.z_loss_weight > 0 ||
      balance.routing != RoutingChoice::learned) {
    fail(ExitCode::usage,
         "model.router_groups = {} balances by balance.bias_update_rate alone: use balance.loss = "
         "none, balance.z_loss_weight = 0 and balance.routing = learned",
         m.router_groups);
  }
}

void check_routing(const Config& config) {
  check_router_groups(config);
""")
edit("src/checkpoint/hf_config.cc", '  if (!family.dense_layers && !model.dense_layers.empty()) refuse("model.dense_layers");\n',
     '  if (!family.dense_layers && !model.dense_layers.empty()) refuse("model.dense_layers");\n'
     '  if (model.router_groups > 0) refuse("model.router_groups");\n')
cc = "src/model/qwen3_router.cc"
edit(cc, '#include "kernels/expert_load.h"\n', '#include "kernels/expert_load.h"\n#include "kernels/group_topk.h"\n')
edit(cc, """  In<int32_t> forced;
""", """  if (c.model.router_groups > 0) {
    group_topk({.logits_TE = in_f32(logits_TE, Shape(x.T, x.E)),
                .bias_E = bias,
                .score_TE = out_f32(s.probs_TE, Shape(x.T, x.E)),
                .expert_index_TK = out_i32(s.expert_index_TK, Shape(x.T, x.K)),
                .weight_TK = out_f32(s.weight_TK, Shape(x.T, x.K)),
                .groups = c.model.router_groups,
                .kept_groups = c.model.router_kept_groups,
                .scaling = static_cast<float>(c.model.router_scaling)},
               ops);
    trace_choice(c, batch, s);
    balance_forward(c, batch, logits_TE, s);
    return;
  }
  In<int32_t> forced;
""")
text = open(cc).read()
at = text.index("  router_topk_backward(\n")
end = text.index("ops);\n", at) + len("ops);\n")
group = """  if (c.model.router_groups > 0) {
    group_topk_backward({.score_TE = in_f32(s.probs_TE, Shape(x.T, x.E)),
                         .expert_index_TK = in_i32(s.expert_index_TK, Shape(x.T, x.K)),
                         .d_weight_TK = in_f32(d_weight_TK, Shape(x.T, x.K)),
                         .d_logits_TE = out_f32(d_logits_TE, Shape(x.T, x.E)),
                         .scaling = static_cast<float>(c.model.router_scaling)},
                        ops);
  } else {
"""
open(cc, "w").write(text[:at] + group + text[at:end] + "  }\n" + text[end:])
P
