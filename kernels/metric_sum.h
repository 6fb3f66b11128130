// metric_sum: per-token (or per-block) values into the table of metrics, one row per canonical block.
//
//   leaf_BM[b, column] += value_{b*n} + value_{b*n+1} + ...     (n = values per block, in order)
//
// Each row has one contributor, so summing the table over ranks is exact whatever the layout, and
// the host sums the rows by the canonical tree. Napkin: 4 N bytes; memory bound.
#pragma once

#include "kernels/op.h"

namespace cambium {

struct MetricSumArgs {
  In<float> value_N;  // N = B * values per block
  InOut<float> leaf_BM;
  int64_t column = 0;
};

inline void check_args(const MetricSumArgs& a) {
  const int64_t B = a.leaf_BM[0];
  CHECK_EQ(a.value_N[0] % B, 0);
  CHECK(a.column >= 0 && a.column < a.leaf_BM[1]);
}
inline Cost cost(const MetricSumArgs& a) {
  return {"metric_sum", {a.value_N[0], a.leaf_BM[0]}, a.value_N[0], 4 * a.value_N[0], 0};
}
template <class Visitor>
void visit_views(const MetricSumArgs& a, Visitor&& visit) {
  visit("value_N", a.value_N);
  visit("leaf_BM", a.leaf_BM);
}

namespace reference {
void metric_sum(const MetricSumArgs& args, Workers& workers);
}
inline void metric_sum(const MetricSumArgs& args, OpContext& context) {
  execute(args, context, reference::metric_sum, kCpuOnly);
}

}  // namespace cambium
