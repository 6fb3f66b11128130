// Cross entropy on the GPU: a cluster of blocks a row, which it reads once. Vectors wait in a ring
// of shared memory from their copy until their gradient is stored; then the slot is given to a
// vector of the next row, so that copies run while the row's sum is formed.
//
// A thread's partial is a pair (power, sum of exponentials in units of two to that power); pairs
// meet in the warp by shuffles and over the cluster through its shared memories, in a fixed order:
// a row's bits depend on V and the storage alone (D2). Logits beyond the ring, and rows that are no
// vectors, are read a second time. Napkin: at V = 151,936 in bf16 a row is 297 KiB, half of it in
// each of two blocks of 1,024 threads with a ring of 208 KiB; two exponentials a logit, 4 bytes of
// traffic.
#include "kernels/cross_entropy.h"

#include <cooperative_groups.h>

#include "kernels/cuda_launch.cuh"

namespace cambium::cuda {

namespace {

namespace cg = cooperative_groups;

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kWarpLanes;
constexpr int kMaxCluster = 8;  // what every GPU of this generation grants
constexpr int kSlots = 13;      // vectors of a thread in the ring; of one row at most

template <class T>
struct CrossEntropy {
  Rows<const T> logits_TV;
  const int32_t* target_T;
  float* loss_T;
  Rows<T> d_logits_TV;  // may be absent
  int64_t rows;
  int V, cluster;
  int held;  // vectors of a row that a thread has in the ring; 0: rows are no vectors
};

// 2^x for x <= 0 within two ulp; 0 where it would be subnormal.
__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

constexpr float kLog2OfE = 1.44269504089f, kLn2 = 0.693147180560f;
constexpr float kLeastPower = -0x1p126f;  // of no logits

// The sum of exp(x) over some logits is sum * 2^power; power, an integer, is that of the largest
// rounded up, so that no term is above 1 and other powers are met without rounding.
struct ExpSum {
  float power, sum;

  __device__ __forceinline__ void raise_to(float other) {
    sum *= exp2_of(power - other);
    power = other;
  }
};

// The pair of a warp's lanes.
__device__ __forceinline__ ExpSum warp_merge(ExpSum own) {
  own.raise_to(warp_max(own.power));
  return {own.power, warp_sum(own.sum)};
}

// The row's pair from every thread's. Each warp of the cluster reads all warps' pairs.
__device__ __forceinline__ ExpSum cluster_merge(cg::cluster_group& cluster, const ExpSum& own,
                                                ExpSum* shared) {
  const ExpSum of_warp = warp_merge(own);
  if (threadIdx.x % kWarpLanes == 0) shared[threadIdx.x / kWarpLanes] = of_warp;
  cluster.sync();
  const int warps = static_cast<int>(blockDim.x) / kWarpLanes;
  const int count = static_cast<int>(cluster.num_blocks()) * warps;
  ExpSum all{kLeastPower, 0.0f};
  for (int at = threadIdx.x % kWarpLanes; at < count; at += kWarpLanes) {
    ExpSum other = cluster.map_shared_rank(shared, at / warps)[at % warps];
    const float power = fmaxf(all.power, other.power);
    all.raise_to(power), other.raise_to(power);
    all.sum += other.sum;
  }
  return warp_merge(all);
}

template <class T, int kVec>
__device__ __forceinline__ void add_logits(const Packed<T, kVec>& packed, ExpSum& all) {
  float x[kVec], sum = 0;
  unpack(packed, x);
  float most = x[0];
#pragma unroll
  for (int j = 1; j < kVec; ++j) most = fmaxf(most, x[j]);
  const float power = ceilf(most * kLog2OfE);
  if (power > all.power) all.raise_to(power);
#pragma unroll
  for (int j = 0; j < kVec; ++j) sum += exp2_of(fmaf(x[j], kLog2OfE, -all.power));
  all.sum += sum;
}

template <class T, int kVec>
__device__ __forceinline__ void store_gradient(const Packed<T, kVec>& packed, int column,
                                               float power, float scale, int target, T* d_logits) {
  float x[kVec];
  unpack(packed, x);
#pragma unroll
  for (int j = 0; j < kVec; ++j) x[j] = exp2_of(fmaf(x[j], kLog2OfE, -power)) * scale;
  if (target >= column && target < column + kVec) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) x[j] -= column + j == target ? 1.0f : 0.0f;
  }
  store_values<T, kVec>(d_logits + column, x);
}

