// qk_norm_rope at the quickstart's shape: 1024 tokens, 4 and 2 heads of 32.
#include "benchmark/benchmark.h"
#include "kernels/qk_norm_rope.h"

namespace cambium {
namespace {

struct QkNormRopeBuffers {
  QkNormRopeBuffers()
      : qkv(T * kWidth, 0.5f),
        d_qkv(T * kWidth),
        q_out(T * H * Q),
        k_out(T * G * Q),
        q_rstd(T * H),
        k_rstd(T * G),
        gain(Q, 1.0f),
        leaf(2 * T / 32 * Q),
        position(T) {
    rope_table({.theta = 10000.0, .head_dim = Q, .positions = 128}, cos, sin);
    for (int64_t t = 0; t < T; ++t) position[t] = static_cast<int32_t>(t % 128);
  }
  static constexpr int64_t T = 1024, H = 4, G = 2, Q = 32, kWidth = (H + 2 * G) * Q;
  std::vector<float> qkv, d_qkv, q_out, k_out, q_rstd, k_rstd, gain, leaf, cos, sin;
  std::vector<int32_t> position;
};

using Buffers = QkNormRopeBuffers;
const Shape kQueries(Buffers::T, Buffers::H, Buffers::Q), kKeys(Buffers::T, Buffers::G, Buffers::Q);
const Shape kAngles(128, Buffers::Q / 2);

void qk_norm_rope_forward(benchmark::State& state) {
  Buffers b;
  Workers workers(static_cast<int>(state.range(0)));
  const In<float> gain(b.gain.data(), Shape(b.Q));
  const QkNormRopeArgs args{.q_THQ = In<float>(b.qkv.data(), kQueries, b.kWidth),
                            .k_TGQ = In<float>(b.qkv.data() + b.H * b.Q, kKeys, b.kWidth),
                            .q_gain = gain,
                            .k_gain = gain,
                            .cos_SC = In<float>(b.cos.data(), kAngles),
                            .sin_SC = In<float>(b.sin.data(), kAngles),
                            .position_T = In<int32_t>(b.position.data(), Shape(b.T)),
                            .q_out_THQ = Out<float>(b.q_out.data(), kQueries),
                            .k_out_TGQ = Out<float>(b.k_out.data(), kKeys),
                            .q_rstd = Out<float>(b.q_rstd.data(), Shape(b.T, b.H)),
                            .k_rstd = Out<float>(b.k_rstd.data(), Shape(b.T, b.G)),
                            .kind = QkNormKind::per_head};
  for (auto _ : state) reference::qk_norm_rope(args, workers);
  state.SetBytesProcessed(state.iterations() * cost(args).bytes);
}

void qk_norm_rope_backward_pass(benchmark::State& state) {
  Buffers b;
  Workers workers(static_cast<int>(state.range(0)));
  const In<float> gain(b.gain.data(), Shape(b.Q));
  const Shape leaves(b.T / 32, b.Q);
  const QkNormRopeBackwardArgs args{
      .d_q_out_THQ = In<float>(b.q_out.data(), kQueries),
      .d_k_out_TGQ = In<float>(b.k_out.data(), kKeys),
      .q_THQ = In<float>(b.qkv.data(), kQueries, b.kWidth),
      .k_TGQ = In<float>(b.qkv.data() + b.H * b.Q, kKeys, b.kWidth),
      .q_gain = gain,
      .k_gain = gain,
      .cos_SC = In<float>(b.cos.data(), kAngles),
      .sin_SC = In<float>(b.sin.data(), kAngles),
      .position_T = In<int32_t>(b.position.data(), Shape(b.T)),
      .q_rstd = In<float>(b.q_rstd.data(), Shape(b.T, b.H)),
      .k_rstd = In<float>(b.k_rstd.data(), Shape(b.T, b.G)),
      .d_q_THQ = Out<float>(b.d_qkv.data(), kQueries, b.kWidth),
      .d_k_TGQ = Out<float>(b.d_qkv.data() + b.H * b.Q, kKeys, b.kWidth),
      .d_q_gain_leaf_BN = Out<float>(b.leaf.data(), leaves),
      .d_k_gain_leaf_BN = Out<float>(b.leaf.data() + leaves.elements(), leaves),
      .block_tokens = 32,
      .kind = QkNormKind::per_head};
  for (auto _ : state) reference::qk_norm_rope_backward(args, workers);
  state.SetBytesProcessed(state.iterations() * cost(args).bytes);
}

BENCHMARK(qk_norm_rope_forward)->Arg(1)->Arg(2)->UseRealTime();
BENCHMARK(qk_norm_rope_backward_pass)->Arg(1)->Arg(2)->UseRealTime();

}  // namespace
}  // namespace cambium
