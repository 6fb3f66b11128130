// Dispatch plan at the quickstart shape (a rank's 128 tokens, and all 1,024) and at 64 experts.
#include "bench/ops/op_bench.h"
#include "tests/ops/dispatch_plan_cases.h"

namespace cambium::bench {
namespace {

void dispatch_plan_bench(benchmark::State& state) {
  const int64_t T = state.range(0), E = state.range(1), K = state.range(2), P = state.range(3);
  const int64_t M = dispatch_capacity(T, K, P);
  test::TestTensor index_TK = test::make_routing({T, E, K, test::Spread::random}, 1);
  test::TestTensor weight_TK = normal_tensor(Shape(T, K), 2);
  test::TestTensor count_P2(Shape(P, 2), DType::i32), token_M(Shape(M), DType::i32);
  test::TestTensor expert_MK(Shape(M, K), DType::i32), weight_MK(Shape(M, K));
  test::TestTensor return_row_TK(Shape(T, K), DType::i32), part_TP(Shape(T, P), DType::i32);
  run_op_bench(state, reference::dispatch_plan,
               DispatchPlanArgs{.expert_index_TK = index_TK.in<int32_t>(),
                                .weight_TK = weight_TK.in<float>(),
                                .ranks = P,
                                .experts_per_rank = E / P,
                                .send_count_P2 = count_P2.out<int32_t>(),
                                .send_token_M = token_M.out<int32_t>(),
                                .send_expert_MK = expert_MK.out<int32_t>(),
                                .send_weight_MK = weight_MK.out<float>(),
                                .return_row_TK = return_row_TK.out<int32_t>(),
                                .token_part_TP = part_TP.out<int32_t>()},
               static_cast<int>(state.range(4)));
}

BENCHMARK(dispatch_plan_bench)
    ->ArgNames({"T", "E", "K", "P", "threads"})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond)
    ->Args({128, 8, 2, 4, 1})
    ->Args({1024, 8, 2, 4, 1})
    ->Args({1024, 8, 2, 4, 2})
    ->Args({16384, 64, 6, 8, 2});

}  // namespace
}  // namespace cambium::bench
