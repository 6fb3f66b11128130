// Cross entropy on the GPU: a cluster of blocks a row, which it reads once and holds in registers
// as stored while the row's maximum and sum of exponentials are formed.
//
// A thread's partial is a pair (maximum, sum relative to it); pairs meet in the warp by shuffles
// and over the cluster through its shared memories, in a fixed order: a row's bits depend on V and
// the storage alone (D2). Logits beyond what the cluster holds are read a second time.
// Napkin: at V = 151,936 in bf16 a row is 297 KiB, 8 blocks of 512 threads hold 40 logits a thread;
// two exponentials a logit, 4 bytes of traffic; two blocks a multiprocessor keep 80 KB in flight.
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
constexpr int kHeld = 5;        // vectors of a row that a thread holds
constexpr int kStages = 2;      // rows in shared memory: the one worked on and the next
constexpr int64_t kQueueBytes = int64_t{kStages} * kHeld * kThreads * 16;

template <class T>
struct CrossEntropy {
  Rows<const T> logits_TV;
  const int32_t* target_T;
  float* loss_T;
  Rows<T> d_logits_TV;  // may be absent
  int64_t rows;
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

// The pair of a warp's lanes: one exponential a lane.
__device__ __forceinline__ ExpSum warp_merge(const ExpSum& own) {
  const float most = warp_max(own.most);
  return {most, warp_sum(own.sum * exp_of(own.most - most))};
}

// The row's pair from every thread's. Each warp of the cluster reads all warps' pairs.
__device__ __forceinline__ ExpSum cluster_merge(cg::cluster_group& cluster, const ExpSum& own,
                                                ExpSum* shared) {
  const ExpSum of_warp = warp_merge(own);
  if (threadIdx.x % kWarpLanes == 0) shared[threadIdx.x / kWarpLanes] = of_warp;
  cluster.sync();
  constexpr int kPairs = kMaxCluster * kWarps / kWarpLanes;  // a lane's
  const int count = static_cast<int>(cluster.num_blocks()) * kWarps;
  ExpSum pair[kPairs];
  float most = -FLT_MAX, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int at = i * kWarpLanes + threadIdx.x % kWarpLanes;
    pair[i] = at < count ? cluster.map_shared_rank(shared, at / kWarps)[at % kWarps]
                         : ExpSum{-FLT_MAX, 0.0f};
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i) most = fmaxf(most, pair[i].most);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) sum += pair[i].sum * exp_of(pair[i].most - most);
  return warp_merge({most, sum});
}

// What a thread knows of its row while it reads: its pair, and the target's logit if it is here.
struct RowPart {
  ExpSum own{-FLT_MAX, 0.0f};
  float at_target = 0;
  bool has_target = false;
};

template <class T, int kVec>
__device__ __forceinline__ float largest_of(const Packed<T, kVec>& packed, float most) {
  float x[kVec];
  unpack(packed, x);
#pragma unroll
  for (int j = 0; j < kVec; ++j) most = fmaxf(most, x[j]);
  return most;
}

// Adds logits none of which is above part.own.most.
template <class T, int kVec>
__device__ __forceinline__ void add_logits(const Packed<T, kVec>& packed, int column, int target,
                                           RowPart& part) {
  float x[kVec], sum = 0;
  unpack(packed, x);
#pragma unroll
  for (int j = 0; j < kVec; ++j) sum += exp_of(x[j] - part.own.most);
  part.own.sum += sum;
  if (target < column || target >= column + kVec) return;
  part.has_target = true;
#pragma unroll
  for (int j = 0; j < kVec; ++j) part.at_target = column + j == target ? x[j] : part.at_target;
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

// This thread's share of the cluster's rows.
struct Share {
  int begin, step;  // columns
  int64_t first_row, row_step;
};

// Starts copying row `t` of this thread's vectors into `stage`: each thread reads its own alone, so
// no barrier is needed. One group a call, empty past the last row.
template <class T, int kVec>
__device__ __forceinline__ void start_copy(const CrossEntropy<T>& a, const Share& share, int64_t t,
                                           uint4* stage) {
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int column = share.begin + i * share.step;
    if (t >= a.rows || column >= a.V) continue;
    copy_async(stage + i * kThreads, a.logits_TV.row(t) + column);
  }
  end_copy_group();
}

// The held vectors of row `t`: from the queue, or where rows are no vectors from memory.
template <class T, int kVec>
__device__ __forceinline__ void load_held(const CrossEntropy<T>& a, const Share& share, int64_t t,
                                          const uint4* stage, Packed<T, kVec> (&held)[kHeld]) {
  if constexpr (kVec > 1) wait_copy_groups<kStages - 1>();
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int column = share.begin + i * share.step;
    if (column >= a.V) continue;
    if constexpr (kVec > 1) {
      *reinterpret_cast<uint4*>(&held[i]) = stage[i * kThreads];
    } else {
      held[i] = load_packed<T, kVec>(a.logits_TV.row(t) + column);
    }
  }
}

