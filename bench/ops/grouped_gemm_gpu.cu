// Grouped GEMM on the GPU at Qwen3-30B-A3B shapes: 128 experts of D 2048, F 768, T = 16,384 tokens,
// top-8; uniform loads and loads that fall as rank^-0.7. As the trainer calls them: rows gathered,
// epilogues fused, weight gradients in fp32. The peer, interleaved in the same call, is
// cuBLAS strided-batched 128 x [1024 x 2048] x [2048 x 1536] in bf16, a product without any of it.
#include <cublas_v2.h>

#include <cmath>
#include <numeric>

#include "bench/ops/cuda_bench.h"
#include "kernels/cuda_launch.cuh"
#include "kernels/grouped_gemm.h"
#include "tests/ops/op_test.h"

namespace cambium::bench {
namespace {

constexpr int64_t kT = 16384, kTopK = 8, kR = kT * kTopK, kD = 2048, kF = 768, kN = 2 * kF;
constexpr int64_t kE = 128;

enum Loads : int64_t { uniform = 0, skewed = 1 };

std::vector<int64_t> rows_of_experts(int64_t loads) {
  std::vector<int64_t> rows(static_cast<size_t>(kE), kR / kE);
  if (loads == uniform) return rows;
  std::vector<double> share(static_cast<size_t>(kE));
  for (int64_t x = 0; x < kE; ++x) {
    const int64_t rank = x * 37 % kE;  // an order without a trend
    share[static_cast<size_t>(x)] = std::pow(static_cast<double>(rank + 1), -0.7);
  }
  const double total = std::accumulate(share.begin(), share.end(), 0.0);
  for (size_t x = 0; x < rows.size(); ++x) {
    rows[x] = static_cast<int64_t>(share[x] / total * static_cast<double>(kR));
  }
  rows[0] += kR - std::accumulate(rows.begin(), rows.end(), int64_t{0});
  return rows;
}

class CublasPeer {
 public:
  CublasPeer() { CHECK_EQ(static_cast<int>(cublasCreate(&handle_)), 0); }
  CublasPeer(const CublasPeer&) = delete;
  CublasPeer& operator=(const CublasPeer&) = delete;
  ~CublasPeer() { cublasDestroy(handle_); }
  // out[g] = x[g] w[g]^T, each [R / E, D] x [D, N].
  void strided_batched(const void* x, const void* w, void* out, Stream& stream) {
    constexpr int kRows = kR / kE, kColumns = kN, kDepth = kD;
    const float one = 1, zero = 0;
    cublasSetStream(handle_, cuda::native_stream(stream));
    const cublasStatus_t status = cublasGemmStridedBatchedEx(
        handle_, CUBLAS_OP_T, CUBLAS_OP_N, kColumns, kRows, kDepth, &one, w, CUDA_R_16BF, kDepth,
        int64_t{kColumns} * kDepth, x, CUDA_R_16BF, kDepth, int64_t{kRows} * kDepth, &zero, out,
        CUDA_R_16BF, kColumns, int64_t{kRows} * kColumns, kE, CUBLAS_COMPUTE_32F,
        CUBLAS_GEMM_DEFAULT);
    CHECK_EQ(static_cast<int>(status), 0);
  }

 private:
  cublasHandle_t handle_ = nullptr;
};

struct GpuExperts {
  DeviceTensor x{Shape(kT, kD)}, d_y{Shape(kT, kD)}, w_up{Shape(kE, kN, kD)};
  DeviceTensor w_down{Shape(kE, kD, kF)}, gate_up{Shape(kR, kN)}, h{Shape(kR, kF)};
  DeviceTensor y{Shape(kR, kD)}, d_gate_up{Shape(kR, kN)}, weighted_h{Shape(kR, kF)};
  DeviceTensor weight{Shape(kR), DType::f32}, d_weight{Shape(kR), DType::f32};
  DeviceTensor token{Shape(kR), DType::i32}, offsets{Shape(kE + 1), DType::i32};
  DeviceTensor d_w{Shape(1, kE, kN, kD), DType::f32};
  DeviceTensor peer_x{Shape(kR, kD)}, peer_out{Shape(kR, kN)};
  CublasPeer cublas;

