// Combine of two rows a token, width 128 (quickstart), with the residual.
#include "bench/ops/op_bench.h"
#include "tests/ops/combine_cases.h"

namespace cambium::bench {
namespace {

void combine_rows_bench(benchmark::State& state) {
  const int64_t T = state.range(0), K = state.range(1), D = state.range(2), R = T * K;
  test::TestTensor y_RD = normal_tensor(Shape(R, D), 1),
                   residual_TD = normal_tensor(Shape(T, D), 2);
  test::TestTensor index_TK = test::make_combine_index({T, K, D, R}, 3), out_TD(Shape(T, D));
  run_op_bench(state, reference::combine_rows,
               CombineRowsArgs{y_RD.in<Real>(), index_TK.in<int32_t>(), residual_TD.in<Real>(),
                               out_TD.out<Real>()},
               static_cast<int>(state.range(3)));
}

BENCHMARK(combine_rows_bench)
    ->ArgNames({"T", "K", "D", "threads"})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond)
    ->Args({1024, 2, 128, 1})
    ->Args({1024, 2, 128, 2});

}  // namespace
}  // namespace cambium::bench
