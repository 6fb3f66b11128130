// What every .cu shares: the native stream, error checks, and reductions of one warp.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda_stream.h"

namespace cambium::cuda {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  const auto code =
      status == cudaErrorMemoryAllocation ? ExitCode::out_of_memory : ExitCode::internal;
  fail(code, "{}: CUDA error {}: {}", what, cudaGetErrorName(status), cudaGetErrorString(status));
}

inline cudaStream_t native_stream(const Stream& stream) {
  CHECK(stream.native() != nullptr);
  return static_cast<cudaStream_t>(stream.native());
}

constexpr int kWarpLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The butterflies leave the same bits in every lane: a + b = b + a at each step.
__device__ __forceinline__ float warp_sum(float value) {
  for (int step = kWarpLanes / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
  for (int step = kWarpLanes / 2; step > 0; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  return value;
}

}  // namespace cambium::cuda
