// attention at the quickstart's shape (8 x 128, 4/2 heads of 32) and the small model's (8 x 256,
// 8/4 heads of 32), forward and backward; FLOPs of the causal half.
#include "benchmark/benchmark.h"
#include "kernels/attention.h"

namespace cambium {
namespace {

struct AttentionBuffers {
  AttentionBuffers(int64_t length, int64_t heads)
      : S(length),
        H(heads),
        G(heads / 2),
        width((H + 2 * G) * Q),
        qkv(T() * width),
        d_qkv(T() * width),
        o(T() * H * Q),
        d_o(T() * H * Q, 0.1f),
        lse(T() * H),
        delta(T() * H) {
    for (size_t i = 0; i < qkv.size(); ++i) {
      qkv[i] = static_cast<float>(static_cast<int>(i * 7919 % 1009) - 504) * 0.002f;
    }
  }
  int64_t T() const { return 8 * S; }
  int64_t S, H, G, Q = 32, width;
  std::vector<float> qkv, d_qkv, o, d_o, lse, delta;
  In<float> part(const std::vector<float>& from, int64_t column, int64_t heads) const {
    return In<float>(from.data() + column, Shape(T(), heads, Q), width);
  }
  Out<float> part(std::vector<float>& from, int64_t column, int64_t heads) const {
    return Out<float>(from.data() + column, Shape(T(), heads, Q), width);
  }
};

void attention_forward(benchmark::State& state) {
  AttentionBuffers b(state.range(0), state.range(1));
  Workers workers(static_cast<int>(state.range(3)));
  const std::vector<float>& qkv = b.qkv;
  const AttentionArgs args{.q_THQ = b.part(qkv, 0, b.H),
                           .k_TGQ = b.part(qkv, b.H * b.Q, b.G),
                           .v_TGQ = b.part(qkv, (b.H + b.G) * b.Q, b.G),
                           .o_THQ = Out<float>(b.o.data(), Shape(b.T(), b.H, b.Q)),
                           .lse_TH = Out<float>(b.lse.data(), Shape(b.T(), b.H)),
                           .sequence_length = b.S,
                           .block_tokens = state.range(2),
                           .scale = 0.177f};
  for (auto _ : state) reference::attention(args, workers);
  state.counters["flops/s"] = benchmark::Counter(static_cast<double>(cost(args).flops),
                                                 benchmark::Counter::kIsIterationInvariantRate);
}

void attention_backward_pass(benchmark::State& state) {
  AttentionBuffers b(state.range(0), state.range(1));
  Workers workers(static_cast<int>(state.range(3)));
  const std::vector<float>& qkv = b.qkv;
  const Shape o_shape(b.T(), b.H, b.Q);
  const AttentionBackwardArgs args{.q_THQ = b.part(qkv, 0, b.H),
                                   .k_TGQ = b.part(qkv, b.H * b.Q, b.G),
                                   .v_TGQ = b.part(qkv, (b.H + b.G) * b.Q, b.G),
                                   .o_THQ = In<float>(b.o.data(), o_shape),
                                   .d_o_THQ = In<float>(b.d_o.data(), o_shape),
                                   .lse_TH = In<float>(b.lse.data(), Shape(b.T(), b.H)),
                                   .d_q_THQ = b.part(b.d_qkv, 0, b.H),
                                   .d_k_TGQ = b.part(b.d_qkv, b.H * b.Q, b.G),
                                   .d_v_TGQ = b.part(b.d_qkv, (b.H + b.G) * b.Q, b.G),
                                   .delta_TH = Out<float>(b.delta.data(), Shape(b.T(), b.H)),
                                   .sequence_length = b.S,
                                   .block_tokens = state.range(2),
                                   .scale = 0.177f};
  for (auto _ : state) reference::attention_backward(args, workers);
  state.counters["flops/s"] = benchmark::Counter(static_cast<double>(cost(args).flops),
                                                 benchmark::Counter::kIsIterationInvariantRate);
}

// One rank of `ranks` that share the sequences: T rows of queries against a part of the keys at a
// time, as a ring brings them, forward and backward; per rank the FLOPs of whole keys.
void attention_by_parts(benchmark::State& state) {
  const int64_t ranks = state.range(2), S = state.range(0) * ranks;
  AttentionBuffers b(state.range(0), state.range(1));  // T rows: this rank's, or a part's
  Workers workers(static_cast<int>(state.range(3)));
  const Shape rows(b.T(), b.H, b.Q), stats(b.T(), b.H), keys(b.T(), b.G * b.Q);
  std::vector<float> d_q(b.o.size()), d_k(b.T() * b.G * b.Q), d_v(d_k.size());
  const std::vector<float>& qkv = b.qkv;
  AttentionArgs forward{.q_THQ = b.part(qkv, 0, b.H),
                        .k_TGQ = b.part(qkv, b.H * b.Q, b.G),
                        .v_TGQ = b.part(qkv, (b.H + b.G) * b.Q, b.G),
                        .sequence_length = S,
                        .block_tokens = 32,
                        .scale = 0.177f,
                        .share = {ranks, 0},
                        .o_sum_THQ = {b.o.data(), rows},
                        .lse_sum_TH = {b.lse.data(), stats}};
  AttentionBackwardArgs backward{.q_THQ = forward.q_THQ,
                                 .k_TGQ = forward.k_TGQ,
                                 .v_TGQ = forward.v_TGQ,
                                 .o_THQ = In<float>(b.o.data(), rows),
                                 .d_o_THQ = In<float>(b.d_o.data(), rows),
                                 .lse_TH = In<float>(b.lse.data(), stats),
                                 .delta_TH = Out<float>(b.delta.data(), stats),
                                 .sequence_length = S,
                                 .block_tokens = 32,
                                 .scale = 0.177f,
                                 .share = {ranks, 0},
                                 .d_k_sum_SC = Out<float>(d_k.data(), keys),
                                 .d_v_sum_SC = Out<float>(d_v.data(), keys),
                                 .d_q_sum_THQ = {d_q.data(), rows}};
  const auto ring = [&](auto& args, auto&& run) {
    for (int64_t hop = 0; hop < ranks; ++hop) {
      args.part = hop == 0 ? KeyPart::first : KeyPart::next;
      args.key_rank = (ranks - hop) % ranks;
      run();
    }
  };
  int64_t flops = 0;
  ring(forward, [&] { flops += cost(forward).flops; });
  ring(backward, [&] { flops += cost(backward).flops; });
  for (auto _ : state) {
    ring(forward, [&] { reference::attention(forward, workers); });
    ring(backward, [&] { reference::attention_backward(backward, workers); });
  }
  state.counters["flops/s"] =
      benchmark::Counter(static_cast<double>(flops), benchmark::Counter::kIsIterationInvariantRate);
}
// Rows of a sequence here, heads, ranks, threads.
BENCHMARK(attention_by_parts)
    ->Args({128, 4, 2, 1})
    ->Args({128, 4, 2, 2})
    ->Args({128, 4, 4, 1})
    ->Args({256, 8, 2, 2})
    ->UseRealTime();

// Sequence length, heads, block, threads.
void attention_shapes(benchmark::internal::Benchmark* bench) {
  for (int64_t block : {16, 32, 64, 128}) {
    for (int64_t threads : {1, 2}) bench->Args({128, 4, block, threads});
  }
  for (int64_t threads : {1, 2}) bench->Args({256, 8, 32, threads});
  bench->UseRealTime();
}
BENCHMARK(attention_forward)->Apply(attention_shapes);
BENCHMARK(attention_backward_pass)->Apply(attention_shapes);

}  // namespace
}  // namespace cambium
