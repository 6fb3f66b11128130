// Grouped GEMM at quickstart shapes: 8 experts of D 128, F 256; 256 rows an expert on one rank, 32
// with a micro-batch of one sequence; a skewed routing; and weight gradients in both modes.
#include <numeric>

#include "bench/ops/op_bench.h"
#include "kernels/grouped_gemm.h"

namespace cambium::bench {
namespace {

constexpr int64_t kD = 128, kF = 256, kExperts = 8;

// `rows_per_expert` on average; `skewed`: each expert takes a third of what is left.
struct ExpertTensors {
  int64_t R;
  test::TestTensor x{normal_tensor(Shape(R, kD), 1)};
  test::TestTensor w_up{normal_tensor(Shape(kExperts, 2 * kF, kD), 2)};
  test::TestTensor w_down{normal_tensor(Shape(kExperts, kD, kF), 3)};
  test::TestTensor weight{normal_tensor(Shape(R), 4)};
  test::TestTensor d_y{normal_tensor(Shape(R, kD), 5)};
  test::TestTensor gate_up{normal_tensor(Shape(R, 2 * kF), 6)};
  test::TestTensor h{normal_tensor(Shape(R, kF), 7)};
  test::TestTensor y{Shape(R, kD)};
  test::TestTensor d_gate_up{normal_tensor(Shape(R, 2 * kF), 8)};
  test::TestTensor d_weight{Shape(R)};
  test::TestTensor weighted_h{Shape(R, kF)};
  test::TestTensor d_x{Shape(R, kD)};
  test::TestTensor d_w{Shape(1, kExperts, 2 * kF, kD)};
  test::TestTensor offsets{Shape(kExperts + 1), DType::i32};
  test::TestTensor row_block{Shape(R), DType::i32};
  test::TestTensor present{Shape(1, kExperts), DType::u8};
  test::TestTensor table{Shape(1, kNodeColumns), DType::i32};
  int64_t blocks = R / 64;  // top-2 of 32-token blocks

  explicit ExpertTensors(const benchmark::State& state) : R(state.range(0) * kExperts) {
    d_w.fill(0);
    table.fill(0);
    table.set(kNodeEndBlock, static_cast<double>(blocks));
    offsets.set(0, 0);
    double left = static_cast<double>(R);
    for (int64_t x = 0; x < kExperts; ++x) {
      const auto even = static_cast<double>(state.range(0));
      const double rows = state.range(1) == 0 ? even
                          : x + 1 < kExperts  ? std::floor(left / 3)
                                              : left;
      for (int64_t i = 0; i < static_cast<int64_t>(rows); ++i) {
        const double block = std::floor(static_cast<double>(i * blocks) / rows);
        row_block.set(static_cast<int64_t>(offsets.at(x)) + i, block);
      }
      offsets.set(x + 1, offsets.at(x) + rows);
      left -= rows;
    }
  }
  int threads(const benchmark::State& state) const { return static_cast<int>(state.range(2)); }
  In<int32_t> offset() { return offsets.in<int32_t>(); }
  GradTarget nodes() { return {GradMode::nodes, table.in<int32_t>(), blocks}; }
  GroupedWgradArgs wgrad_args(GradTarget target, int64_t N, int64_t K) {
    GroupedWgradArgs args;
    args.d_y_RN = N == kD ? d_y.in<Real>() : d_gate_up.in<Real>();
    args.x_RK = K == kD ? x.in<Real>() : h.in<Real>();
    args.expert_offset_e1 = offset();
    args.row_block_R = row_block.in<int32_t>();
    args.d_w_SeNK = InOut<float>(static_cast<float*>(d_w.data()), Shape(1, kExperts, N, K));
    args.present_Se = present.inout<uint8_t>();
    args.target = target;
    args.expert_stride = N * K;
    return args;
  }
};

void experts_up(benchmark::State& state) {
  ExpertTensors t(state);
  run_op_bench(state, reference::grouped_up,
               GroupedUpArgs{t.x.in<Real>(), t.w_up.in<Real>(), t.offset(), t.gate_up.out<Real>(),
                             t.h.out<Real>()},
               t.threads(state));
}

void experts_down(benchmark::State& state) {
  ExpertTensors t(state);
  run_op_bench(state, reference::grouped_down,
               GroupedDownArgs{t.h.in<Real>(), t.w_down.in<Real>(), t.offset(),
                               t.weight.in<float>(), t.y.out<Real>()},
               t.threads(state));
}

void experts_down_input_gradient(benchmark::State& state) {
  ExpertTensors t(state);
  run_op_bench(state, reference::grouped_down_dgrad,
               GroupedDownDgradArgs{t.d_y.in<Real>(), t.w_down.in<Real>(), t.gate_up.in<Real>(),
                                    t.offset(), t.weight.in<float>(), t.d_gate_up.out<Real>(),
                                    t.d_weight.out<float>(), t.weighted_h.out<Real>()},
               t.threads(state));
}

void experts_up_input_gradient(benchmark::State& state) {
  ExpertTensors t(state);
  run_op_bench(
      state, reference::grouped_up_dgrad,
      GroupedUpDgradArgs{t.d_gate_up.in<Real>(), t.w_up.in<Real>(), t.offset(), t.d_x.out<Real>()},
      t.threads(state));
}

void experts_up_weight_gradient_fast(benchmark::State& state) {
  ExpertTensors t(state);
  run_op_bench(state, reference::grouped_wgrad, t.wgrad_args({}, 2 * kF, kD), t.threads(state));
}

void experts_up_weight_gradient_exact(benchmark::State& state) {
  ExpertTensors t(state);
  run_op_bench(state, reference::grouped_wgrad, t.wgrad_args(t.nodes(), 2 * kF, kD),
               t.threads(state));
}

void experts_down_weight_gradient_fast(benchmark::State& state) {
  ExpertTensors t(state);
  run_op_bench(state, reference::grouped_wgrad, t.wgrad_args({}, kD, kF), t.threads(state));
}

void experts_down_weight_gradient_exact(benchmark::State& state) {
  ExpertTensors t(state);
  run_op_bench(state, reference::grouped_wgrad, t.wgrad_args(t.nodes(), kD, kF), t.threads(state));
}

void expert_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows_per_expert", "skewed", "threads"})->UseManualTime();
  b->Unit(benchmark::kMicrosecond);
  for (const int64_t threads : {1, 2}) {
    b->Args({256, 0, threads})->Args({256, 1, threads})->Args({32, 0, threads});
  }
}

BENCHMARK(experts_up)->Apply(expert_shapes);
BENCHMARK(experts_down)->Apply(expert_shapes);
BENCHMARK(experts_down_input_gradient)->Apply(expert_shapes);
BENCHMARK(experts_up_input_gradient)->Apply(expert_shapes);
BENCHMARK(experts_up_weight_gradient_fast)->Apply(expert_shapes);
BENCHMARK(experts_up_weight_gradient_exact)->Apply(expert_shapes);
BENCHMARK(experts_down_weight_gradient_fast)->Apply(expert_shapes);
BENCHMARK(experts_down_weight_gradient_exact)->Apply(expert_shapes);

}  // namespace
}  // namespace cambium::bench
