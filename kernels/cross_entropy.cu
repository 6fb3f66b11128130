// Cross entropy on the GPU: a cluster of blocks a row, which it reads once. Vectors wait in a ring
// of shared memory from their copy until their gradient is stored; then the slot is given to a
// vector of the next row, so that copies run while the row's sum is formed.
//
// A thread's partial is a pair (maximum, sum relative to it); pairs meet in the warp by shuffles
// and over the cluster through its shared memories, in a fixed order: a row's bits depend on V and
// the storage alone (D2). Logits beyond the ring, and rows that are no vectors, are read a second
// time. Napkin: at V = 151,936 in bf16 a row is 297 KiB, a quarter of it in each of four blocks of
// 512 threads; two exponentials a logit, 4 bytes of traffic. Two blocks a multiprocessor: one sums
// or waits for its cluster while the other one stores.
#include "kernels/cross_entropy.h"

#include <cooperative_groups.h>

#include <cfloat>

#include "kernels/cuda_hopper.cuh"

namespace cambium::cuda {

namespace {

namespace cg = cooperative_groups;

constexpr int kMaxThreads = 512;  // two such blocks a multiprocessor
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

// 2^x within two ulp; 0 where it would be subnormal.
__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// exp(x - most) in one fused multiply-add and one exponential: relative to what `most` in powers of
// two is rounded to, which quotients do not see and a logarithm adds again (`shift`).
constexpr float kLog2OfE = 1.44269504089f, kLn2 = 0.693147180560f;
struct Relative {
  float base;
  __device__ __forceinline__ explicit Relative(float most) : base(most * kLog2OfE) {}
  __device__ __forceinline__ float exp_of(float x) const {
    return exp2_of(fmaf(x, kLog2OfE, -base));
  }
  __device__ __forceinline__ float shift(float most) const {
    return kLn2 * fmaf(most, kLog2OfE, -base);
  }
};

// sum = the sum of exp(x - most) over some logits.
struct ExpSum {
  float most, sum;

  __device__ __forceinline__ void raise_to(float other) {
    sum *= exp2_of(Relative(most).base - Relative(other).base);
    most = other;
  }
};

// The pair of a warp's lanes.
__device__ __forceinline__ ExpSum warp_merge(ExpSum own) {
  own.raise_to(warp_max(own.most));
  return {own.most, warp_sum(own.sum)};
}

// The row's pair from every thread's. Each warp of the cluster reads all warps' pairs.
__device__ __forceinline__ ExpSum cluster_merge(cg::cluster_group& cluster, const ExpSum& own,
                                                ExpSum* shared) {
  const ExpSum of_warp = warp_merge(own);
  if (threadIdx.x % kWarpLanes == 0) shared[threadIdx.x / kWarpLanes] = of_warp;
  cluster.sync();
  const int warps = static_cast<int>(blockDim.x) / kWarpLanes;
  const int places = static_cast<int>(cluster.num_blocks()) * kMaxWarps;
  ExpSum all{-FLT_MAX, 0.0f};
  for (int at = threadIdx.x % kWarpLanes; at < places; at += kWarpLanes) {
    if (at % kMaxWarps >= warps) continue;
    ExpSum other = cluster.map_shared_rank(shared, at / kMaxWarps)[at % kMaxWarps];
    const float most = fmaxf(all.most, other.most);
    all.raise_to(most), other.raise_to(most);
    all.sum += other.sum;
  }
  return warp_merge(all);
}

template <class T, int kVec>
__device__ __forceinline__ void add_logits(const Packed<T, kVec>& packed, ExpSum& all) {
  float x[kVec], sum = 0;
  unpack(packed, x);
  float most = all.most;
#pragma unroll
  for (int j = 0; j < kVec; ++j) most = fmaxf(most, x[j]);
  if (most > all.most) all.raise_to(most);
  const Relative relative(all.most);
#pragma unroll
  for (int j = 0; j < kVec; ++j) sum += relative.exp_of(x[j]);
  all.sum += sum;
}

// The loss of a row: from the target's probability where that is the larger part, so that a lone
// logit has none.
__device__ __forceinline__ float loss_of(const ExpSum& row, float at_target) {
  const Relative relative(row.most);
  const float probability = relative.exp_of(at_target) * (1.0f / row.sum);
  if (probability > 0.5f) return -logf(probability);
  return logf(row.sum) - relative.shift(row.most) + (row.most - at_target);
}

// `target` counts from the vector's first logit.
template <class T, int kVec>
__device__ __forceinline__ void store_gradient(const Packed<T, kVec>& packed, int target,
                                               const Relative& relative, float scale, T* to) {
  float x[kVec];
  unpack(packed, x);
#pragma unroll
  for (int j = 0; j < kVec; ++j) x[j] = relative.exp_of(x[j]) * scale;
  if (target >= 0 && target < kVec) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) x[j] -= j == target ? 1.0f : 0.0f;
  }
  store_values<T, kVec>(to, x);
}

