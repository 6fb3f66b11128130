// cross_entropy at the quickstart's shape (1024 x 1024) and the small model's vocabulary.
#include "benchmark/benchmark.h"
#include "kernels/cross_entropy.h"

namespace cambium {
namespace {

void cross_entropy_with_gradient(benchmark::State& state) {
  const int64_t T = state.range(0), V = state.range(1);
  Workers workers(static_cast<int>(state.range(2)));
  std::vector<float> logits(T * V), d_logits(T * V), loss(T);
  std::vector<int32_t> target(T);
  for (int64_t i = 0; i < T * V; ++i) logits[i] = static_cast<float>(i * 7919 % 1009) * 0.01f;
  for (int64_t t = 0; t < T; ++t) target[t] = static_cast<int32_t>(t % V);
  const CrossEntropyArgs args{.logits_TV = In<float>(logits.data(), Shape(T, V)),
                              .target_T = In<int32_t>(target.data(), Shape(T)),
                              .loss_T = Out<float>(loss.data(), Shape(T)),
                              .d_logits_TV = Out<float>(d_logits.data(), Shape(T, V))};
  for (auto _ : state) reference::cross_entropy(args, workers);
  state.SetItemsProcessed(state.iterations() * T * V);
}

BENCHMARK(cross_entropy_with_gradient)->ArgsProduct({{1024}, {1024, 4096}, {1, 2}})->UseRealTime();

}  // namespace
}  // namespace cambium
