// Gather of 2,048 routed rows of width 128 (quickstart), beside the memory rate it reaches.
#include "bench/ops/op_bench.h"
#include "tests/ops/permute_cases.h"

namespace cambium::bench {
namespace {

void gather_rows_bench(benchmark::State& state) {
  const test::GatherCase c{state.range(0), state.range(1), state.range(2)};
  test::TestTensor x_TD = normal_tensor(Shape(c.T, c.D), 1), y_MD(Shape(c.M, c.D));
  test::TestTensor index_M = test::make_gather_index(c, 2);
  run_op_bench(state, reference::gather_rows,
               GatherRowsArgs{x_TD.in<Real>(), index_M.in<int32_t>(), y_MD.out<Real>()},
               static_cast<int>(state.range(3)));
}

BENCHMARK(gather_rows_bench)
    ->ArgNames({"T", "M", "D", "threads"})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond)
    ->Args({1024, 2048, 128, 1})
    ->Args({1024, 2048, 128, 2});

}  // namespace
}  // namespace cambium::bench
