// AdamW over the quickstart model's 3.6 million parameters: memory bound.
#include "bench/ops/op_bench.h"
#include "tests/ops/adamw_cases.h"

namespace cambium::bench {
namespace {

void adamw_bench(benchmark::State& state) {
  test::AdamwTensors t(state.range(0), 1);
  run_op_bench(state, reference::adamw, test::adamw_args(t, {}, 1),
               static_cast<int>(state.range(1)));
}

BENCHMARK(adamw_bench)
    ->ArgNames({"N", "threads"})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond)
    ->Args({32768, 1})
    ->Args({3600000, 1})
    ->Args({3600000, 2});

}  // namespace
}  // namespace cambium::bench
