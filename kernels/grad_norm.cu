// Gradient norm on the GPU, bit for bit as the reference sums.
//
// square_sum: a warp a block of 4,096 elements; lane l adds the squares of elements l, l + 32, ...
// , so loads are 128 bytes a warp, many in flight. clip_scale: a block a tensor sums its partials
// by the canonical tree in fp64; one more block sums the tensors.
#include "kernels/grad_norm.h"

#include <cmath>
#include <limits>

#include "kernels/canonical_tree.cuh"

namespace cambium::cuda {

namespace {

constexpr int kWarpsPerBlock = 8;
constexpr int kTreeThreads = 1024;
constexpr int kDepth = 20;  // a thread's run has at most 2^20 leaves
constexpr int kLanes = 8;   // of the reference: what is left of a block goes to the first eight

// The reference's order over its four vectors of eight lanes (reference/lane_math.h, `dot`).
__device__ __forceinline__ float sum_of_lanes(float value) {
  for (const int step : {8, 16, 4, 1, 2}) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

__global__ void __launch_bounds__(kWarpsPerBlock* kWarpLanes)
    square_sum_kernel(const float* grad_N, int64_t N, const int32_t* block_BC, int64_t B,
                      float* partial_M, int64_t M) {
  const int64_t b = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / kWarpLanes;
  if (b >= B) return;
  const int lane = threadIdx.x % kWarpLanes;
  const int count = block_BC[b * kBlockColumns + kBlockElements];
  const int canonical = block_BC[b * kBlockColumns + kBlockCanonical];
  if (count == 0) return;
  device_check(count <= kNormBlockElements && b * kNormBlockElements + count <= N);
  device_check(canonical >= 0 && canonical < M);
  const float* grad = grad_N + b * kNormBlockElements;
  float sum = 0;
  int i = 0;
#pragma unroll 16
  for (; i + kWarpLanes <= count; i += kWarpLanes) {
    const float g = grad[i + lane];
    sum = fmaf(g, g, sum);
  }
  for (; i + kLanes <= count; i += kLanes) {
    if (lane < kLanes) sum = fmaf(grad[i + lane], grad[i + lane], sum);
  }
  sum = sum_of_lanes(sum);
  for (; i < count; ++i) sum = fmaf(grad[i], grad[i], sum);
  if (lane == 0) partial_M[canonical] = sum;
}

// The canonical tree sum of `count` values, in every thread of a block of kTreeThreads.
template <class Number>
__device__ __forceinline__ double block_tree_sum(const Number* values, int count) {
  __shared__ double shared[kTreeThreads];
  const int64_t length = power_of_two_from((count + kTreeThreads - 1) / kTreeThreads);
  const int64_t begin = threadIdx.x * length, end = min(int64_t{count}, begin + length);
  TreeStack<double, 1, kDepth> stack;
  for (int64_t i = begin; i < end; ++i) {
    const double value[1] = {static_cast<double>(values[i])};
    stack.push(static_cast<int>(i - begin), value);
  }
  double sum[1] = {0};
  stack.finish(sum);
  double* at = shared + threadIdx.x;
  *at = sum[0];
  sum_runs(at, static_cast<int>(threadIdx.x), kTreeThreads,
           static_cast<int>((count + length - 1) / length), 1);
  return shared[0];
}

__global__ void __launch_bounds__(kTreeThreads)
    tensor_sum_kernel(const float* partial_B, const int32_t* first_block, double* tensor_sum) {
  const int begin = first_block[blockIdx.x], end = first_block[blockIdx.x + 1];
  device_check(begin <= end);
  const double sum = block_tree_sum(partial_B + begin, end - begin);
  if (threadIdx.x == 0) tensor_sum[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kTreeThreads)
    clip_scale_kernel(const double* tensor_sum, int tensors, double inverse_tokens, double clip,
                      float* result_4) {
  __shared__ int first_bad;
  if (threadIdx.x == 0) first_bad = INT_MAX;
  __syncthreads();
  for (int n = threadIdx.x; n < tensors; n += kTreeThreads) {
    if (!isfinite(tensor_sum[n])) atomicMin(&first_bad, n);
  }
  const double sum = block_tree_sum(tensor_sum, tensors);
  if (threadIdx.x != 0) return;
  const bool is_bad = first_bad != INT_MAX;
  const double norm = sqrt(sum) * inverse_tokens;
  const double share = clip / (norm + 1e-6);
  const double factor = clip > 0 && share < 1.0 ? share : 1.0;
  result_4[kClipNorm] = static_cast<float>(norm);
  result_4[kClipScale] = is_bad ? NAN : static_cast<float>(inverse_tokens * factor);
  result_4[kClipNonFinite] = is_bad ? 1.0f : 0.0f;
  result_4[kClipFirstTensor] = is_bad ? static_cast<float>(first_bad) : -1.0f;
}

}  // namespace

void square_sum(const SquareSumArgs& args, Stream& stream) {
  const int64_t B = args.table.block_BC[0];
  launch("square_sum", square_sum_kernel,
         {.blocks = blocks_for(B, kWarpsPerBlock), .threads = kWarpsPerBlock * kWarpLanes}, stream,
         args.grad_N.pointer(), args.grad_N[0], args.table.block_BC.pointer(), B,
         args.partial_M.pointer(), args.partial_M[0]);
}

void clip_scale(const ClipScaleArgs& args, Stream& stream) {
  const int64_t tensors = args.tensor_first_block_n1[0] - 1;
  CHECK_LT(args.partial_B[0], int64_t{kTreeThreads} << kDepth);
  const StreamScratch tensor_sum(8 * tensors, stream);
  launch("clip_scale", tensor_sum_kernel, {.blocks = tensors, .threads = kTreeThreads}, stream,
         args.partial_B.pointer(), args.tensor_first_block_n1.pointer(), tensor_sum.as<double>());
  launch("clip_scale", clip_scale_kernel, {.blocks = 1, .threads = kTreeThreads}, stream,
         tensor_sum.as<double>(), static_cast<int>(tensors), args.inverse_tokens, args.clip,
         args.result_4.pointer());
}

}  // namespace cambium::cuda
