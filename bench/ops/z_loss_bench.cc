// Router z-loss at the quickstart shape and at 128 experts.
#include "bench/ops/op_bench.h"
#include "kernels/z_loss.h"

namespace cambium::bench {
namespace {

void z_loss_bench(benchmark::State& state) {
  const int64_t T = state.range(0), E = state.range(1);
  test::TestTensor logits_TE = normal_tensor(Shape(T, E), 1), loss_T{Shape(T)};
  test::TestTensor d_logits_TE(Shape(T, E));
  run_op_bench(
      state, reference::z_loss,
      ZLossArgs{logits_TE.in<float>(), 1.0f, 1.0f, loss_T.out<float>(), d_logits_TE.out<float>()},
      static_cast<int>(state.range(2)));
}

BENCHMARK(z_loss_bench)
    ->ArgNames({"T", "E", "threads"})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond)
    ->Args({1024, 8, 1})
    ->Args({1024, 8, 2})
    ->Args({4096, 128, 2});

}  // namespace
}  // namespace cambium::bench
