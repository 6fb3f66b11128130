// Sum of squares over the quickstart model's 3.6 million gradients: memory bound.
#include "bench/ops/op_bench.h"
#include "tests/ops/grad_norm_cases.h"

namespace cambium::bench {
namespace {

void square_sum_bench(benchmark::State& state) {
  test::SquareSumTensors t(state.range(0), 1);
  run_op_bench(state, reference::square_sum, t.args(), static_cast<int>(state.range(1)));
}

BENCHMARK(square_sum_bench)
    ->ArgNames({"N", "threads"})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond)
    ->Args({32768, 1})
    ->Args({3600000, 1})
    ->Args({3600000, 2});

}  // namespace
}  // namespace cambium::bench