// This thread's share of the cluster's rows: columns begin, begin + step, ...
struct Share {
  int begin, step;
  int64_t first_row, row_step;
};

// This thread's ring: it reads what it copied itself alone, so no barrier is needed. Copies run
// kSlots vectors ahead, row after row; each is a group of its own, empty past the last row and for
// the vector that a row's end leaves out. Pointers walk: products of strides were a seventh of
// the kernel's instructions.
template <class T, int kVec>
class Ring {
 public:
  __device__ __forceinline__ Ring(const CrossEntropy<T>& a, const Share& share, uint4* queue)
      : held(a.held), slot_bytes_(16 * blockDim.x) {
    if constexpr (kVec == 1) return;
    begin_ = at_ = static_cast<unsigned>(__cvta_generic_to_shared(queue + threadIdx.x));
    end_ = begin_ + kSlots * slot_bytes_;
    step_ = share.step;
    row_step_ = share.row_step * a.logits_TV.stride - int64_t{a.held} * share.step;
    from_ = a.logits_TV.row(share.first_row) + share.begin;
    const int vectors = a.V > share.begin ? (a.V - share.begin - 1) / share.step + 1 : 0;
    count = min(vectors, a.held);
    rows_ = static_cast<int>((a.rows - share.first_row + share.row_step - 1) / share.row_step);
    for (int slot = 0; slot < kSlots; ++slot) start_copy(), next();
  }
  // The slot that the thread is at: its vector, the next copy into it, the slot after it.
  __device__ __forceinline__ Packed<T, kVec> vector() const {
    Packed<T, kVec> packed;
    *reinterpret_cast<uint4*>(&packed) = load_shared_16(at_);
    return packed;
  }
  __device__ __forceinline__ void start_copy() {
    if (item_ < count && rows_ > 0) copy_async(at_, from_);
    end_copy_group();
    from_ += step_;
    if (++item_ < held) return;
    item_ = 0, from_ += row_step_, --rows_;
  }
  __device__ __forceinline__ void next() {
    at_ += slot_bytes_;
    if (at_ == end_) at_ = begin_;
  }
  __device__ __forceinline__ unsigned place() const { return at_; }
  __device__ __forceinline__ void back_to(unsigned place) { at_ = place; }

  int held;       // vectors of a row, of this thread or of any
  int count = 0;  // of this thread

 private:
  unsigned begin_ = 0, end_ = 0, at_ = 0, slot_bytes_;
  int step_ = 0;
  int64_t row_step_ = 0;  // from the end of a row to the next one
  const T* from_ = nullptr;
  int item_ = 0, rows_ = 0;  // of the next copy; rows that are left
};

// Calls body.operator()<i>() for slots in order until it says false.
template <int i, class Body>
__device__ __forceinline__ void each_slot(Body&& body) {
  if constexpr (i < kSlots) {
    if (body.template operator()<i>()) each_slot<i + 1>(body);
  }
}

