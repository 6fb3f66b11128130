// Copies, fills, casts and scaling (kernels/copy.h). Casts move 8 elements a thread: 32 bytes in,
// 16 out, coalesced across the warp; what does not fill a vector goes element by element.
#include <cuda_bf16.h>

#include <algorithm>

#include "kernels/copy.h"
#include "kernels/cuda_launch.cuh"

namespace cambium::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;
constexpr int64_t kMostBlocks = 132 * 16;

template <class T>
struct alignas(sizeof(T) * kVector > 16 ? 16 : sizeof(T) * kVector) Vector {
  T element[kVector];
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
template <class To>
__device__ __forceinline__ To from_float(float value) {
  if constexpr (std::is_same_v<To, float>) {
    return value;
  } else {
    return __float2bfloat16_rn(value);
  }
}

// `vectors` leading vectors, then single elements up to `count`.
template <class From, class To>
__global__ void __launch_bounds__(kThreads)
    cast_kernel(const From* from, To* to, int64_t vectors, int64_t count) {
  const int64_t thread = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = thread; i < vectors; i += step) {
    const Vector<From> in = reinterpret_cast<const Vector<From>*>(from)[i];
    Vector<To> out;
#pragma unroll
    for (int j = 0; j < kVector; ++j) out.element[j] = from_float<To>(to_float(in.element[j]));
    reinterpret_cast<Vector<To>*>(to)[i] = out;
  }
  for (int64_t i = vectors * kVector + thread; i < count; i += step) {
    to[i] = from_float<To>(to_float(from[i]));
  }
}

__global__ void __launch_bounds__(kThreads)
    scale_kernel(float* value, float factor, int64_t count) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < count;
       i += step) {
    value[i] *= factor;
  }
}

__global__ void __launch_bounds__(kThreads)
    add_kernel(float* sum, const float* addend, int64_t count) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < count;
       i += step) {
    sum[i] = __fadd_rn(sum[i], addend[i]);
  }
}

unsigned grid_for(int64_t items) {
  return static_cast<unsigned>(
      std::clamp<int64_t>((items + kThreads - 1) / kThreads, 1, kMostBlocks));
}

bool is_vector_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

template <class From, class To>
void launch_cast(const CastRealArgs& a, Stream& stream) {
  const int64_t count = a.from_N[0];
  const bool aligned = is_vector_aligned(a.from_N.data) && is_vector_aligned(a.to_N.data);
  const int64_t vectors = aligned ? count / kVector : 0;
  cast_kernel<<<grid_for(aligned ? vectors : count), kThreads, 0, native_stream(stream)>>>(
      static_cast<const From*>(a.from_N.data), static_cast<To*>(a.to_N.data), vectors, count);
  check_cuda(cudaGetLastError(), "cast_real");
}

}  // namespace

void copy_op(const CopyBytesArgs& a, Stream& stream) {
  copy_async({.from = a.from_N.data, .to = a.to_N.data, .bytes = a.from_N[0]}, stream);
}

void zero_bytes(const ZeroBytesArgs& a, Stream& stream) {
  fill_async(a.to_N.data, 0, a.to_N[0], stream);
}

void scale_values(const ScaleValuesArgs& a, Stream& stream) {
  const int64_t count = a.value_N[0];
  if (count == 0) return;
  scale_kernel<<<grid_for(count), kThreads, 0, native_stream(stream)>>>(a.value_N.pointer(),
                                                                        a.factor, count);
  check_cuda(cudaGetLastError(), "scale_values");
}

void add_values(const AddValuesArgs& a, Stream& stream) {
  const int64_t count = a.sum_N[0];
  if (count == 0) return;
  add_kernel<<<grid_for(count), kThreads, 0, native_stream(stream)>>>(a.sum_N.pointer(),
                                                                      a.addend_N.pointer(), count);
  check_cuda(cudaGetLastError(), "add_values");
}

void cast_real(const CastRealArgs& a, Stream& stream) {
  if (a.from_N[0] == 0) return;
  const bool to_float = a.to_N.dtype == DType::f32;
  if (a.from_N.dtype == DType::f32) {
    (to_float ? launch_cast<float, float> : launch_cast<float, __nv_bfloat16>)(a, stream);
  } else {
    (to_float ? launch_cast<__nv_bfloat16, float>
              : launch_cast<__nv_bfloat16, __nv_bfloat16>)(a, stream);
  }
}

}  // namespace cambium::cuda
