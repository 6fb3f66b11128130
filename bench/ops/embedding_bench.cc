// embedding at the quickstart's shape: gather, accumulate, and one node of 32 blocks.
#include "benchmark/benchmark.h"
#include "kernels/embedding.h"

namespace cambium {
namespace {

struct EmbeddingBuffers {
  explicit EmbeddingBuffers(int64_t width)
      : D(width), w(V * D, 0.5f), x(T * D), d_w(V * D), token(T), present(V), table(kNodeColumns) {
    // Squares spread unevenly over the ids, as text does.
    for (int64_t t = 0; t < T; ++t) token[t] = static_cast<int32_t>(t * t % 977);
    table[kNodeEndBlock] = 32;
  }
  int64_t T = 1024, V = 1024, D;
  std::vector<float> w, x, d_w;
  std::vector<int32_t> token;
  std::vector<uint8_t> present;
  std::vector<int32_t> table;
};

void embedding_forward(benchmark::State& state) {
  EmbeddingBuffers b(state.range(0));
  Workers workers(static_cast<int>(state.range(1)));
  const EmbeddingArgs args{.w_VD = In<float>(b.w.data(), Shape(b.V, b.D)),
                           .token_T = In<int32_t>(b.token.data(), Shape(b.T)),
                           .x_TD = Out<float>(b.x.data(), Shape(b.T, b.D))};
  for (auto _ : state) reference::embedding(args, workers);
  state.SetBytesProcessed(state.iterations() * cost(args).bytes);
}

void embedding_wgrad_pass(benchmark::State& state, GradMode mode) {
  EmbeddingBuffers b(state.range(0));
  Workers workers(static_cast<int>(state.range(1)));
  EmbeddingWgradArgs args{.d_x_TD = In<float>(b.x.data(), Shape(b.T, b.D)),
                          .token_T = In<int32_t>(b.token.data(), Shape(b.T)),
                          .d_w_SVD = InOut<float>(b.d_w.data(), Shape(1, b.V, b.D)),
                          .present_SV = InOut<uint8_t>(b.present.data(), Shape(1, b.V))};
  args.target = {mode, In<int32_t>(b.table.data(), Shape(1, kNodeColumns)), 32};
  args.block_tokens = 32;
  for (auto _ : state) reference::embedding_wgrad(args, workers);
  state.SetBytesProcessed(state.iterations() * cost(args).bytes);
}

BENCHMARK(embedding_forward)->ArgsProduct({{128}, {1, 2}})->UseRealTime();
BENCHMARK_CAPTURE(embedding_wgrad_pass, accumulate, GradMode::accumulate)
    ->ArgsProduct({{128}, {1, 2}})
    ->UseRealTime();
BENCHMARK_CAPTURE(embedding_wgrad_pass, nodes, GradMode::nodes)
    ->ArgsProduct({{128}, {1, 2}})
    ->UseRealTime();

}  // namespace
}  // namespace cambium