template <class T, int kVec>
__device__ __forceinline__ void do_row(const CrossEntropy<T>& a, const Share& share, int64_t t,
                                       int target, const Packed<T, kVec> (&held)[kHeld],
                                       cg::cluster_group& cluster, ExpSum* shared) {
  const T* logits = a.logits_TV.row(t);
  const int beyond = share.begin + kHeld * share.step;
  RowPart part;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (share.begin + i * share.step < a.V) part.own.most = largest_of(held[i], part.own.most);
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int column = share.begin + i * share.step;
    if (column < a.V) add_logits(held[i], column, target, part);
  }
  for (int column = beyond; column < a.V; column += share.step) {
    const Packed<T, kVec> packed = load_packed<T, kVec>(logits + column);
    const float most = largest_of(packed, part.own.most);
    part.own = {most, part.own.sum * exp_of(part.own.most - most)};
    add_logits(packed, column, target, part);
  }
  const ExpSum row = cluster_merge(cluster, part.own, shared);
  if (part.has_target) a.loss_T[t] = logf(row.sum) + (row.most - part.at_target);
  if (a.d_logits_TV.is_absent()) return;
  T* d_logits = a.d_logits_TV.row(t);
  const float scale = 1.0f / row.sum;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int column = share.begin + i * share.step;
    if (column < a.V) store_gradient(held[i], column, row.most, scale, target, d_logits);
  }
  for (int column = beyond; column < a.V; column += share.step) {
    store_gradient(load_packed<T, kVec>(logits + column), column, row.most, scale, target,
                   d_logits);
  }
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads, 2) cross_entropy_kernel(const CrossEntropy<T> a) {
  extern __shared__ uint4 queue[];
  __shared__ ExpSum shared[2][kWarps];
  cg::cluster_group cluster = cg::this_cluster();
  const int rank = static_cast<int>(blockIdx.x) % a.cluster;
  const Share share{(rank * kThreads + static_cast<int>(threadIdx.x)) * kVec,
                    a.cluster * kThreads * kVec, blockIdx.x / a.cluster, gridDim.x / a.cluster};
  const auto stage_of = [&](int stage) { return queue + stage * kHeld * kThreads + threadIdx.x; };
  int64_t t = share.first_row;
  if constexpr (kVec > 1) start_copy<T, kVec>(a, share, t, stage_of(0));
  int buffer = 0;  // of the pairs; alternates, so that one barrier a row is enough
  for (int stage = 0; t < a.rows; t += share.row_step, stage ^= 1) {
    if constexpr (kVec > 1) start_copy<T, kVec>(a, share, t + share.row_step, stage_of(stage ^ 1));
    const int target = a.target_T[t];
    Packed<T, kVec> held[kHeld];
    load_held<T, kVec>(a, share, t, stage_of(stage), held);
    if (target == kIgnoredTarget) {
      store_ignored<T, kVec>(a, t, share.begin, share.step);
      continue;
    }
    device_check(target >= 0 && target < a.V);
    do_row<T, kVec>(a, share, t, target, held, cluster, shared[buffer]);
    buffer ^= 1;
  }
  cluster.sync();  // no block leaves while another may read its pairs
}

// Clusters that run at the same time; rows are dealt to them, and no bit depends on their number.
template <class Kernel>
int64_t resident_clusters(Kernel kernel, const LaunchShape& shape, Stream& stream) {
  constexpr int64_t kLoneBlocks = 264;  // two for each of 132 multiprocessors
  if (shape.cluster == 1) return kLoneBlocks;
  int count = 0;
  const LaunchConfig config("cross_entropy", kernel, shape, stream);
  check_cuda(cudaOccupancyMaxActiveClusters(&count, kernel, config.get()), "cross_entropy");
  return std::max(count, 1);
}

}  // namespace

void cross_entropy(const CrossEntropyArgs& args, Stream& stream) {
  const int64_t rows = args.logits_TV[0], V = args.logits_TV[1];
  CHECK_LT(V, int64_t{INT_MAX} / 2);
  CHECK(args.d_logits_TV.empty() || args.d_logits_TV.dtype == args.logits_TV.dtype);
  const bool vectors = rows_are_vectors(args.logits_TV, args.d_logits_TV);
  with_storage(args.logits_TV.dtype, vectors, [&]<class T, int kVec>() {
    int cluster = 1;
    while (cluster < kMaxCluster && V > int64_t{cluster} * kThreads * kVec * kHeld) cluster *= 2;
    const CrossEntropy<T> a{rows_of<const T>(args.logits_TV),
                            args.target_T.pointer(),
                            args.loss_T.pointer(),
                            rows_of<T>(args.d_logits_TV),
                            rows,
                            static_cast<int>(V),
                            cluster};
    LaunchShape shape{.blocks = rows * cluster,
                      .threads = kThreads,
                      .shared_bytes = kVec > 1 ? kQueueBytes : 0,
                      .cluster = cluster};
    if (rows == 0) return;
    const auto kernel = cross_entropy_kernel<T, kVec>;
    shape.blocks = std::min(rows, resident_clusters(kernel, shape, stream)) * cluster;
    launch("cross_entropy", kernel, shape, stream, a);
  });
}

}  // namespace cambium::cuda