// This thread's share of the cluster's rows.
struct Share {
  int begin, step;  // columns
  int64_t first_row, row_step;
};

// This thread's ring: it reads what it copied itself alone, so no barrier is needed. Copies run
// kSlots vectors ahead, row after row; each is a group of its own, empty past the last row.
template <class T, int kVec>
class Ring {
 public:
  __device__ __forceinline__ Ring(const CrossEntropy<T>& a, const Share& share, uint4* queue)
      : a_(a), share_(share), queue_(queue + threadIdx.x), row_(share.first_row) {
    if constexpr (kVec == 1) return;
    for (int slot = 0; slot < kSlots; ++slot) start_copy(slot);
  }
  __device__ __forceinline__ Packed<T, kVec> at(int slot) const {
    Packed<T, kVec> packed;
    *reinterpret_cast<uint4*>(&packed) = queue_[slot * static_cast<int>(blockDim.x)];
    return packed;
  }
  // The next vector into a slot that is free.
  __device__ __forceinline__ void start_copy(int slot) {
    const int column = share_.begin + item_ * share_.step;
    if (row_ < a_.rows && column < a_.V) {
      copy_async(queue_ + slot * static_cast<int>(blockDim.x), a_.logits_TV.row(row_) + column);
    }
    end_copy_group();
    if (++item_ == a_.held) item_ = 0, row_ += share_.row_step;
  }
  static __device__ __forceinline__ int after(int slot) {
    return slot + 1 == kSlots ? 0 : slot + 1;
  }

 private:
  const CrossEntropy<T>& a_;
  const Share& share_;
  uint4* queue_;
  int64_t row_;   // of the next copy
  int item_ = 0;  // its vector
};

// Calls body.operator()<i>() for slots in order until it says false.
template <int i, class Body>
__device__ __forceinline__ void each_slot(Body&& body) {
  if constexpr (i < kSlots) {
    if (body.template operator()<i>()) each_slot<i + 1>(body);
  }
}

// The pair of this thread's logits of row `t`. Without a gradient their slots are free at once.
template <class T, int kVec, bool kGradient>
__device__ __forceinline__ ExpSum sum_row(const CrossEntropy<T>& a, const Share& share, int64_t t,
                                          Ring<T, kVec>& ring, int slot) {
  ExpSum own{kLeastPower, 0.0f};
  if constexpr (kVec > 1) {
    each_slot<0>([&]<int i>() {
      if (i == a.held) return false;
      wait_copy_groups<kGradient ? kSlots - 1 - i : kSlots - 1>();
      if (share.begin + i * share.step < a.V) add_logits(ring.at(slot), own);
      if constexpr (!kGradient) ring.start_copy(slot);
      slot = ring.after(slot);
      return true;
    });
  }
  for (int column = share.begin + a.held * share.step; column < a.V; column += share.step) {
    add_logits(load_packed<T, kVec>(a.logits_TV.row(t) + column), own);
  }
  return own;
}

// Stores this thread's part of the row's gradient: zeros where the row is ignored.
template <class T, int kVec>
__device__ __forceinline__ void store_row(const CrossEntropy<T>& a, const Share& share, int64_t t,
                                          const ExpSum& row, int target, Ring<T, kVec>& ring,
                                          int slot) {
  T* d_logits = a.d_logits_TV.row(t);
  const float scale = 1.0f / row.sum, zeros[kVec] = {};
  const auto store = [&](const Packed<T, kVec>& packed, int column) {
    if (target == kIgnoredTarget) return store_values<T, kVec>(d_logits + column, zeros);
    store_gradient(packed, column, row.power, scale, target, d_logits);
  };
  if constexpr (kVec > 1) {
#pragma unroll 2
    for (int i = 0; i < a.held; ++i) {
      const int column = share.begin + i * share.step;
      if (column < a.V) store(ring.at(slot), column);
      ring.start_copy(slot);
      slot = ring.after(slot);
    }
  }
  for (int column = share.begin + a.held * share.step; column < a.V; column += share.step) {
    store(load_packed<T, kVec>(a.logits_TV.row(t) + column), column);
  }
}

