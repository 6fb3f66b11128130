// RMSNorm on the GPU. Forward: a warp takes a row, which its lanes hold in registers between the
// only read and the write; a block takes one that is longer than they hold, or one with a residual,
// so that fewer rows of those four tensors are under way at a time.
//
// D2: a row's sum depends on D, the vector width and whether there is a residual. Backward: one
// block per leaf, which adds its rows' d_gain in token order, so that leaves do not depend on who
// computes them (D3); a thread owns the same columns of each row; rows come through a queue in
// shared memory.
// Napkin: at D = 2048 in bf16 a warp has 4 KB of loads in flight (forward), a block 8.
#include "kernels/cuda_launch.cuh"
#include "kernels/rms_norm.h"

namespace cambium::cuda {

namespace {

constexpr int kMaxThreads = 1024;

template <class T>
struct NormForward {
  Rows<const T> x_TD, residual_TD;
  const T* gain_D;
  Rows<T> sum_TD, y_TD;
  float* rstd_T;
  int64_t T_count;
  int D;
  float epsilon;
};

// Who shares a row.
enum class RowOwner : uint8_t { warp, block };

// Column of this thread's vector `i`; beyond D where it has none.
template <int kVec, RowOwner kOwner = RowOwner::block>
__device__ __forceinline__ int column_of(int i) {
  const int threads = kOwner == RowOwner::warp ? kWarpLanes : static_cast<int>(blockDim.x);
  return (i * threads + static_cast<int>(threadIdx.x) % threads) * kVec;
}

// The row x (+ residual, rounded to its storage) as stored, after its sum is stored where asked
// for.
template <class T, int kVec, int kPer, RowOwner kOwner>
__device__ __forceinline__ void load_normed(const NormForward<T>& a, int64_t t,
                                            Packed<T, kVec> (&row)[kPer]) {
  // All loads before the first store, which they could not pass.
  Packed<T, kVec> residual[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int column = column_of<kVec, kOwner>(i);
    if (column >= a.D) continue;
    row[i] = load_packed<T, kVec>(a.x_TD.row(t) + column);
    if (!a.residual_TD.is_absent()) {
      residual[i] = load_packed<T, kVec>(a.residual_TD.row(t) + column);
    }
  }
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int column = column_of<kVec, kOwner>(i);
    if (column >= a.D) continue;
    if (!a.residual_TD.is_absent()) {
      float x[kVec], other[kVec];
      unpack(row[i], x), unpack(residual[i], other);
#pragma unroll
      for (int j = 0; j < kVec; ++j) x[j] += other[j];
      row[i] = pack<T, kVec>(x);
    }
    if (!a.sum_TD.is_absent()) store_packed(a.sum_TD.row(t) + column, row[i]);
  }
}

constexpr int kRowWarps = 4;  // rows of a block, one a warp

template <class T, int kVec, int kPer, RowOwner kOwner>
__global__ void __launch_bounds__(kOwner == RowOwner::warp ? kRowWarps * kWarpLanes : kMaxThreads)
    rms_norm_kernel(const NormForward<T> a) {
  int64_t t = blockIdx.x;
  if constexpr (kOwner == RowOwner::warp) {
    t = t * kRowWarps + threadIdx.x / kWarpLanes;
    if (t >= a.T_count) return;
  }
  Packed<T, kVec> row[kPer];
  load_normed<T, kVec, kPer, kOwner>(a, t, row);
  float squares[1] = {}, x[kVec], gain[kVec];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    if (column_of<kVec, kOwner>(i) >= a.D) continue;
    unpack(row[i], x);
#pragma unroll
    for (int j = 0; j < kVec; ++j) squares[0] = fmaf(x[j], x[j], squares[0]);
  }
  if constexpr (kOwner == RowOwner::warp) {
    squares[0] = warp_sum(squares[0]);
  } else {
    __shared__ float shared[kMaxThreads / kWarpLanes][1];
    block_sum(squares, shared);
  }
  const float rstd = 1.0f / sqrtf(squares[0] / static_cast<float>(a.D) + a.epsilon);
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int column = column_of<kVec, kOwner>(i);
    if (column >= a.D) continue;
    unpack(row[i], x);
    load_values<T, kVec>(a.gain_D + column, gain);
#pragma unroll
    for (int j = 0; j < kVec; ++j) x[j] = gain[j] * (x[j] * rstd);
    store_values<T, kVec>(a.y_TD.row(t) + column, x);
    if (column == 0) a.rstd_T[t] = rstd;
  }
}

template <class T>
struct NormBackward {
  Rows<const T> d_y_TD, x_TD, d_residual_TD;
  const T* gain_D;
  const float* rstd_T;
  Rows<T> d_x_TD;
  Rows<float> d_gain_leaf_BD;
  int64_t T_count, block_tokens;
  int D;
};

// A thread's vectors of one row, as stored.
template <class T, int kVec, int kPer>
struct RowLoads {
  Packed<T, kVec> d_y[kPer], x[kPer], d_residual[kPer];
};

