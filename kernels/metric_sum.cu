// Metrics on the GPU: sums of a block's values in order, a thread a block; fractions of counts.
#include "kernels/metric_sum.h"

#include "kernels/cuda_launch.cuh"

namespace cambium::cuda {

namespace {

constexpr int kThreads = 64;

__global__ void __launch_bounds__(kThreads)
    metric_sum_kernel(const float* value_N, int64_t per_block, Rows<float> leaf_BM, int64_t B,
                      int64_t column) {
  const int64_t block = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (block >= B) return;
  const float* value = value_N + block * per_block;
  float sum = 0;
#pragma unroll 8
  for (int64_t i = 0; i < per_block; ++i) sum += value[i];
  leaf_BM.row(block)[column] += sum;
}

__global__ void __launch_bounds__(kWarpLanes)
    count_fraction_kernel(const int32_t* count_E, float* fraction_E, int E) {
  int64_t total = 0;
  for (int e = 0; e < E; ++e) total += count_E[e];
  for (int e = threadIdx.x; e < E; e += kWarpLanes) {
    fraction_E[e] = total == 0 ? 0.0f : static_cast<float>(count_E[e]) / static_cast<float>(total);
  }
}

}  // namespace

void metric_sum(const MetricSumArgs& args, Stream& stream) {
  const int64_t B = args.leaf_BM[0];
  launch("metric_sum", metric_sum_kernel, {.blocks = blocks_for(B, kThreads), .threads = kThreads},
         stream, args.value_N.pointer(), args.value_N[0] / B, rows_of<float>(args.leaf_BM), B,
         args.column);
}

void count_fraction(const CountFractionArgs& args, Stream& stream) {
  launch("count_fraction", count_fraction_kernel, {.blocks = 1, .threads = kWarpLanes}, stream,
         args.count_E.pointer(), args.fraction_E.pointer(), static_cast<int>(args.count_E[0]));
}

}  // namespace cambium::cuda
