// Expert load: how many (token, k) choices each expert got, and the bias that balances them.
//
//   expert_histogram:    count_E += number of entries of expert_index_TK equal to e
//   router_bias_update:  bias_E += rate * sign(mean of count - count_e)
//                        (auxiliary-loss-free balancing, DeepSeek-V3, arXiv 2412.19437, 2.1.2)
//
// The sign is taken in integers (total - E * count_e), so it is exact.
// Napkin: 4 T K bytes read.
#pragma once

#include "kernels/op.h"

namespace cambium {

struct ExpertHistogramArgs {
  In<int32_t> expert_index_TK;  // -1 counts nowhere
  InOut<int32_t> count_E;
};

struct RouterBiasUpdateArgs {
  In<int32_t> count_E;
  InOut<float> bias_E;
  float rate = 0;
};

inline void check_args(const ExpertHistogramArgs& a) {
  check_shape("expert_histogram", "expert_index_TK", a.expert_index_TK,
              Shape(a.expert_index_TK[0], a.expert_index_TK[1]));
  check_shape("expert_histogram", "count_E", a.count_E, Shape(a.count_E[0]));
}

inline void check_args(const RouterBiasUpdateArgs& a) {
  check_shape("router_bias_update", "count_E", a.count_E, Shape(a.bias_E[0]));
}

inline Cost cost(const ExpertHistogramArgs& a) {
  const int64_t T = a.expert_index_TK[0], K = a.expert_index_TK[1], E = a.count_E[0];
  return {"expert_histogram", {T, E, K}, 0, 4 * T * K + 8 * E, 0};
}

inline Cost cost(const RouterBiasUpdateArgs& a) {
  const int64_t E = a.count_E[0];
  return {"router_bias_update", {0, E}, 2 * E, 12 * E, 0};
}

template <class Visitor>
void visit_views(const ExpertHistogramArgs& a, Visitor&& visit) {
  visit("expert_index_TK", a.expert_index_TK);
  visit("count_E", a.count_E);
}

template <class Visitor>
void visit_views(const RouterBiasUpdateArgs& a, Visitor&& visit) {
  visit("count_E", a.count_E);
  visit("bias_E", a.bias_E);
}

namespace reference {
void expert_histogram(const ExpertHistogramArgs& args, Workers& workers);
void router_bias_update(const RouterBiasUpdateArgs& args, Workers& workers);
}  // namespace reference
namespace cuda {
void expert_histogram(const ExpertHistogramArgs& args, Stream& stream);
void router_bias_update(const RouterBiasUpdateArgs& args, Stream& stream);
}  // namespace cuda

inline void expert_histogram(const ExpertHistogramArgs& args, OpCall call) {
  execute(args, call, reference::expert_histogram, kHasCuda ? cuda::expert_histogram : nullptr);
}
inline void router_bias_update(const RouterBiasUpdateArgs& args, OpCall call) {
  execute(args, call, reference::router_bias_update, kHasCuda ? cuda::router_bias_update : nullptr);
}

}  // namespace cambium
