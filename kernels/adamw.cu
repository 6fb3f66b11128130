// AdamW on the GPU: one pass over parameters, moments and gradients, 16 bytes an access, the bf16
// copy written on the way. Elements are the reference's bits: nothing is contracted, divisions and
// roots are IEEE's.
#include "kernels/adamw.h"

#include <cmath>

#include "kernels/cuda_launch.cuh"

namespace cambium::cuda {

namespace {

constexpr int kThreads = 256;

// Coefficients rounded once from fp64; `scale` is read on the device.
struct AdamwCoefficients {
  float decay, one_minus_beta1, beta2, one_minus_beta2, root_correction2, epsilon, step;
};

AdamwCoefficients coefficients(const AdamwArgs& a) {
  return {static_cast<float>(1.0 - a.lr * a.weight_decay),
          static_cast<float>(1.0 - a.beta1),
          static_cast<float>(a.beta2),
          static_cast<float>(1.0 - a.beta2),
          static_cast<float>(std::sqrt(a.bias_correction2)),
          static_cast<float>(a.epsilon),
          static_cast<float>(a.lr / a.bias_correction1)};
}

template <class T>
struct AdamwState {
  float *param_N, *m_N, *v_N;
  const float *grad_N, *scale_1;
  T* compute_N;  // may be null
  int64_t N;
};

// Elements [at, at + kVec).
template <class T, int kVec>
__device__ __forceinline__ void update(const AdamwState<T>& a, const AdamwCoefficients& c,
                                       float scale, int64_t at) {
  float param[kVec], m[kVec], v[kVec], grad[kVec];
  load_floats<kVec>(a.grad_N + at, grad);
  load_floats<kVec>(a.param_N + at, param);
  load_floats<kVec>(a.m_N + at, m);
  load_floats<kVec>(a.v_N + at, v);
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    const float g = grad[j] * scale;
    m[j] = m[j] + c.one_minus_beta1 * (g - m[j]);
    v[j] = v[j] * c.beta2 + c.one_minus_beta2 * g * g;
    const float denominator = sqrtf(v[j]) / c.root_correction2 + c.epsilon;
    param[j] = param[j] * c.decay - c.step * m[j] / denominator;
  }
  store_floats<kVec>(a.param_N + at, param);
  store_floats<kVec>(a.m_N + at, m);
  store_floats<kVec>(a.v_N + at, v);
  if (a.compute_N != nullptr) store_values<T, kVec>(a.compute_N + at, param);
}

// A thread takes kVec elements; with kVec > 1 the last block takes the rest one by one.
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const AdamwState<T> a, const AdamwCoefficients c) {
  const float scale = *a.scale_1;
  if (scale != scale) return;  // NaN: no update
  const int64_t at = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kVec;
  if (at + kVec <= a.N) return update<T, kVec>(a, c, scale, at);
  for (int64_t i = at; i < a.N; ++i) update<T, 1>(a, c, scale, i);
}

}  // namespace

void adamw(const AdamwArgs& args, Stream& stream) {
  const int64_t N = args.param_N[0];
  const DType storage = args.compute_N.empty() ? DType::f32 : args.compute_N.dtype;
  const auto is_aligned = [](const RawView& view) {
    return reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  };
  const bool vectors = is_aligned(args.param_N) && is_aligned(args.m_N) && is_aligned(args.v_N) &&
                       is_aligned(args.grad_N) && is_aligned(args.compute_N);
  with_storage(storage, vectors, [&]<class T, int kStorageVec>() {
    constexpr int kVec = kStorageVec > 1 ? 4 : 1;  // of the fp32 tensors
    const AdamwState<T> a{args.param_N.pointer(),
                          args.m_N.pointer(),
                          args.v_N.pointer(),
                          args.grad_N.pointer(),
                          args.scale_1.pointer(),
                          static_cast<T*>(args.compute_N.data),
                          N};
    launch("adamw", adamw_kernel<T, kVec>,
           {.blocks = blocks_for(N, int64_t{kThreads} * kVec), .threads = kThreads}, stream, a,
           coefficients(args));
  });
}

}  // namespace cambium::cuda
