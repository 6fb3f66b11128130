// metric_sum: per-token (or per-block) values into the table of metrics, one row per canonical
// block.
//
//   leaf_BM[b, column] += value_{b*n} + value_{b*n+1} + ...     (n = values per block, in order)
//
// Each row has one contributor, so summing the table over ranks is exact whatever the layout, and
// the host sums the rows by the canonical tree. Napkin: 4 N bytes; memory bound.
//
// count_fraction: fraction_E = count_E / (sum of count_E), what balance_loss takes as `given`.
#pragma once

#include "kernels/op.h"

namespace cambium {

struct MetricSumArgs {
  In<float> value_N;  // N = B * values per block
  InOut<float> leaf_BM;
  int64_t column = 0;
};

struct CountFractionArgs {
  In<int32_t> count_E;
  Out<float> fraction_E;  // zeros when nothing is counted
};

inline void check_args(const CountFractionArgs& a) {
  check_shape("count_fraction", "fraction_E", a.fraction_E, Shape(a.count_E[0]));
}
inline Cost cost(const CountFractionArgs& a) {
  return {"count_fraction", {a.count_E[0]}, a.count_E[0], 8 * a.count_E[0], 0};
}
template <class Visitor>
void visit_views(const CountFractionArgs& a, Visitor&& visit) {
  visit("count_E", a.count_E);
  visit("fraction_E", a.fraction_E);
}
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
void count_fraction(const CountFractionArgs& args, Workers& workers);
}  // namespace reference
namespace cuda {
void metric_sum(const MetricSumArgs& args, Stream& stream);
void count_fraction(const CountFractionArgs& args, Stream& stream);
}  // namespace cuda
inline void metric_sum(const MetricSumArgs& args, OpCall call) {
  execute(args, call, reference::metric_sum, kHasCuda ? cuda::metric_sum : nullptr);
}
inline void count_fraction(const CountFractionArgs& args, OpCall call) {
  execute(args, call, reference::count_fraction, kHasCuda ? cuda::count_fraction : nullptr);
}

}  // namespace cambium
