// Load-balance loss at the quickstart shape and at 128 experts.
#include "bench/ops/op_bench.h"
#include "tests/ops/balance_loss_cases.h"

namespace cambium::bench {
namespace {

void balance_loss_bench(benchmark::State& state) {
  const test::BalanceLossCase c{
      {state.range(0), state.range(1), state.range(2), test::Spread::random}, 128, 32};
  test::BalanceLossTensors t(c, CountSource::own_sequence, 1);
  run_op_bench(state, reference::balance_loss, t.args, static_cast<int>(state.range(3)));
}

BENCHMARK(balance_loss_bench)
    ->ArgNames({"T", "E", "K", "threads"})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond)
    ->Args({1024, 8, 2, 1})
    ->Args({1024, 8, 2, 2})
    ->Args({4096, 128, 8, 2});

}  // namespace
}  // namespace cambium::bench
