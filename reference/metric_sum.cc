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

}  // namespace cambium::reference
