// The canonical binary tree of kernels/grad_target.h on the GPU, bit for bit as the reference sums.
//
// A range of `count` leaves that splits at the largest power of two below the count is a perfect
// binary tree over the next power of two whose absent trailing leaves are skipped. So leaves may be
// fed to a small stack in ascending order, or cut into aligned runs of equal power-of-two length
// whose sums are leaves of a smaller perfect tree.
#pragma once

#include "kernels/cuda_launch.cuh"
#include "kernels/grad_target.h"

namespace cambium::cuda {

// Height of the lowest node over both leaves a != b of a perfect tree.
__device__ __forceinline__ int meeting_height(int a, int b) { return 32 - __clz(a ^ b); }

// Sums kWidth values a leaf over present leaves that are pushed in ascending order, absent ones
// skipped. Entries wait in local memory; kDepth levels serve 2^kDepth leaves.
template <class Number, int kWidth, int kDepth>
class TreeStack {
 public:
  // `leaf` counts from the node's first leaf.
  __device__ __forceinline__ void push(int leaf, const Number (&value)[kWidth]) {
    if (depth_ > 0) merge_below(meeting_height(last_leaf_, leaf));
    if (depth_ > 0) height_[depth_] = meeting_height(last_leaf_, leaf);
    for (int i = 0; i < kWidth; ++i) value_[depth_][i] = value[i];
    ++depth_;
    last_leaf_ = leaf;
  }
  // The node's sum; false where nothing was pushed. The stack is empty afterwards.
  __device__ __forceinline__ bool finish(Number (&sum)[kWidth]) {
    if (depth_ == 0) return false;
    merge_below(INT_MAX);
    for (int i = 0; i < kWidth; ++i) sum[i] = value_[0][i];
    depth_ = 0;
    return true;
  }

 private:
  // Merges the top two entries while their lowest common node ends below `height`.
  __device__ __forceinline__ void merge_below(int height) {
    while (depth_ > 1 && height_[depth_ - 1] < height) {
      --depth_;
      for (int i = 0; i < kWidth; ++i) {
        value_[depth_ - 1][i] = value_[depth_ - 1][i] + value_[depth_][i];
      }
    }
  }
  Number value_[kDepth + 1][kWidth];
  int height_[kDepth + 1];  // where an entry meets the one below it
  int depth_ = 0;
  int last_leaf_ = 0;
};

// Sums the perfect tree over `runs` (a power of two) values in shared memory, `stride` apart, of
// which the first `present` are there; every thread of the block calls it, `run` is its value's
// number and `at` points to it. The sum is left in run 0's place.
template <class Number>
__device__ __forceinline__ void sum_runs(Number* at, int run, int runs, int present, int stride) {
  for (int step = 1; step < runs; step *= 2) {
    __syncthreads();
    if (run % (2 * step) == 0 && run + step < present) *at = *at + at[step * stride];
  }
  __syncthreads();
}

// The smallest power of two that is at least `count`.
__host__ __device__ constexpr int64_t power_of_two_from(int64_t count) {
  int64_t power = 1;
  while (power < count) power *= 2;
  return power;
}

}  // namespace cambium::cuda
