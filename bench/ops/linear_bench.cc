// Linear layer at quickstart shapes: T 1024 (one rank) and 128 (eight ranks), D 128.
#include "bench/ops/op_bench.h"
#include "kernels/linear.h"

namespace cambium::bench {
namespace {

struct LinearTensors {
  int64_t T, N, K;
  test::TestTensor x{normal_tensor(Shape(T, K), 1)};
  test::TestTensor w{normal_tensor(Shape(N, K), 2)};
  test::TestTensor d_y{normal_tensor(Shape(T, N), 3)};
  test::TestTensor y{Shape(T, N)};
  test::TestTensor d_x{Shape(T, K)};
  test::TestTensor d_w{Shape(1, N, K)};
  test::TestTensor present{Shape(1), DType::u8};
  explicit LinearTensors(const benchmark::State& state)
      : T(state.range(0)), N(state.range(1)), K(state.range(2)) {
    d_w.fill(0);
  }
};

void linear_forward(benchmark::State& state) {
  LinearTensors t(state);
  run_op_bench(state, reference::linear,
               LinearArgs{t.x.in<Real>(), t.w.in<Real>(), {}, t.y.out<Real>()},
               static_cast<int>(state.range(3)));
}

void linear_input_gradient(benchmark::State& state) {
  LinearTensors t(state);
  run_op_bench(state, reference::linear_dgrad,
               LinearDgradArgs{t.d_y.in<Real>(), t.w.in<Real>(), {}, t.d_x.out<Real>()},
               static_cast<int>(state.range(3)));
}

void linear_weight_gradient_fast(benchmark::State& state) {
  LinearTensors t(state);
  run_op_bench(
      state, reference::linear_wgrad,
      LinearWgradArgs{t.d_y.in<Real>(), t.x.in<Real>(), t.d_w.inout<float>(), {}, {}, 0, 0},
      static_cast<int>(state.range(3)));
}

void linear_weight_gradient_exact(benchmark::State& state) {
  constexpr int64_t kBlockTokens = 32;
  LinearTensors t(state);
  const int64_t blocks = t.T / kBlockTokens;
  test::TestTensor table(Shape(1, kNodeColumns), DType::i32);
  table.fill(0);
  table.set(kNodeEndBlock, static_cast<double>(blocks));
  const GradTarget target{GradMode::nodes, table.in<int32_t>(), blocks};
  run_op_bench(state, reference::linear_wgrad,
               LinearWgradArgs{t.d_y.in<Real>(), t.x.in<Real>(), t.d_w.inout<float>(),
                               t.present.inout<uint8_t>(), target, 0, kBlockTokens},
               static_cast<int>(state.range(3)));
}

void linear_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"T", "N", "K", "threads"})->UseManualTime()->Unit(benchmark::kMicrosecond);
  for (const int64_t threads : {1, 2}) {
    for (const int64_t T : {1024, 128}) {
      b->Args({T, 256, 128, threads});   // query, key, value
      b->Args({T, 128, 128, threads});   // attention output
      b->Args({T, 8, 128, threads});     // router
      b->Args({T, 1024, 128, threads});  // logits
    }
  }
}

BENCHMARK(linear_forward)->Apply(linear_shapes);
BENCHMARK(linear_input_gradient)->Apply(linear_shapes);
BENCHMARK(linear_weight_gradient_fast)->Apply(linear_shapes);
BENCHMARK(linear_weight_gradient_exact)->Apply(linear_shapes);

}  // namespace
}  // namespace cambium::bench
