// token_gate at the quickstart's shape (1024 x 128, F 256); bytes a second moved.
#include "benchmark/benchmark.h"
#include "kernels/token_gate.h"

namespace cambium {
namespace {

struct TokenGateBuffers {
  TokenGateBuffers(int64_t tokens, int64_t width, int64_t inner)
      : T(tokens),
        D(width),
        F(inner),
        x(T * D, 0.5f),
        w(D, 0.01f),
        h(T * F, 0.25f),
        gate(T, 0.5f),
        y(T * F),
        d_h(T * F),
        d_logit(T),
        d_x(T * D),
        leaf(T / 32 * D) {}
  int64_t T, D, F;
  std::vector<float> x, w, h, gate, y, d_h, d_logit, d_x, leaf;
};

void token_gate_forward(benchmark::State& state) {
  TokenGateBuffers b(1024, 128, 256);
  Workers workers(static_cast<int>(state.range(0)));
  const TokenGateArgs args{.x_TD = In<float>(b.x.data(), Shape(b.T, b.D)),
                           .w_D = In<float>(b.w.data(), Shape(b.D)),
                           .h_TF = In<float>(b.h.data(), Shape(b.T, b.F)),
                           .gate_T = Out<float>(b.gate.data(), Shape(b.T)),
                           .y_TF = Out<float>(b.y.data(), Shape(b.T, b.F))};
  for (auto _ : state) reference::token_gate(args, workers);
  state.SetBytesProcessed(state.iterations() * cost(args).bytes);
}

void token_gate_backward_pass(benchmark::State& state) {
  TokenGateBuffers b(1024, 128, 256);
  Workers workers(static_cast<int>(state.range(0)));
  const TokenGateBackwardArgs args{.x_TD = In<float>(b.x.data(), Shape(b.T, b.D)),
                                   .w_D = In<float>(b.w.data(), Shape(b.D)),
                                   .h_TF = In<float>(b.h.data(), Shape(b.T, b.F)),
                                   .gate_T = In<float>(b.gate.data(), Shape(b.T)),
                                   .d_y_TF = In<float>(b.h.data(), Shape(b.T, b.F)),
                                   .d_logit_T = Out<float>(b.d_logit.data(), Shape(b.T)),
                                   .d_h_TF = Out<float>(b.d_h.data(), Shape(b.T, b.F)),
                                   .y_TF = Out<float>(b.y.data(), Shape(b.T, b.F)),
                                   .d_x_TD = Out<float>(b.d_x.data(), Shape(b.T, b.D)),
                                   .d_w_leaf_BD = Out<float>(b.leaf.data(), Shape(b.T / 32, b.D)),
                                   .block_tokens = 32};
  for (auto _ : state) reference::token_gate_backward(args, workers);
  state.SetBytesProcessed(state.iterations() * cost(args).bytes);
}

BENCHMARK(token_gate_forward)->Arg(1)->Arg(2)->UseRealTime();
BENCHMARK(token_gate_backward_pass)->Arg(1)->Arg(2)->UseRealTime();

}  // namespace
}  // namespace cambium
