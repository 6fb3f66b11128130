// Attention on the GPU at Qwen3-30B-A3B's heads, 32 of queries and 4 of keys, bf16. Peers: cuDNN as
// numerics.attention = cudnn calls it, where it is there (its backward pass deterministic as ours),
// and bench/peers/torch_gpu.py: cuDNN through PyTorch, not deterministic.
#include <cmath>

#include "bench/ops/cuda_bench.h"
#include "kernels/attention.h"

namespace cambium::bench {
namespace {

struct AttentionGpuBuffers {
  AttentionGpuBuffers(int64_t sequences, int64_t length, int64_t head_dim)
      : S(length),
        Q(head_dim),
        T(sequences * length),
        q(Shape(T, H, Q)),
        k(Shape(T, G, Q)),
        v(Shape(T, G, Q)),
        o(Shape(T, H, Q)),
        d_o(Shape(T, H, Q)),
        d_q(Shape(T, H, Q)),
        d_k(Shape(T, G, Q)),
        d_v(Shape(T, G, Q)),
        lse(Shape(T, H), DType::f32),
        delta(Shape(T, H), DType::f32) {
    uint64_t seed = 1;
    for (DeviceTensor* tensor : {&q, &k, &v, &d_o}) tensor->fill_normal(seed++);
  }
  AttentionArgs forward(AttentionKernel kernel = AttentionKernel::own) {
    return {.q_THQ = q.in<Real>(),
            .k_TGQ = k.in<Real>(),
            .v_TGQ = v.in<Real>(),
            .o_THQ = o.out<Real>(),
            .lse_TH = lse.out<float>(),
            .sequence_length = S,
            .block_tokens = 32,
            .scale = 1.0f / std::sqrt(static_cast<float>(Q)),
            .kernel = kernel};
  }
  AttentionBackwardArgs backward(AttentionKernel kernel = AttentionKernel::own) {
    return {.q_THQ = q.in<Real>(),
            .k_TGQ = k.in<Real>(),
            .v_TGQ = v.in<Real>(),
            .o_THQ = o.in<Real>(),
            .d_o_THQ = d_o.in<Real>(),
            .lse_TH = lse.in<float>(),
            .d_q_THQ = d_q.out<Real>(),
            .d_k_TGQ = d_k.out<Real>(),
            .d_v_TGQ = d_v.out<Real>(),
            .delta_TH = delta.out<float>(),
            .sequence_length = S,
            .block_tokens = 32,
            .scale = 1.0f / std::sqrt(static_cast<float>(Q)),
            .kernel = kernel};
  }
  static constexpr int64_t H = 32, G = 4;
  int64_t S, Q, T;
  DeviceTensor q, k, v, o, d_o, d_q, d_k, d_v, lse, delta;
};

template <class Launch>
void run_against_cudnn(benchmark::State& state, double flops, const Launch& launch) {
  std::vector<GpuContender> contenders;
  for (const AttentionKernel kernel : {AttentionKernel::own, AttentionKernel::cudnn}) {
    const bool is_own = kernel == AttentionKernel::own;
    if (!is_own && !cuda::cudnn_missing().empty()) continue;
    contenders.push_back({is_own ? "own" : "cudnn", flops, 0,
                          [&, kernel](OpContext& context, int64_t) { launch(kernel, context); }});
  }
  run_gpu_bench(state, contenders);
}

// FLOPs as the field counts them: 2 T S H Q, and 2.5 times that, without softmax and diagonal.
void attention_cuda(benchmark::State& state) {
  if (!gpu_is_there(state)) return;
  AttentionGpuBuffers b(state.range(0), state.range(1), state.range(2));
  const double flops = 2.0 * static_cast<double>(b.T * b.S * b.H * b.Q);
  run_against_cudnn(state, flops, [&](AttentionKernel kernel, OpContext& context) {
    attention(b.forward(kernel), context);
  });
}

void attention_backward_cuda(benchmark::State& state) {
  if (!gpu_is_there(state)) return;
  AttentionGpuBuffers b(state.range(0), state.range(1), state.range(2));
  const double flops = 5.0 * static_cast<double>(b.T * b.S * b.H * b.Q);
  const GpuContender forward{"forward", flops, 0,
                             [&](OpContext& context, int64_t) { attention(b.forward(), context); }};
  time_on_gpu(std::span(&forward, 1), {.samples = 1});  // o and lse
  run_against_cudnn(state, flops, [&](AttentionKernel kernel, OpContext& context) {
    attention_backward(b.backward(kernel), context);
  });
}

// The second of two ranks that share sequences of S, both passes: keys as a ring brings them, a
// part at a time, beside all of them at once as an all-gather does.
void attention_parts_cuda(benchmark::State& state) {
  if (!gpu_is_there(state)) return;
  const int64_t ranks = 2;
  const ContextShare share{ranks, 1};
  AttentionGpuBuffers b(state.range(0), state.range(1) / ranks, state.range(2));
  const Shape all(b.T * ranks, b.G, b.Q), keys(b.T, b.G * b.Q);
  const Shape all_keys(all[0], keys[1]), rows(b.T, b.H, b.Q);
  DeviceTensor k(all), v(all), d_k(all_keys, DType::f32), d_v(all_keys, DType::f32);
  DeviceTensor o_sum(rows, DType::f32), d_q_sum(rows, DType::f32);
  k.fill_normal(8), v.fill_normal(9);
  const auto shared = [&](auto args) {
    args.sequence_length = b.S * ranks;
    args.share = share;
    return args;
  };
  const auto gathered = [&](OpContext& context, int64_t) {
    AttentionArgs forward = shared(b.forward());
    AttentionBackwardArgs backward = shared(b.backward());
    forward.k_TGQ = backward.k_TGQ = k.in<Real>();
    forward.v_TGQ = backward.v_TGQ = v.in<Real>();
    backward.d_k_TGQ = backward.d_v_TGQ = {};
    backward.d_k_sum_SC = d_k.out<float>(), backward.d_v_sum_SC = d_v.out<float>();
    attention(forward, context), attention_backward(backward, context);
  };
  const auto by_parts = [&](OpContext& context, int64_t) {
    AttentionArgs forward = shared(b.forward());
    AttentionBackwardArgs backward = shared(b.backward());
    forward.o_THQ = {}, forward.lse_TH = {};
    forward.o_sum_THQ = o_sum.inout<float>(), forward.lse_sum_TH = b.lse.inout<float>();
    backward.d_q_THQ = {}, backward.d_k_TGQ = backward.d_v_TGQ = {};
    backward.d_q_sum_THQ = d_q_sum.inout<float>();
    backward.d_k_sum_SC = {d_k.out<float>().pointer(), keys};
    backward.d_v_sum_SC = {d_v.out<float>().pointer(), keys};
    for (const KeyPart part : {KeyPart::first, KeyPart::next}) {
      forward.part = backward.part = part;
      forward.key_rank = backward.key_rank = part == KeyPart::first ? share.index : 0;
      attention(forward, context), attention_backward(backward, context);
    }
  };
  const double flops = 7.0 * static_cast<double>(b.T * b.S * ranks * b.H * b.Q);
  run_gpu_bench(state, std::vector<GpuContender>{{"parts", flops, 0, by_parts},
                                                 {"gathered", flops, 0, gathered}});
}

void attention_cuda_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"sequences", "S", "Q"})->UseManualTime()->Iterations(1);
  b->Unit(benchmark::kMillisecond);
  for (const int64_t Q : {128, 64}) b->Args({4, 4096, Q});
  b->Args({1, 4096, 128})->Args({2, 2048, 128})->Args({2, 8192, 128});
}
BENCHMARK(attention_cuda)->Apply(attention_cuda_shapes);
BENCHMARK(attention_backward_cuda)->Apply(attention_cuda_shapes);
BENCHMARK(attention_parts_cuda)->Apply(attention_cuda_shapes);

}  // namespace
}  // namespace cambium::bench
