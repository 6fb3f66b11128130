// AdamW on the GPU: one pass over parameters, moments and gradients, four elements an access, the
// bf16 copy written on the way. Elements are the reference's bits: nothing is contracted, divisions
// and roots are IEEE's.
#include "kernels/adamw.h"

#include <cmath>

#include "kernels/cuda_launch.cuh"

namespace cambium::cuda {

namespace {

constexpr int kThreads = 256;

// Coefficients rounded once from fp64; the scale is read on the device.
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

template <class T, class Moment>
struct AdamwState {
  float* param_N;
  Moment *m_N, *v_N;
  const float *grad_N, *scale_1;
  const int32_t* block_BC;
  T* compute_N;  // may be null
  int64_t N;
  uint32_t step;
};

// The reference's dither: see kernels/adamw.h.
__device__ __forceinline__ uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

template <int kVec>
__device__ __forceinline__ void store_moments(float* to, const float (&values)[kVec],
                                              const uint32_t (&)[kVec], int) {
  store_floats<kVec>(to, values);
}
template <int kVec>
__device__ __forceinline__ void store_moments(__nv_bfloat16* to, const float (&values)[kVec],
                                              const uint32_t (&dither)[kVec], int shift) {
  Packed<__nv_bfloat16, kVec> packed;
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    const uint32_t sum = __float_as_uint(values[j]) + ((dither[j] >> shift) & 0xffffu);
    packed.element[j] = __ushort_as_bfloat16(static_cast<unsigned short>(sum >> 16));
  }
  store_packed(to, packed);
}

// What the elements of one block share.
struct BlockUpdate {
  float scale, decay;
  uint32_t key;
};

// Elements [at, at + kVec) of the buffer, from `element` on in their block.
template <class T, class Moment, int kVec>
__device__ __forceinline__ void update(const AdamwState<T, Moment>& a, const AdamwCoefficients& c,
                                       const BlockUpdate& block, int element, int64_t at) {
  float param[kVec], m[kVec], v[kVec], grad[kVec];
  uint32_t dither[kVec];
  load_floats<kVec>(a.grad_N + at, grad);
  load_floats<kVec>(a.param_N + at, param);
  load_values<Moment, kVec>(a.m_N + at, m);
  load_values<Moment, kVec>(a.v_N + at, v);
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    const float g = grad[j] * block.scale;
    m[j] = m[j] + c.one_minus_beta1 * (g - m[j]);
    v[j] = v[j] * c.beta2 + c.one_minus_beta2 * g * g;
    const float denominator = sqrtf(v[j]) / c.root_correction2 + c.epsilon;
    param[j] = param[j] * block.decay - c.step * m[j] / denominator;
    dither[j] = mix(block.key ^ static_cast<uint32_t>(element + j) * 0x9e3779b9u);
  }
  store_floats<kVec>(a.param_N + at, param);
  store_moments<kVec>(a.m_N + at, m, dither, 0);
  store_moments<kVec>(a.v_N + at, v, dither, 16);
  if (a.compute_N != nullptr) store_values<T, kVec>(a.compute_N + at, param);
}

// A block of threads takes a part of a block of the table, a thread kVec elements of it; with
// kVec > 1 one thread takes the last elements one by one.
template <class T, class Moment, int kVec>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const AdamwState<T, Moment> a, const AdamwCoefficients c) {
  constexpr int kParts = static_cast<int>(kTableBlockElements) / (kThreads * kVec);
  const int64_t b = blockIdx.x / kParts;
  const int32_t* row = a.block_BC + b * kBlockColumns;
  const float scale = *a.scale_1;
  const int count = row[kBlockElements];
  const BlockUpdate block{scale, row[kBlockDecays] != 0 ? c.decay : 1.0f,
                          mix(mix(a.step) + static_cast<uint32_t>(row[kBlockCanonical]))};
  if (scale != scale) return;  // NaN: no update
  const int64_t first = b * kTableBlockElements;
  device_check(count <= kTableBlockElements && first + count <= a.N);
  const int element = static_cast<int>(blockIdx.x % kParts * kThreads + threadIdx.x) * kVec;
  if (element + kVec <= count) {
    return update<T, Moment, kVec>(a, c, block, element, first + element);
  }
  for (int i = element; i < count; ++i) update<T, Moment, 1>(a, c, block, i, first + i);
}

template <class Moment>
void launch_adamw(const AdamwArgs& args, Stream& stream) {
  const DType storage = args.compute_N.empty() ? DType::f32 : args.compute_N.dtype;
  const auto is_aligned = [](const RawView& view) {
    return reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  };
  const bool vectors = is_aligned(args.param_N) && is_aligned(args.m_N) && is_aligned(args.v_N) &&
                       is_aligned(args.grad_N) && is_aligned(args.compute_N);
  with_storage(storage, vectors, [&]<class T, int kStorageVec>() {
    constexpr int kVec = kStorageVec > 1 ? 4 : 1;
    const AdamwState<T, Moment> a{args.param_N.pointer(),
                                  static_cast<Moment*>(args.m_N.data),
                                  static_cast<Moment*>(args.v_N.data),
                                  args.grad_N.pointer(),
                                  args.scale_1.pointer(),
                                  args.table.block_BC.pointer(),
                                  static_cast<T*>(args.compute_N.data),
                                  args.param_N[0],
                                  static_cast<uint32_t>(args.step)};
    launch("adamw", adamw_kernel<T, Moment, kVec>,
           {.blocks = args.table.block_BC[0] * (kTableBlockElements / (kThreads * kVec)),
            .threads = kThreads},
           stream, a, coefficients(args));
  });
}

}  // namespace

void adamw(const AdamwArgs& args, Stream& stream) {
  if (args.m_N.dtype == DType::bf16) return launch_adamw<__nv_bfloat16>(args, stream);
  launch_adamw<float>(args, stream);
}

}  // namespace cambium::cuda
