// Expert load on the GPU: histograms in shared memory, added to the counts by integer atomics,
// whose order does not show.
#include "kernels/expert_load.h"

#include "kernels/cuda_launch.cuh"

namespace cambium::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kChoicesPerBlock = 4096;

__global__ void __launch_bounds__(kThreads)
    expert_histogram_kernel(Rows<const int32_t> expert_index_TK, int K, int64_t choices,
                            int32_t* count_E, int E) {
  extern __shared__ int32_t own_E[];
  for (int e = threadIdx.x; e < E; e += kThreads) own_E[e] = 0;
  __syncthreads();
  const int64_t begin = int64_t{blockIdx.x} * kChoicesPerBlock;
  const int64_t end = min(choices, begin + kChoicesPerBlock);
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const int32_t e = expert_index_TK.row(i / K)[i % K];
    device_check(e >= -1 && e < E);
    if (e >= 0) atomicAdd(own_E + e, 1);  // tidy: allow float-atomics: integers
  }
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += kThreads) {
    if (own_E[e] > 0) atomicAdd(count_E + e, own_E[e]);  // tidy: allow float-atomics: integers
  }
}

// One block; the sign of (total - E count) is exact in integers.
__global__ void __launch_bounds__(kThreads)
    router_bias_update_kernel(const int32_t* count_E, float* bias_E, int E, float rate) {
  int64_t total = 0;
  for (int e = 0; e < E; ++e) total += count_E[e];
  for (int e = threadIdx.x; e < E; e += kThreads) {
    const int64_t missing = total - int64_t{E} * count_E[e];
    if (missing > 0) bias_E[e] += rate;
    if (missing < 0) bias_E[e] -= rate;
  }
}

}  // namespace

void expert_histogram(const ExpertHistogramArgs& args, Stream& stream) {
  const int64_t choices = args.expert_index_TK.elements();
  const int E = static_cast<int>(args.count_E[0]);
  launch("expert_histogram", expert_histogram_kernel,
         {.blocks = blocks_for(choices, kChoicesPerBlock),
          .threads = kThreads,
          .shared_bytes = int64_t{4} * E},
         stream, rows_of<const int32_t>(args.expert_index_TK),
         static_cast<int>(args.expert_index_TK[1]), choices, args.count_E.pointer(), E);
}

void router_bias_update(const RouterBiasUpdateArgs& args, Stream& stream) {
  launch("router_bias_update", router_bias_update_kernel, {.blocks = 1, .threads = kThreads},
         stream, args.count_E.pointer(), args.bias_E.pointer(), static_cast<int>(args.bias_E[0]),
         args.rate);
}

}  // namespace cambium::cuda
