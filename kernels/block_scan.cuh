// Sums and prefix sums of integers over the threads of a block: ranks that give stable positions.
#pragma once

#include "kernels/cuda_launch.cuh"

namespace cambium::cuda {

constexpr int kScanThreads = 1024;
static_assert(kScanThreads == kWarpLanes * kWarpLanes, "one warp scans the warps' sums");

// The sum of `value` over the threads before this one, and over all of them in `total`. The whole
// block of kScanThreads calls it.
__device__ __forceinline__ int block_prefix(int value, int& total) {
  __shared__ int warp_sums[kWarpLanes];
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  int sum = value;
#pragma unroll
  for (int step = 1; step < kWarpLanes; step *= 2) {
    const int left = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += left;
  }
  __syncthreads();  // the sums of the last call were read
  if (lane == kWarpLanes - 1) warp_sums[warp] = sum;
  __syncthreads();
  // Every warp scans the warps' sums for itself, which saves a barrier.
  int warps = warp_sums[lane];
#pragma unroll
  for (int step = 1; step < kWarpLanes; step *= 2) {
    const int left = __shfl_up_sync(kAllLanes, warps, step);
    if (lane >= step) warps += left;
  }
  total = __shfl_sync(kAllLanes, warps, kWarpLanes - 1);
  const int before = __shfl_sync(kAllLanes, warps, warp > 0 ? warp - 1 : 0);
  return (warp > 0 ? before : 0) + sum - value;
}

__device__ __forceinline__ int block_total(int value) {
  int total;
  block_prefix(value, total);
  return total;
}

}  // namespace cambium::cuda
