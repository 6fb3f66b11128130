// leaf_fold at the quickstart's shape: 32 blocks of a gain of 128, and a wide one.
#include "benchmark/benchmark.h"
#include "kernels/leaf_fold.h"

namespace cambium {
namespace {

void leaf_fold_accumulate(benchmark::State& state) {
  const int64_t B = state.range(0), N = state.range(1);
  Workers workers(static_cast<int>(state.range(2)));
  std::vector<float> leaf(B * N, 0.5f), d_w(N);
  const LeafFoldArgs args{.leaf_BN = In<float>(leaf.data(), Shape(B, N)),
                          .d_w_SN = InOut<float>(d_w.data(), Shape(1, N))};
  for (auto _ : state) reference::leaf_fold(args, workers);
  state.SetBytesProcessed(state.iterations() * cost(args).bytes);
}

BENCHMARK(leaf_fold_accumulate)->ArgsProduct({{32}, {128, 4096}, {1, 2}})->UseRealTime();

}  // namespace
}  // namespace cambium