  explicit GpuExperts(int64_t loads) {
    uint64_t seed = 1;
    for (DeviceTensor* tensor :
         {&x, &d_y, &peer_x, &gate_up, &h, &d_gate_up, &weighted_h, &weight, &d_w}) {
      tensor->fill_normal(++seed);
    }
    w_up.fill_normal(++seed, 1 / std::sqrt(static_cast<double>(kD)));
    w_down.fill_normal(++seed, 1 / std::sqrt(static_cast<double>(kF)));
    std::vector<int32_t> offset{0}, tokens;
    test::TestRandom random(7);
    for (const int64_t rows : rows_of_experts(loads)) {
      // Ascending tokens with random gaps, as the stable sort leaves them.
      for (int64_t i = 0; i < rows; ++i) {
        const double gap = static_cast<double>(kT) / static_cast<double>(rows);
        const double at = (static_cast<double>(i) + random.uniform()) * gap;
        tokens.push_back(static_cast<int32_t>(std::min(at, static_cast<double>(kT - 1))));
      }
      offset.push_back(static_cast<int32_t>(offset.back() + rows));
    }
    token.upload(tokens.data());
    offsets.upload(offset.data());
  }
  GpuContender peer() {
    return {"cublas_batched", 2.0 * kR * kN * kD, 0, [this](OpContext& context, int64_t) {
              cublas.strided_batched(peer_x.data(), w_up.data(), peer_out.data(), *context.stream);
            }};
  }
  template <class Args>
  GpuContender ours(void (*op)(const Args&, OpCall), const Args& args, double flops) {
    return {"ours", flops, 0, [op, args](OpContext& context, int64_t) { op(args, context); }};
  }
  GroupedWgradArgs wgrad(DeviceTensor& d_y_rows, DeviceTensor& x_rows, int64_t N, int64_t K,
                         int64_t stores) {
    GroupedWgradArgs args;
    args.target.mode = stores != 0 ? GradMode::store : GradMode::accumulate;
    args.d_y_RN = d_y_rows.in<Real>();
    args.x_RK = x_rows.in<Real>();
    args.expert_offset_e1 = offsets.in<int32_t>();
    args.d_w_SeNK = InOut<float>(static_cast<float*>(d_w.data()), Shape(1, kE, N, K));
    args.expert_stride = N * K;
    return args;
  }
};

constexpr double kUpFlops = 2.0 * kR * kN * kD, kDownFlops = 2.0 * kR * kF * kD;

// `make(tensors)` returns our contender; the peer runs beside it.
template <class Make>
void run_beside_cublas(benchmark::State& state, Make&& make) {
  if (!gpu_is_there(state)) return;
  GpuExperts t(state.range(0));
  const GpuContender contenders[] = {make(t), t.peer()};
  run_gpu_bench(state, contenders);
}

void gpu_experts_up(benchmark::State& state) {
  run_beside_cublas(state, [](GpuExperts& t) {
    return t.ours(grouped_up,
                  GroupedUpArgs{t.x.in<Real>(), t.w_up.in<Real>(), t.offsets.in<int32_t>(),
                                t.gate_up.out<Real>(), t.h.out<Real>(), t.token.in<int32_t>()},
                  kUpFlops);
  });
}

void gpu_experts_down(benchmark::State& state) {
  run_beside_cublas(state, [](GpuExperts& t) {
    return t.ours(grouped_down,
                  GroupedDownArgs{t.h.in<Real>(), t.w_down.in<Real>(), t.offsets.in<int32_t>(),
                                  t.weight.in<float>(), t.y.out<Real>()},
                  kDownFlops);
  });
}

void gpu_experts_down_input_gradient(benchmark::State& state) {
  run_beside_cublas(state, [](GpuExperts& t) {
    return t.ours(grouped_down_dgrad,
                  GroupedDownDgradArgs{t.d_y.in<Real>(), t.w_down.in<Real>(), t.gate_up.in<Real>(),
                                       t.offsets.in<int32_t>(), t.weight.in<float>(),
                                       t.d_gate_up.out<Real>(), t.d_weight.out<float>(),
                                       t.weighted_h.out<Real>(), t.token.in<int32_t>()},
                  kDownFlops);
  });
}

void gpu_experts_up_input_gradient(benchmark::State& state) {
  run_beside_cublas(state, [](GpuExperts& t) {
    return t.ours(grouped_up_dgrad,
                  GroupedUpDgradArgs{t.d_gate_up.in<Real>(), t.w_up.in<Real>(),
                                     t.offsets.in<int32_t>(), t.y.out<Real>()},
                  kUpFlops);
  });
}

void gpu_experts_up_weight_gradient(benchmark::State& state) {
  run_beside_cublas(state, [&](GpuExperts& t) {
    GroupedWgradArgs args = t.wgrad(t.d_gate_up, t.x, kN, kD, state.range(1));
    args.x_token_R = t.token.in<int32_t>();
    return t.ours(grouped_wgrad, args, kUpFlops);
  });
}

void gpu_experts_down_weight_gradient(benchmark::State& state) {
  run_beside_cublas(state, [&](GpuExperts& t) {
    GroupedWgradArgs args = t.wgrad(t.d_y, t.weighted_h, kD, kF, state.range(1));
    args.d_y_token_R = t.token.in<int32_t>();
    return t.ours(grouped_wgrad, args, kDownFlops);
  });
}

void once_in_us(benchmark::internal::Benchmark* b) {
  b->UseManualTime()->Iterations(1)->Unit(benchmark::kMicrosecond);
}
void gpu_loads(benchmark::internal::Benchmark* b) {
  once_in_us(b->ArgName("skewed")->Arg(uniform)->Arg(skewed));
}
// Added to fp32, as later micro-batches are, or stored, as the first one is.
void gpu_loads_and_modes(benchmark::internal::Benchmark* b) {
  once_in_us(b->ArgNames({"skewed", "stores"})->ArgsProduct({{uniform, skewed}, {0, 1}}));
}

BENCHMARK(gpu_experts_up)->Apply(gpu_loads);
BENCHMARK(gpu_experts_down)->Apply(gpu_loads);
BENCHMARK(gpu_experts_up_input_gradient)->Apply(gpu_loads);
BENCHMARK(gpu_experts_up_weight_gradient)->Apply(gpu_loads_and_modes);
BENCHMARK(gpu_experts_down_input_gradient)->Apply(gpu_loads);
BENCHMARK(gpu_experts_down_weight_gradient)->Apply(gpu_loads_and_modes);

}  // namespace
}  // namespace cambium::bench
