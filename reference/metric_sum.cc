#include "kernels/metric_sum.h"

namespace cambium::reference {

void metric_sum(const MetricSumArgs& args, Workers&) {
  const int64_t blocks = args.leaf_BM[0], per_block = args.value_N[0] / blocks;
  const float* value = args.value_N.pointer();
  for (int64_t block = 0; block < blocks; ++block) {
    float sum = 0;
    for (int64_t i = 0; i < per_block; ++i) sum += *value++;
    args.leaf_BM.pointer()[block * args.leaf_BM.row_stride + args.column] += sum;
  }
}

void count_fraction(const CountFractionArgs& args, Workers&) {
  const int64_t experts = args.count_E[0];
  const int32_t* count = args.count_E.pointer();
  int64_t total = 0;
  for (int64_t e = 0; e < experts; ++e) total += count[e];
  for (int64_t e = 0; e < experts; ++e) {
    args.fraction_E.pointer()[e] =
        total == 0 ? 0.0f : static_cast<float>(count[e]) / static_cast<float>(total);
  }
}

}  // namespace cambium::reference
