// SwiGLU at the quickstart shape: 2,048 routed rows of width 256.
#include "bench/ops/op_bench.h"
#include "kernels/swiglu.h"

namespace cambium::bench {
namespace {

void swiglu_forward(benchmark::State& state) {
  const int64_t R = state.range(0), F = state.range(1);
  test::TestTensor gate_up = normal_tensor(Shape(R, 2 * F), 1), h(Shape(R, F));
  run_op_bench(state, reference::swiglu, SwigluArgs{gate_up.in<Real>(), h.out<Real>()},
               static_cast<int>(state.range(2)));
}

void swiglu_gradient(benchmark::State& state) {
  const int64_t R = state.range(0), F = state.range(1);
  test::TestTensor gate_up = normal_tensor(Shape(R, 2 * F), 1), d_h = normal_tensor(Shape(R, F), 2);
  test::TestTensor d_gate_up(Shape(R, 2 * F));
  run_op_bench(state, reference::swiglu_backward,
               SwigluBackwardArgs{gate_up.in<Real>(), d_h.in<Real>(), d_gate_up.out<Real>()},
               static_cast<int>(state.range(2)));
}

void swiglu_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"R", "F", "threads"})->UseManualTime()->Unit(benchmark::kMicrosecond);
  for (const int64_t threads : {1, 2}) b->Args({2048, 256, threads})->Args({256, 256, threads});
}

BENCHMARK(swiglu_forward)->Apply(swiglu_shapes);
BENCHMARK(swiglu_gradient)->Apply(swiglu_shapes);

}  // namespace
}  // namespace cambium::bench
