// Router at the quickstart shape and at 128 experts, top 8.
#include "bench/ops/op_bench.h"
#include "kernels/router_topk.h"

namespace cambium::bench {
namespace {

struct RouterBench {
  test::TestTensor logits_TE, probs_TE, index_TK, weight_TK, d_probs_TE, d_logits_TE;
  RouterBench(int64_t T, int64_t E, int64_t K)
      : logits_TE(normal_tensor(Shape(T, E), 1)),
        probs_TE(Shape(T, E)),
        index_TK(Shape(T, K), DType::i32),
        weight_TK(Shape(T, K)),
        d_probs_TE(normal_tensor(Shape(T, E), 2)),
        d_logits_TE(Shape(T, E)) {}
  RouterTopkArgs forward() {
    return {logits_TE.in<float>(), In<float>(), probs_TE.out<float>(), index_TK.out<int32_t>(),
            weight_TK.out<float>()};
  }
};

void router_topk_forward(benchmark::State& state) {
  RouterBench r(state.range(0), state.range(1), state.range(2));
  run_op_bench(state, reference::router_topk, r.forward(), static_cast<int>(state.range(3)));
}

void router_topk_gradient(benchmark::State& state) {
  RouterBench r(state.range(0), state.range(1), state.range(2));
  Workers workers(1);
  reference::router_topk(r.forward(), workers);
  run_op_bench(state, reference::router_topk_backward,
               RouterTopkBackwardArgs{r.probs_TE.in<float>(), r.index_TK.in<int32_t>(),
                                      r.weight_TK.in<float>(), r.d_probs_TE.in<float>(),
                                      In<float>(), r.d_logits_TE.out<float>()},
               static_cast<int>(state.range(3)));
}

void router_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"T", "E", "K", "threads"})->UseManualTime()->Unit(benchmark::kMicrosecond);
  for (const int64_t threads : {1, 2})
    b->Args({1024, 8, 2, threads})->Args({4096, 128, 8, threads});
}

BENCHMARK(router_topk_forward)->Apply(router_shapes);
BENCHMARK(router_topk_gradient)->Apply(router_shapes);

}  // namespace
}  // namespace cambium::bench