// Rows that are on their way to shared memory while one is worked on. Wider rows and rows that are
// no vectors are loaded when they are needed.
constexpr int kRowsAhead = 3;
template <int kVec, int kPer>
constexpr bool kIsQueued = kVec > 1 && kPer == 1;

// One group a call, empty from row `end` on: the row's vectors of this thread into `stage`.
template <class T, int kVec>
__device__ __forceinline__ void start_row(const NormBackward<T>& a, int64_t t, int64_t end,
                                          uint4* stage) {
  const int column = column_of<kVec>(0);
  if (t < end && column < a.D) {
    copy_async(stage, a.d_y_TD.row(t) + column);
    copy_async(stage + blockDim.x, a.x_TD.row(t) + column);
    if (!a.d_residual_TD.is_absent()) {
      copy_async(stage + 2 * blockDim.x, a.d_residual_TD.row(t) + column);
    }
  }
  end_copy_group();
}

template <class T, int kVec, int kPer>
__device__ __forceinline__ void load_row(const NormBackward<T>& a, int64_t t, const uint4* stage,
                                         RowLoads<T, kVec, kPer>& row) {
  if constexpr (kIsQueued<kVec, kPer>) {
    wait_copy_groups<kRowsAhead>();
    *reinterpret_cast<uint4*>(&row.d_y[0]) = stage[0];
    *reinterpret_cast<uint4*>(&row.x[0]) = stage[blockDim.x];
    *reinterpret_cast<uint4*>(&row.d_residual[0]) = stage[2 * blockDim.x];
  } else {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int column = column_of<kVec>(i);
      if (column >= a.D) continue;
      row.d_y[i] = load_packed<T, kVec>(a.d_y_TD.row(t) + column);
      row.x[i] = load_packed<T, kVec>(a.x_TD.row(t) + column);
      if (a.d_residual_TD.is_absent()) continue;
      row.d_residual[i] = load_packed<T, kVec>(a.d_residual_TD.row(t) + column);
    }
  }
}

// d_x of row t, and its share of d_gain.
template <class T, int kVec, int kPer>
__device__ __forceinline__ void backward_row(const NormBackward<T>& a, int64_t t,
                                             const RowLoads<T, kVec, kPer>& row,
                                             const Packed<T, kVec> (&gain_packed)[kPer],
                                             float (&d_gain)[kPer][kVec], float (*shared)[1]) {
  float along[1] = {}, gain[kVec], d_y[kVec], x[kVec];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    if (column_of<kVec>(i) >= a.D) continue;
    unpack(gain_packed[i], gain), unpack(row.d_y[i], d_y), unpack(row.x[i], x);
#pragma unroll
    for (int j = 0; j < kVec; ++j) along[0] = fmaf(gain[j] * d_y[j], x[j], along[0]);
  }
  const float rstd = a.rstd_T[t];
  block_sum(along, shared);
  const float mean = along[0] * rstd / static_cast<float>(a.D);
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int column = column_of<kVec>(i);
    if (column >= a.D) continue;
    float d_x[kVec];
    unpack(gain_packed[i], gain), unpack(row.d_y[i], d_y), unpack(row.x[i], x);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const float n = x[j] * rstd;
      d_gain[i][j] = fmaf(d_y[j], n, d_gain[i][j]);
      d_x[j] = rstd * fmaf(-n, mean, gain[j] * d_y[j]);
    }
    if (!a.d_residual_TD.is_absent()) {
      unpack(row.d_residual[i], x);
#pragma unroll
      for (int j = 0; j < kVec; ++j) d_x[j] += x[j];
    }
    store_values<T, kVec>(a.d_x_TD.row(t) + column, d_x);
  }
}

template <class T, int kVec, int kPer>
__global__ void __launch_bounds__(kMaxThreads) rms_norm_backward_kernel(const NormBackward<T> a) {
  extern __shared__ uint4 queue[];  // kRowsAhead + 1 stages of three vectors a thread
  __shared__ float shared[2][kMaxThreads / kWarpLanes][1];
  const int64_t begin = int64_t{blockIdx.x} * a.block_tokens;
  const int64_t end = min(a.T_count, begin + a.block_tokens);
  const auto stage_of = [&](int64_t row) {
    return queue + row % (kRowsAhead + 1) * 3 * blockDim.x + threadIdx.x;
  };
  Packed<T, kVec> gain[kPer];
  float d_gain[kPer][kVec] = {};
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int column = column_of<kVec>(i);
    if (column < a.D) gain[i] = load_packed<T, kVec>(a.gain_D + column);
  }
  if constexpr (kIsQueued<kVec, kPer>) {
    for (int ahead = 0; ahead < kRowsAhead; ++ahead) {
      start_row<T, kVec>(a, begin + ahead, end, stage_of(ahead));
    }
  }
  for (int64_t t = begin; t < end; ++t) {
    const int64_t row = t - begin, ahead = row + kRowsAhead;
    if constexpr (kIsQueued<kVec, kPer>) start_row<T, kVec>(a, begin + ahead, end, stage_of(ahead));
    RowLoads<T, kVec, kPer> loads;
    load_row<T, kVec, kPer>(a, t, stage_of(row), loads);
    // Sums alternate between two places: one barrier between the uses of each.
    backward_row<T, kVec, kPer>(a, t, loads, gain, d_gain, shared[row % 2]);
  }
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int column = column_of<kVec>(i);
    if (column < a.D) store_floats<kVec>(a.d_gain_leaf_BD.row(blockIdx.x) + column, d_gain[i]);
  }
}

