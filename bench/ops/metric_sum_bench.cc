// metric_sum at the quickstart's size.
#include <benchmark/benchmark.h>

#include "kernels/metric_sum.h"

namespace cambium {

namespace {

void metric_sum_bench(benchmark::State& state) {
  constexpr int64_t kBlocks = 32, kTokens = 1024, kColumns = 3;
  std::vector<float> value(kTokens, 1.0f), leaf(kBlocks * kColumns);
  Workers workers(1);
  const MetricSumArgs args{.value_N = {value.data(), Shape(kTokens)},
                           .leaf_BM = {leaf.data(), Shape(kBlocks, kColumns)}};
  for (auto _ : state) reference::metric_sum(args, workers);
  state.SetBytesProcessed(4 * kTokens * state.iterations());
}
BENCHMARK(metric_sum_bench);

}  // namespace

}  // namespace cambium