// The pair of this thread's logits of row `t`, from the ring's place on. Without a gradient their
// slots are free at once.
template <class T, int kVec, bool kGradient>
__device__ __forceinline__ ExpSum sum_row(const CrossEntropy<T>& a, const Share& share, int64_t t,
                                          Ring<T, kVec>& ring) {
  ExpSum own{-FLT_MAX, 0.0f};
  if constexpr (kVec > 1) {
    each_slot<0>([&]<int i>() {
      if (i == ring.held) return false;
      wait_copy_groups<kGradient ? kSlots - 1 - i : kSlots - 1>();
      if (i < ring.count) add_logits(ring.vector(), own);
      if constexpr (!kGradient) ring.start_copy();
      ring.next();
      return true;
    });
  }
  for (int column = share.begin + a.held * share.step; column < a.V; column += share.step) {
    add_logits(load_packed<T, kVec>(a.logits_TV.row(t) + column), own);
  }
  return own;
}

// Stores this thread's part of the row's gradient, zeros where the row is ignored, and frees slots.
template <class T, int kVec>
__device__ __forceinline__ void store_row(const CrossEntropy<T>& a, const Share& share, int64_t t,
                                          const ExpSum& row, int target, Ring<T, kVec>& ring) {
  const Relative relative(row.most);
  const float scale = 1.0f / row.sum, zeros[kVec] = {};
  const auto store = [&](const Packed<T, kVec>& packed, int column, T* to) {
    if (target == kIgnoredTarget) return store_values<T, kVec>(to, zeros);
    store_gradient(packed, target - column, relative, scale, to);
  };
  int column = share.begin;
  T* to = a.d_logits_TV.row(t) + column;
  if constexpr (kVec > 1) {
#pragma unroll 2
    for (int i = 0; i < ring.held; ++i) {
      if (i < ring.count) store(ring.vector(), column, to);
      ring.start_copy(), ring.next();
      column += share.step, to += share.step;
    }
  }
  for (; column < a.V; column += share.step, to += share.step) {
    store(load_packed<T, kVec>(a.logits_TV.row(t) + column), column, to);
  }
}

template <class T, int kVec, bool kGradient>
__global__ void __launch_bounds__(kMaxThreads, 2) cross_entropy_kernel(const CrossEntropy<T> a) {
  extern __shared__ uint4 queue[];
  __shared__ ExpSum shared[2][kMaxWarps];
  cg::cluster_group cluster = cg::this_cluster();
  const int rank = static_cast<int>(blockIdx.x) % a.cluster, threads = blockDim.x;
  const Share share{(rank * threads + static_cast<int>(threadIdx.x)) * kVec,
                    a.cluster * threads * kVec, blockIdx.x / a.cluster, gridDim.x / a.cluster};
  Ring<T, kVec> ring(a, share, queue);
  int buffer = 0;  // of the pairs; alternates, so that one barrier a row is enough
  for (int64_t t = share.first_row; t < a.rows; t += share.row_step) {
    const int target = a.target_T[t];
    const bool is_ignored = target == kIgnoredTarget;
    device_check(is_ignored || (target >= 0 && target < a.V));
    float at_target = 0;  // read before the barrier: the gradient may take the logits' place
    if (share.begin == 0 && !is_ignored) at_target = to_f32(a.logits_TV.row(t)[target]);
    const unsigned row_place = ring.place();
    ExpSum row = sum_row<T, kVec, kGradient>(a, share, t, ring);
    if (!is_ignored) {
      row = cluster_merge(cluster, row, shared[buffer]);
      buffer ^= 1;
    }
    if (share.begin == 0) a.loss_T[t] = is_ignored ? 0.0f : loss_of(row, at_target);
    if constexpr (!kGradient) continue;
    ring.back_to(row_place);
    store_row<T, kVec>(a, share, t, row, target, ring);
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
