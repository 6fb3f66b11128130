// rms_norm at the quickstart's shape (1024 x 128) and a wider one; bytes a second moved.
#include "benchmark/benchmark.h"
#include "kernels/rms_norm.h"

namespace cambium {
namespace {

struct RmsNormBuffers {
  RmsNormBuffers(int64_t tokens, int64_t width)
      : T(tokens),
        D(width),
        x(T * D, 0.5f),
        y(T * D),
        sum(T * D),
        gain(D, 1.0f),
        rstd(T),
        leaf(T / 32 * D) {}
  int64_t T, D;
  std::vector<float> x, y, sum, gain, rstd, leaf;
};

void rms_norm_forward(benchmark::State& state) {
  RmsNormBuffers b(state.range(0), state.range(1));
  Workers workers(static_cast<int>(state.range(2)));
  const Shape shape(b.T, b.D);
  const RmsNormArgs args{.x_TD = In<float>(b.x.data(), shape),
                         .residual_TD = In<float>(b.x.data(), shape),
                         .gain_D = In<float>(b.gain.data(), Shape(b.D)),
                         .sum_TD = Out<float>(b.sum.data(), shape),
                         .y_TD = Out<float>(b.y.data(), shape),
                         .rstd_T = Out<float>(b.rstd.data(), Shape(b.T))};
  for (auto _ : state) reference::rms_norm(args, workers);
  state.SetBytesProcessed(state.iterations() * cost(args).bytes);
}

void rms_norm_backward_pass(benchmark::State& state) {
  RmsNormBuffers b(state.range(0), state.range(1));
  Workers workers(static_cast<int>(state.range(2)));
  const Shape shape(b.T, b.D);
  const RmsNormBackwardArgs args{.d_y_TD = In<float>(b.x.data(), shape),
                                 .x_TD = In<float>(b.x.data(), shape),
                                 .gain_D = In<float>(b.gain.data(), Shape(b.D)),
                                 .rstd_T = In<float>(b.rstd.data(), Shape(b.T)),
                                 .d_residual_TD = In<float>(b.sum.data(), shape),
                                 .d_x_TD = Out<float>(b.y.data(), shape),
                                 .d_gain_leaf_BD = Out<float>(b.leaf.data(), Shape(b.T / 32, b.D)),
                                 .block_tokens = 32};
  for (auto _ : state) reference::rms_norm_backward(args, workers);
  state.SetBytesProcessed(state.iterations() * cost(args).bytes);
}

BENCHMARK(rms_norm_forward)->ArgsProduct({{1024}, {128, 1024}, {1, 2}})->UseRealTime();
BENCHMARK(rms_norm_backward_pass)->ArgsProduct({{1024}, {128, 1024}, {1, 2}})->UseRealTime();

}  // namespace
}  // namespace cambium
