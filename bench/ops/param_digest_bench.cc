// Digest of the quickstart model's 3.6 million parameters: memory bound.
#include "bench/ops/op_bench.h"
#include "tests/ops/param_digest_cases.h"

namespace cambium::bench {
namespace {

void param_digest_bench(benchmark::State& state) {
  test::TestTensor data = normal_tensor(Shape(state.range(0)), 1);
  int64_t sum[2] = {};
  run_op_bench(state, reference::param_digest,
               ParamDigestArgs{data.in<float>(), 7, 0, Out<int64_t>(sum, Shape(2))},
               static_cast<int>(state.range(1)));
}

BENCHMARK(param_digest_bench)
    ->ArgNames({"N", "threads"})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond)
    ->Args({32768, 1})
    ->Args({3600000, 1})
    ->Args({3600000, 2});

}  // namespace
}  // namespace cambium::bench