template <class T, int kVec, bool kGradient>
__global__ void __launch_bounds__(kMaxThreads) cross_entropy_kernel(const CrossEntropy<T> a) {
  extern __shared__ uint4 queue[];
  __shared__ ExpSum shared[2][kMaxWarps];
  cg::cluster_group cluster = cg::this_cluster();
  const int rank = static_cast<int>(blockIdx.x) % a.cluster, threads = blockDim.x;
  const Share share{(rank * threads + static_cast<int>(threadIdx.x)) * kVec,
                    a.cluster * threads * kVec, blockIdx.x / a.cluster, gridDim.x / a.cluster};
  Ring<T, kVec> ring(a, share, queue);
  int buffer = 0;  // of the pairs; alternates, so that one barrier a row is enough
  int slot = 0;    // of the row's first vector
  for (int64_t t = share.first_row; t < a.rows; t += share.row_step) {
    const int target = a.target_T[t];
    const bool is_ignored = target == kIgnoredTarget;
    device_check(is_ignored || (target >= 0 && target < a.V));
    float at_target = 0;  // read before the barrier: the gradient may take the logits' place
    if (share.begin == 0 && !is_ignored) at_target = to_f32(a.logits_TV.row(t)[target]);
    ExpSum row = sum_row<T, kVec, kGradient>(a, share, t, ring, slot);
    if (!is_ignored) {
      row = cluster_merge(cluster, row, shared[buffer]);
      buffer ^= 1;
    }
    if (share.begin == 0) {
      a.loss_T[t] = is_ignored ? 0.0f : logf(row.sum) + fmaf(row.power, kLn2, -at_target);
    }
    if constexpr (kGradient) store_row<T, kVec>(a, share, t, row, target, ring, slot);
    slot += a.held;
    if (slot >= kSlots) slot -= kSlots;
  }
  cluster.sync();  // no block leaves while another may read its pairs
}

// Clusters that run at the same time; rows are dealt to them, and no bit depends on their number.
template <class Kernel>
int64_t resident_clusters(Kernel kernel, const LaunchShape& shape, Stream& stream) {
  constexpr int kMultiprocessors = 132;
  int count = 0;
  const LaunchConfig config("cross_entropy", kernel, shape, stream);
  if (shape.cluster > 1) {
    check_cuda(cudaOccupancyMaxActiveClusters(&count, kernel, config.get()), "cross_entropy");
    return std::max(count, 1);
  }
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, shape.threads,
                                                           static_cast<size_t>(shape.shared_bytes)),
             "cross_entropy");
  return kMultiprocessors * std::max(count, 1);
}

template <bool kGradient>
void launch_cross_entropy(const CrossEntropyArgs& args, Stream& stream) {
  const int64_t rows = args.logits_TV[0], V = args.logits_TV[1];
  const bool vectors = rows_are_vectors(args.logits_TV, args.d_logits_TV);
  with_storage(args.logits_TV.dtype, vectors, [&]<class T, int kVec>() {
    const int64_t V_vectors = blocks_for(V, kVec);
    int64_t cluster = 1;
    while (cluster < kMaxCluster && V_vectors > cluster * kMaxThreads * kSlots) cluster *= 2;
    // Four vectors a thread, so that a ring holds rows ahead, until a block is full.
    const int64_t warps = blocks_for(V_vectors, cluster * kWarpLanes * 4);
    const int64_t threads = kWarpLanes * std::min<int64_t>(warps, kMaxWarps);
    const int64_t held = std::min<int64_t>(kSlots, blocks_for(V_vectors, cluster * threads));
    const CrossEntropy<T> a{rows_of<const T>(args.logits_TV),
                            args.target_T.pointer(),
                            args.loss_T.pointer(),
                            rows_of<T>(args.d_logits_TV),
                            rows,
                            static_cast<int>(V),
                            static_cast<int>(cluster),
                            kVec > 1 ? static_cast<int>(held) : 0};
    LaunchShape shape{.blocks = rows * cluster,
                      .threads = static_cast<int>(threads),
                      .shared_bytes = kVec > 1 ? 16 * kSlots * threads : 0,
                      .cluster = static_cast<int>(cluster)};
    const auto kernel = cross_entropy_kernel<T, kVec, kGradient>;
    shape.blocks = std::min(rows, resident_clusters(kernel, shape, stream)) * cluster;
    launch("cross_entropy", kernel, shape, stream, a);
  });
}

}  // namespace

void cross_entropy(const CrossEntropyArgs& args, Stream& stream) {
  CHECK_LT(args.logits_TV[1], int64_t{INT_MAX} / 2);
  CHECK(args.d_logits_TV.empty() || args.d_logits_TV.dtype == args.logits_TV.dtype);
  if (args.logits_TV[0] == 0) return;
  if (args.d_logits_TV.empty()) return launch_cross_entropy<false>(args, stream);
  launch_cross_entropy<true>(args, stream);
}

}  // namespace cambium::cuda