// Calls body.operator()<kPer>() where a warp can own a row, and says whether it can.
template <int kVec, class Body>
bool with_warp(int64_t D, Body&& body) {
  const int64_t per = blocks_for(blocks_for(D, kVec), kWarpLanes);
  if (per > 16) return false;
  per <= 2   ? body.template operator()<2>()
  : per <= 8 ? body.template operator()<8>()
             : body.template operator()<16>();
  return true;
}

// Calls body.operator()<kPer>(threads): kPer vectors a thread, from D and the width alone.
template <int kVec, class Body>
void with_threads(const char* op, int64_t D, Body&& body) {
  const int64_t vectors = (D + kVec - 1) / kVec;
  const auto threads = [&](int64_t per) {
    return static_cast<int>(blocks_for(blocks_for(vectors, per), kWarpLanes) * kWarpLanes);
  };
  if (vectors <= kMaxThreads) return body.template operator()<1>(threads(1));
  if (vectors <= 8 * kMaxThreads) return body.template operator()<8>(threads(8));
  fail(ExitCode::usage, "{}: rows of {} elements are longer than the {} that the CUDA kernel holds",
       op, D, 8 * kMaxThreads * kVec);
}

}  // namespace

void rms_norm(const RmsNormArgs& args, Stream& stream) {
  const int64_t T_count = args.x_TD[0], D = args.x_TD[1];
  CHECK(args.residual_TD.empty() || args.residual_TD.dtype == args.x_TD.dtype);
  CHECK(args.gain_D.dtype == args.x_TD.dtype && args.y_TD.dtype == args.x_TD.dtype);
  const bool vectors =
      rows_are_vectors(args.x_TD, args.residual_TD, args.gain_D, args.sum_TD, args.y_TD);
  with_storage(args.x_TD.dtype, vectors, [&]<class T, int kVec>() {
    const NormForward<T> a{rows_of<const T>(args.x_TD),
                           rows_of<const T>(args.residual_TD),
                           static_cast<const T*>(args.gain_D.data),
                           rows_of<T>(args.sum_TD),
                           rows_of<T>(args.y_TD),
                           args.rstd_T.pointer(),
                           T_count,
                           static_cast<int>(D),
                           args.epsilon};
    const bool by_warp =
        args.residual_TD.empty() && with_warp<kVec>(D, [&]<int kPer>() {
          launch("rms_norm", rms_norm_kernel<T, kVec, kPer, RowOwner::warp>,
                 {.blocks = blocks_for(T_count, kRowWarps), .threads = kRowWarps * kWarpLanes},
                 stream, a);
        });
    if (by_warp) return;
    with_threads<kVec>("rms_norm", D, [&]<int kPer>(int threads) {
      launch("rms_norm", rms_norm_kernel<T, kVec, kPer, RowOwner::block>,
             {.blocks = T_count, .threads = threads}, stream, a);
    });
  });
}

void rms_norm_backward(const RmsNormBackwardArgs& args, Stream& stream) {
  const int64_t T_count = args.d_y_TD[0], D = args.d_y_TD[1];
  CHECK(args.x_TD.dtype == args.d_y_TD.dtype && args.gain_D.dtype == args.d_y_TD.dtype);
  CHECK(args.d_residual_TD.empty() || args.d_residual_TD.dtype == args.d_y_TD.dtype);
  CHECK(args.d_x_TD.dtype == args.d_y_TD.dtype);
  const bool vectors = rows_are_vectors(args.d_y_TD, args.x_TD, args.gain_D, args.d_residual_TD,
                                        args.d_x_TD, args.d_gain_leaf_BD);
  with_storage(args.d_y_TD.dtype, vectors, [&]<class T, int kVec>() {
    const NormBackward<T> a{rows_of<const T>(args.d_y_TD),
                            rows_of<const T>(args.x_TD),
                            rows_of<const T>(args.d_residual_TD),
                            static_cast<const T*>(args.gain_D.data),
                            args.rstd_T.pointer(),
                            rows_of<T>(args.d_x_TD),
                            rows_of<float>(args.d_gain_leaf_BD),
                            T_count,
                            args.block_tokens,
                            static_cast<int>(D)};
    with_threads<kVec>("rms_norm_backward", D, [&]<int kPer>(int threads) {
      const int64_t queue =
          kIsQueued<kVec, kPer> ? int64_t{16} * 3 * (kRowsAhead + 1) * threads : 0;
      launch("rms_norm_backward", rms_norm_backward_kernel<T, kVec, kPer>,
             {.blocks = args.d_gain_leaf_BD[0], .threads = threads, .shared_bytes = queue}, stream,
             a);
    });
  });
}

}  // namespace cambium::cuda
