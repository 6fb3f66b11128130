// Routing sort at the quickstart shape and at 64 experts.
#include "bench/ops/op_bench.h"
#include "tests/ops/routing_sort_cases.h"

namespace cambium::bench {
namespace {

void routing_sort_bench(benchmark::State& state) {
  const int64_t T = state.range(0), E = state.range(1), K = state.range(2), R = T * K;
  test::TestTensor index_TK = test::make_routing({T, E, K, test::Spread::random}, 1);
  test::TestTensor offset_e1(Shape(E + 1), DType::i32), token_R(Shape(R), DType::i32);
  test::TestTensor slot_R(Shape(R), DType::i32), ordered_row_R(Shape(R), DType::i32);
  test::TestTensor slot_row_TK(Shape(T, K), DType::i32);
  run_op_bench(state, reference::routing_sort,
               RoutingSortArgs{.expert_index_TK = index_TK.in<int32_t>(),
                               .experts = E,
                               .expert_offset_e1 = offset_e1.out<int32_t>(),
                               .row_token_R = token_R.out<int32_t>(),
                               .row_slot_R = slot_R.out<int32_t>(),
                               .ordered_row_R = ordered_row_R.out<int32_t>(),
                               .slot_row_TK = slot_row_TK.out<int32_t>()},
               static_cast<int>(state.range(3)));
}

BENCHMARK(routing_sort_bench)
    ->ArgNames({"T", "E", "K", "threads"})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond)
    ->Args({1024, 8, 2, 1})
    ->Args({1024, 8, 2, 2})
    ->Args({16384, 64, 6, 1})
    ->Args({16384, 64, 6, 2});

}  // namespace
}  // namespace cambium::bench
