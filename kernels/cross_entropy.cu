// Cross entropy on the GPU: a cluster of blocks a row, which it reads once and holds in registers
// as stored while the row's maximum and sum of exponentials are formed.
//
// A thread's partial is a pair (maximum, sum relative to it); pairs merge over the warp by shuffles
// and over the cluster through its shared memories, in a fixed order: a row's bits depend on V and
// the storage alone (D2). Logits beyond what the cluster holds are read a second time.
// Napkin: at V = 151,936 in bf16 a row is 297 KiB, 8 blocks of 512 threads hold 40 logits a thread;
// two exponentials a logit, 4 bytes of traffic.
#include "kernels/cross_entropy.h"

#include <cooperative_groups.h>

#include <cfloat>

#include "kernels/cuda_launch.cuh"

namespace cambium::cuda {

namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpLanes;
constexpr int kMaxCluster = 8;  // what every GPU of this generation grants

template <class T>
struct CrossEntropy {
  Rows<const T> logits_TV;
  const int32_t* target_T;
  float* loss_T;
  Rows<T> d_logits_TV;  // may be absent
  int V, cluster;
};

// exp(x) for x <= 0 within two ulp of the argument's rounding; 0 where it would be subnormal.
__device__ __forceinline__ float exp_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504089f));
  return y;
}

// sum = the sum of exp(x - most) over some logits.
struct ExpSum {
  float most, sum;
};

__device__ __forceinline__ ExpSum merge(const ExpSum& a, const ExpSum& b) {
  const float most = fmaxf(a.most, b.most);
  return {most, a.sum * exp_of(a.most - most) + b.sum * exp_of(b.most - most)};
}

__device__ __forceinline__ ExpSum warp_merge(ExpSum own) {
  for (int step = kWarpLanes / 2; step > 0; step /= 2) {
    own = merge(own, {__shfl_xor_sync(kAllLanes, own.most, step),
                      __shfl_xor_sync(kAllLanes, own.sum, step)});
  }
  return own;
}

// The row's pair from every thread's. Each warp of the cluster reads all warps' pairs.
__device__ __forceinline__ ExpSum cluster_merge(cg::cluster_group& cluster, ExpSum own,
                                                ExpSum* shared) {
  own = warp_merge(own);
  if (threadIdx.x % kWarpLanes == 0) shared[threadIdx.x / kWarpLanes] = own;
  cluster.sync();
  ExpSum all{-FLT_MAX, 0.0f};
  const int pairs = static_cast<int>(cluster.num_blocks()) * kWarps;
  for (int i = threadIdx.x % kWarpLanes; i < pairs; i += kWarpLanes) {
    all = merge(all, cluster.map_shared_rank(shared, i / kWarps)[i % kWarps]);
  }
  return warp_merge(all);
}

template <class T, int kVec>
__device__ __forceinline__ void add_logits(const Packed<T, kVec>& packed, ExpSum& own) {
  float x[kVec];
  unpack(packed, x);
  float most = own.most;
#pragma unroll
  for (int j = 0; j < kVec; ++j) most = fmaxf(most, x[j]);
  float sum = own.sum * exp_of(own.most - most);
#pragma unroll
  for (int j = 0; j < kVec; ++j) sum += exp_of(x[j] - most);
  own = {most, sum};
}

template <class T, int kVec>
__device__ __forceinline__ void store_gradient(const Packed<T, kVec>& packed, int column,
                                               float most, float scale, int target, T* d_logits) {
  float x[kVec];
  unpack(packed, x);
#pragma unroll
  for (int j = 0; j < kVec; ++j) x[j] = exp_of(x[j] - most) * scale;
  if (target >= column && target < column + kVec) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) x[j] -= column + j == target ? 1.0f : 0.0f;
  }
  store_values<T, kVec>(d_logits + column, x);
}

template <class T, int kVec>
__device__ __forceinline__ void store_ignored(const CrossEntropy<T>& a, int64_t t, int begin,
                                              int step) {
  if (begin == 0) a.loss_T[t] = 0.0f;
  if (a.d_logits_TV.is_absent()) return;
  const float zeros[kVec] = {};
  for (int column = begin; column < a.V; column += step) {
    store_values<T, kVec>(a.d_logits_TV.row(t) + column, zeros);
  }
}

template <class T, int kVec, int kHeld>
__global__ void __launch_bounds__(kThreads, 2) cross_entropy_kernel(const CrossEntropy<T> a) {
  __shared__ ExpSum shared[kWarps];
  cg::cluster_group cluster = cg::this_cluster();
  const int64_t t = blockIdx.x / a.cluster;
  const int begin = (static_cast<int>(blockIdx.x % a.cluster) * kThreads + threadIdx.x) * kVec;
  const int step = a.cluster * kThreads * kVec;
  const int target = a.target_T[t];
  if (target == kIgnoredTarget) return store_ignored<T, kVec>(a, t, begin, step);
  device_check(target >= 0 && target < a.V);
  const T* logits = a.logits_TV.row(t);
  const float at_target = to_f32(logits[target]);
  Packed<T, kVec> held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (begin + i * step < a.V) held[i] = load_packed<T, kVec>(logits + begin + i * step);
  }
  ExpSum own{-FLT_MAX, 0.0f};
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (begin + i * step < a.V) add_logits(held[i], own);
  }
  for (int column = begin + kHeld * step; column < a.V; column += step) {
    add_logits(load_packed<T, kVec>(logits + column), own);
  }
  const ExpSum row = cluster_merge(cluster, own, shared);
  auto arrival = cluster.barrier_arrive();  // the others may read this block's pairs until here
  if (begin == 0) a.loss_T[t] = logf(row.sum) + (row.most - at_target);
  if (!a.d_logits_TV.is_absent()) {
    T* d_logits = a.d_logits_TV.row(t);
    const float scale = 1.0f / row.sum;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int column = begin + i * step;
      if (column < a.V) store_gradient(held[i], column, row.most, scale, target, d_logits);
    }
    for (int column = begin + kHeld * step; column < a.V; column += step) {
      store_gradient(load_packed<T, kVec>(logits + column), column, row.most, scale, target,
                     d_logits);
    }
  }
  cluster.barrier_wait(std::move(arrival));
}

}  // namespace

void cross_entropy(const CrossEntropyArgs& args, Stream& stream) {
  const int64_t rows = args.logits_TV[0], V = args.logits_TV[1];
  CHECK_LT(V, int64_t{INT_MAX} / 2);
  CHECK(args.d_logits_TV.empty() || args.d_logits_TV.dtype == args.logits_TV.dtype);
  const bool vectors = rows_are_vectors(args.logits_TV, args.d_logits_TV);
  with_storage(args.logits_TV.dtype, vectors, [&]<class T, int kVec>() {
    constexpr int kHeld = kVec == 8 ? 5 : 10;
    int cluster = 1;
    while (cluster < kMaxCluster && V > int64_t{cluster} * kThreads * kVec * kHeld) cluster *= 2;
    const CrossEntropy<T> a{
        rows_of<const T>(args.logits_TV), args.target_T.pointer(), args.loss_T.pointer(),
        rows_of<T>(args.d_logits_TV),     static_cast<int>(V),     cluster};
    launch("cross_entropy", cross_entropy_kernel<T, kVec, kHeld>,
           {.blocks = rows * cluster, .threads = kThreads, .cluster = cluster}, stream, a);
  });
}

}  // namespace cambium::cuda
