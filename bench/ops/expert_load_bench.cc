// Expert histogram at the quickstart shape and at 64 experts.
#include "bench/ops/op_bench.h"
#include "tests/ops/expert_load_cases.h"

namespace cambium::bench {
namespace {

void expert_histogram_bench(benchmark::State& state) {
  const int64_t T = state.range(0), E = state.range(1), K = state.range(2);
  test::TestTensor index_TK = test::make_routing({T, E, K, test::Spread::random}, 1);
  test::TestTensor count_E(Shape(E), DType::i32);
  count_E.fill(0);
  run_op_bench(state, reference::expert_histogram,
               ExpertHistogramArgs{index_TK.in<int32_t>(), count_E.inout<int32_t>()},
               static_cast<int>(state.range(3)));
}

BENCHMARK(expert_histogram_bench)
    ->ArgNames({"T", "E", "K", "threads"})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond)
    ->Args({1024, 8, 2, 1})
    ->Args({1024, 8, 2, 2})
    ->Args({16384, 64, 6, 2});

}  // namespace
}  // namespace cambium::bench
