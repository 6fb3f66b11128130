// Query/key normalisation and rotary embedding on the GPU. A head is 2, 4, ... 32 neighbouring
// lanes; a lane holds vectors of the head's first half and the same columns of its second half, so
// that the rotation stays inside the lane. A block takes all heads of a token, queries before keys.
//
// D2: a head's sum depends on Q and the vector width, a full width's on the heads too. Backward: a
// block per leaf; a lane adds its columns' d_gain over the leaf's tokens in order, then heads are
// added in order, so that leaves do not depend on who computes them (D3).
// Napkin: at 36 heads of 128 in bf16, 8 lanes a head, 288 threads and 9 KB of loads a token.
#include "kernels/qk_norm_rope.h"

#include "kernels/cuda_launch.cuh"

namespace cambium::cuda {

namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxPer = 4;        // vectors of a half that a lane may hold
constexpr int kPlainTokens = 16;  // tokens of a backward block without a norm
constexpr int kStages = 4;        // tokens in shared memory: the one worked on and the next
constexpr int kStageVectors = 4;  // a lane's: both halves of d_out and of x

struct HeadShape {
  int heads = 0;    // of queries, or of keys
  int first = 0;    // head number of the first one in the block
  float width = 0;  // elements under one rstd
};

template <class T>
struct Angles {
  Rows<const float> cos_SC, sin_SC;
  const int32_t* position_T;
  int64_t positions;

  __device__ __forceinline__ int64_t row_of(int64_t t) const {
    const int64_t position = position_T[t];
    device_check(position >= 0 && position < positions);
    return position;
  }
};

template <class T>
struct HeadForward {
  HeadShape shape;
  Rows<const T> x;
  const T* gain;
  Rows<T> out;
  Rows<float> rstd;
};

template <class T>
struct RopeForward {
  HeadForward<T> q, k;
  Angles<T> angles;
  int Q, lanes;  // lanes of a head
  float epsilon;
};

template <class T>
struct HeadBackward {
  HeadShape shape;
  Rows<const T> d_out, x;
  const T* gain;
  Rows<const float> rstd;
  Rows<T> d_x;
  Rows<float> d_gain_leaf;
};

template <class T>
struct RopeBackward {
  HeadBackward<T> q, k;
  Angles<T> angles;
  int64_t T_count, block_tokens;
  int Q, lanes;
};

// Threads of a block: 128 registers each where a lane holds one vector.
constexpr int max_threads(int per) { return per == 1 ? kMaxThreads / 2 : kMaxThreads; }

// This thread's place: a lane of a head. Lanes of no head take part in shuffles only.
struct Lane {
  int head, lane;  // head counts queries, then keys
  bool is_query;
  bool is_there;

  template <class Args>
  __device__ __forceinline__ explicit Lane(const Args& a)
      : head(threadIdx.x / a.lanes),
        lane(threadIdx.x % a.lanes),
        is_query(head < a.q.shape.heads),
        is_there(head < a.q.shape.heads + a.k.shape.heads) {}
  // Column of vector `i` in a half; `half` or more where there is none.
  template <int kVec>
  __device__ __forceinline__ int column(int i, int lanes) const {
    return is_there ? (i * lanes + lane) * kVec : INT_MAX;
  }
};

// Sums over the lanes of a head, or over all heads of the queries or keys; the same bits in every
// lane that shares the sum. `shared` holds a float a head and is free after the next barrier.
template <QkNormKind kKind>
__device__ __forceinline__ float group_sum(float value, const Lane& place, int lanes,
                                           const HeadShape& shape, float* shared) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  if constexpr (kKind == QkNormKind::full_width) {
    if (place.is_there && place.lane == 0) shared[place.head] = value;
    __syncthreads();
    value = 0.0f;
    for (int h = 0; h < shape.heads; ++h) value += shared[shape.first + h];
  }
  return value;
}

// Offset of the head's gain: the heads share one, or have their own.
template <QkNormKind kKind>
__device__ __forceinline__ int64_t gain_offset(int own_head, int Q) {
  return kKind == QkNormKind::full_width ? int64_t{own_head} * Q : 0;
}

template <class T, int kVec, int kPer, QkNormKind kKind>
__global__ void __launch_bounds__(max_threads(kPer)) qk_norm_rope_kernel(const RopeForward<T> a) {
  __shared__ float shared[kMaxThreads];
  const int64_t t = blockIdx.x;
  const Lane place(a);
  const HeadForward<T>& h = place.is_query ? a.q : a.k;
  const int own_head = place.head - h.shape.first, half = a.Q / 2;
  float first[kPer][kVec], second[kPer][kVec], squares = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int column = place.column<kVec>(i, a.lanes);
    if (column >= half) continue;
    const T* x = h.x.row(t) + own_head * a.Q + column;
    load_values<T, kVec>(x, first[i]);
    load_values<T, kVec>(x + half, second[i]);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      squares = fmaf(first[i][j], first[i][j], fmaf(second[i][j], second[i][j], squares));
    }
  }
  const int64_t angle = a.angles.row_of(t);
  float rstd = 1.0f;
  if constexpr (kKind != QkNormKind::none) {
    squares = group_sum<kKind>(squares, place, a.lanes, h.shape, shared);
    rstd = 1.0f / sqrtf(squares / h.shape.width + a.epsilon);
    const int group = kKind == QkNormKind::per_head ? own_head : 0;
    if (place.is_there && place.lane == 0 && (group > 0 || own_head == 0)) {
      h.rstd.row(t)[group] = rstd;
    }
  }
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int column = place.column<kVec>(i, a.lanes);
    if (column >= half) continue;
    if constexpr (kKind != QkNormKind::none) {
      const T* gain = h.gain + gain_offset<kKind>(own_head, a.Q) + column;
      float low[kVec], high[kVec];
      load_values<T, kVec>(gain, low);
      load_values<T, kVec>(gain + half, high);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        first[i][j] = low[j] * (first[i][j] * rstd);
        second[i][j] = high[j] * (second[i][j] * rstd);
      }
    }
    float cos[kVec], sin[kVec], out_first[kVec], out_second[kVec];
    load_floats<kVec>(a.angles.cos_SC.row(angle) + column, cos);
    load_floats<kVec>(a.angles.sin_SC.row(angle) + column, sin);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      out_first[j] = first[i][j] * cos[j] - second[i][j] * sin[j];
      out_second[j] = second[i][j] * cos[j] + first[i][j] * sin[j];
    }
    T* out = h.out.row(t) + own_head * a.Q + column;
    store_values<T, kVec>(out, out_first);
    store_values<T, kVec>(out + half, out_second);
  }
}

// Whether a token's rows wait in shared memory instead of in registers, which two blocks of a
// multiprocessor then share: where a lane holds one vector of a half.
template <int kVec, int kPer>
inline constexpr bool kIsQueued = kVec > 1 && kPer == 1;

// What a lane reads of one token in the backward pass, the rows as stored.
template <class T, int kVec, int kPer>
struct HeadLoads {
  Packed<T, kVec> d_out[kPer][2], x[kPer][2];
};

// Calls body(vectors, row) of d_out and, with a norm, of x for each vector that this lane has.
template <class T, int kVec, int kPer, QkNormKind kKind, class Body>
__device__ __forceinline__ void each_vector(const HeadBackward<T>& h, const Lane& place, int Q,
                                            int lanes, int64_t t, Body&& body) {
  const int own_head = place.head - h.shape.first;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int column = place.column<kVec>(i, lanes);
    if (column >= Q / 2) continue;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int64_t at = own_head * Q + part * (Q / 2) + column;
      body(i, part, h.d_out.row(t) + at, kKind == QkNormKind::none ? nullptr : h.x.row(t) + at);
    }
  }
}

template <class T, int kVec, int kPer, QkNormKind kKind>
__device__ __forceinline__ void load_head(const HeadBackward<T>& h, const Lane& place, int Q,
                                          int lanes, int64_t t, HeadLoads<T, kVec, kPer>& loads) {
  each_vector<T, kVec, kPer, kKind>(h, place, Q, lanes, t,
                                    [&](int i, int part, const T* d_out, const T* x) {
                                      loads.d_out[i][part] = load_packed<T, kVec>(d_out);
                                      if (x != nullptr) loads.x[i][part] = load_packed<T, kVec>(x);
                                    });
}

// The same by way of `stage`, this thread's place: each thread reads what it copied itself, so no
// barrier is needed. One group a call, empty past the last token.
template <class T, int kVec, QkNormKind kKind>
__device__ __forceinline__ void start_head(const HeadBackward<T>& h, const Lane& place, int Q,
                                           int lanes, int64_t t, int64_t end, uint4* stage) {
  const int threads = blockDim.x;
  if (t < end) {
    each_vector<T, kVec, 1, kKind>(h, place, Q, lanes, t,
                                   [&](int, int part, const T* d_out, const T* x) {
                                     copy_async(stage + part * threads, d_out);
                                     if (x != nullptr) copy_async(stage + (2 + part) * threads, x);
                                   });
  }
  end_copy_group();
}
template <class T, int kVec>
__device__ __forceinline__ void finish_head(const uint4* stage, HeadLoads<T, kVec, 1>& loads) {
  const int threads = blockDim.x;
  wait_copy_groups<kStages - 1>();
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    *reinterpret_cast<uint4*>(&loads.d_out[0][part]) = stage[part * threads];
    *reinterpret_cast<uint4*>(&loads.x[0][part]) = stage[(2 + part) * threads];
  }
}

// A token's scalars, read a token ahead.
struct HeadScalars {
  int64_t angle = 0;
  float rstd = 1.0f;
};
template <QkNormKind kKind, class T>
__device__ __forceinline__ HeadScalars load_scalars(const RopeBackward<T>& a,
                                                    const HeadBackward<T>& h, const Lane& place,
                                                    int64_t t) {
  HeadScalars scalars{a.angles.row_of(t)};
  if (kKind == QkNormKind::none || !place.is_there) return scalars;
  scalars.rstd = h.rstd.row(t)[kKind == QkNormKind::per_head ? place.head - h.shape.first : 0];
  return scalars;
}

// d_n = the rows of d_out turned back by the token's angle, both halves of vector `i`.
template <class T, int kVec>
__device__ __forceinline__ void turn_back(const Angles<T>& angles, int64_t angle, int column,
                                          const Packed<T, kVec> (&d_out)[2],
                                          float (&d_n)[2][kVec]) {
  float cos[kVec], sin[kVec], first[kVec], second[kVec];
  load_floats<kVec>(angles.cos_SC.row(angle) + column, cos);
  load_floats<kVec>(angles.sin_SC.row(angle) + column, sin);
  unpack(d_out[0], first), unpack(d_out[1], second);
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    d_n[0][j] = first[j] * cos[j] + second[j] * sin[j];
    d_n[1][j] = second[j] * cos[j] - first[j] * sin[j];
  }
}

template <class T, int kVec, int kPer, QkNormKind kKind>
__device__ __forceinline__ void backward_token(const RopeBackward<T>& a, const HeadBackward<T>& h,
                                               const Lane& place, int64_t t,
                                               const HeadScalars& scalars,
                                               const HeadLoads<T, kVec, kPer>& loads,
                                               const Packed<T, kVec> (&gains)[kPer][2],
                                               float (&d_gain)[kPer][2][kVec], float* shared) {
  const int own_head = place.head - h.shape.first, half = a.Q / 2;
  const float rstd = scalars.rstd;
  float d_n[kPer][2][kVec], gain[kVec], x[kVec], along = 0, mean = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int column = place.column<kVec>(i, a.lanes);
    if (column >= half) continue;
    turn_back<T, kVec>(a.angles, scalars.angle, column, loads.d_out[i], d_n[i]);
    if constexpr (kKind != QkNormKind::none) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        unpack(gains[i][part], gain), unpack(loads.x[i][part], x);
#pragma unroll
        for (int j = 0; j < kVec; ++j) along = fmaf(gain[j] * d_n[i][part][j], x[j], along);
      }
    }
  }
  if constexpr (kKind != QkNormKind::none) {
    along = group_sum<kKind>(along, place, a.lanes, h.shape, shared);
    mean = along * rstd / h.shape.width;
  }
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int column = place.column<kVec>(i, a.lanes);
    if (column >= half) continue;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      float(&d)[kVec] = d_n[i][part];
      if constexpr (kKind != QkNormKind::none) {
        unpack(gains[i][part], gain), unpack(loads.x[i][part], x);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          const float n = x[j] * rstd;
          d_gain[i][part][j] = fmaf(d[j], n, d_gain[i][part][j]);
          d[j] = rstd * fmaf(-n, mean, gain[j] * d[j]);
        }
      }
      store_values<T, kVec>(h.d_x.row(t) + own_head * a.Q + part * half + column, d);
    }
  }
}

extern __shared__ uint4 queue[];  // of a backward block; then its gradients by head

// The leaf's gain gradient: heads in order where they share a gain.
template <class T, int kVec, int kPer, QkNormKind kKind>
__device__ __forceinline__ void store_d_gain(const RopeBackward<T>& a, const HeadBackward<T>& h,
                                             const Lane& place,
                                             const float (&d_gain)[kPer][2][kVec]) {
  float* by_head = reinterpret_cast<float*>(queue);  // [heads, Q], per_head only
  const int half = a.Q / 2;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int column = place.column<kVec>(i, a.lanes);
    if (column >= half) continue;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      float* to = kKind == QkNormKind::per_head
                      ? by_head + place.head * a.Q
                      : h.d_gain_leaf.row(blockIdx.x) + (place.head - h.shape.first) * a.Q;
#pragma unroll
      for (int j = 0; j < kVec; ++j) to[part * half + column + j] = d_gain[i][part][j];
    }
  }
  if constexpr (kKind == QkNormKind::full_width) return;
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * a.Q; i += blockDim.x) {
    const HeadBackward<T>& to = i < a.Q ? a.q : a.k;
    const float* from = by_head + to.shape.first * a.Q + i % a.Q;
    float sum = 0;
    for (int head = 0; head < to.shape.heads; ++head) sum += from[head * a.Q];
    to.d_gain_leaf.row(blockIdx.x)[i % a.Q] = sum;
  }
}

template <class T, int kVec, int kPer, QkNormKind kKind>
__global__ void __launch_bounds__(max_threads(kPer))
    qk_norm_rope_backward_kernel(const RopeBackward<T> a) {
  __shared__ float shared[2][kMaxThreads];
  const Lane place(a);
  const HeadBackward<T>& h = place.is_query ? a.q : a.k;
  const int own_head = place.head - h.shape.first, half = a.Q / 2;
  Packed<T, kVec> gains[kPer][2];
  float d_gain[kPer][2][kVec] = {};
#pragma unroll
  for (int i = 0; i < kPer && kKind != QkNormKind::none; ++i) {
    const int column = place.column<kVec>(i, a.lanes);
    if (column >= half) continue;
    const T* gain = h.gain + gain_offset<kKind>(own_head, a.Q) + column;
    gains[i][0] = load_packed<T, kVec>(gain);
    gains[i][1] = load_packed<T, kVec>(gain + half);
  }
  const int64_t begin = int64_t{blockIdx.x} * a.block_tokens;
  const int64_t end = min(a.T_count, begin + a.block_tokens);
  HeadLoads<T, kVec, kPer> now;
  HeadScalars scalars = load_scalars<kKind>(a, h, place, begin), next = scalars;
  const auto stage_of = [&](int64_t t) {
    return queue + static_cast<int>(t % kStages) * kStageVectors * blockDim.x + threadIdx.x;
  };
  if constexpr (kIsQueued<kVec, kPer>) {
    for (int64_t t = begin; t < begin + kStages - 1; ++t) {
      start_head<T, kVec, kKind>(h, place, a.Q, a.lanes, t, end, stage_of(t));
    }
  }
  for (int64_t t = begin; t < end; ++t, scalars = next) {
    if (t + 1 < end) next = load_scalars<kKind>(a, h, place, t + 1);
    if constexpr (kIsQueued<kVec, kPer>) {
      const int64_t ahead = t + kStages - 1;
      start_head<T, kVec, kKind>(h, place, a.Q, a.lanes, ahead, end, stage_of(ahead));
      finish_head<T, kVec>(stage_of(t), now);
    } else {
      load_head<T, kVec, kPer, kKind>(h, place, a.Q, a.lanes, t, now);
    }
    backward_token<T, kVec, kPer, kKind>(a, h, place, t, scalars, now, gains, d_gain,
                                         shared[t & 1]);
  }
  if constexpr (kIsQueued<kVec, kPer>) {
    wait_copy_groups<0>();
    __syncthreads();  // store_d_gain takes the queue's memory
  }
  if constexpr (kKind != QkNormKind::none) store_d_gain<T, kVec, kPer, kKind>(a, h, place, d_gain);
}

struct BlockShape {
  int lanes, threads;
};

// Lanes of a head and threads of a block when a lane holds `per` vectors of a half; 0 lanes where
// that is not enough.
BlockShape block_shape(int64_t heads, int64_t half, int vec, int per) {
  int64_t lanes = 1;
  while (lanes * per * vec < half) lanes *= 2;
  if (lanes > kWarpLanes || heads * lanes > max_threads(per)) return {0, 0};
  return {static_cast<int>(lanes),
          static_cast<int>(blocks_for(heads * lanes, kWarpLanes) * kWarpLanes)};
}

// body.operator()<kPer, kKind>(shape) with the fewest vectors a lane that fit a block.
template <int kVec, class Body>
void with_heads(const char* op, QkNormKind kind, int64_t heads, int64_t half, Body&& body) {
  auto with_kind = [&]<int kPer>(BlockShape shape) {
    switch (kind) {
      case QkNormKind::none:
        return body.template operator()<kPer, QkNormKind::none>(shape);
      case QkNormKind::per_head:
        return body.template operator()<kPer, QkNormKind::per_head>(shape);
      case QkNormKind::full_width:
        return body.template operator()<kPer, QkNormKind::full_width>(shape);
    }
  };
  if constexpr (kVec > 1) {
    const BlockShape narrow = block_shape(heads, half, kVec, 1);
    if (narrow.lanes > 0) return with_kind.template operator()<1>(narrow);
  }
  const BlockShape wide = block_shape(heads, half, kVec, kMaxPer);
  if (wide.lanes > 0) return with_kind.template operator()<kMaxPer>(wide);
  fail(ExitCode::usage, "{}: {} heads of {} do not fit a block of the CUDA kernel", op, heads,
       2 * half);
}

// Halves of a head are whole vectors too.
template <class... Views>
bool heads_are_vectors(int64_t Q, DType dtype, const Views&... views) {
  return Q / 2 * dtype_bytes(dtype) % 16 == 0 && rows_are_vectors(views...);
}

HeadShape head_shape(QkNormKind kind, int64_t heads, int64_t first, int64_t Q) {
  const int64_t width = kind == QkNormKind::full_width ? heads * Q : Q;
  return {static_cast<int>(heads), static_cast<int>(first), static_cast<float>(width)};
}

template <class T, class Args>
Angles<T> angles_of(const Args& args) {
  return {rows_of<const float>(args.cos_SC), rows_of<const float>(args.sin_SC),
          args.position_T.pointer(), args.cos_SC[0]};
}

// Shared memory of a backward block: the queue, or a leaf's gradients by head, `width` in all.
template <int kVec, int kPer>
int64_t backward_bytes(const BlockShape& shape, int64_t width) {
  const int64_t queued = kIsQueued<kVec, kPer> ? kStages * kStageVectors * 16 * shape.threads : 0;
  return std::max(queued, 4 * width);
}

}  // namespace

void qk_norm_rope(const QkNormRopeArgs& args, Stream& stream) {
  const int64_t T_count = args.q_THQ[0], H = args.q_THQ[1], Q = args.q_THQ[2], G = args.k_TGQ[1];
  const DType dtype = args.q_THQ.dtype;
  CHECK(args.k_TGQ.dtype == dtype && args.q_out_THQ.dtype == dtype);
  CHECK(args.k_out_TGQ.dtype == dtype);
  CHECK(args.q_gain.empty() || args.q_gain.dtype == dtype);
  const bool vectors = heads_are_vectors(Q, dtype, args.q_THQ, args.k_TGQ, args.q_gain, args.k_gain,
                                         args.cos_SC, args.sin_SC, args.q_out_THQ, args.k_out_TGQ);
  with_storage(dtype, vectors, [&]<class T, int kVec>() {
    RopeForward<T> a{.q = {head_shape(args.kind, H, 0, Q), rows_of<const T>(args.q_THQ),
                           static_cast<const T*>(args.q_gain.data), rows_of<T>(args.q_out_THQ),
                           rows_of<float>(args.q_rstd)},
                     .k = {head_shape(args.kind, G, H, Q), rows_of<const T>(args.k_TGQ),
                           static_cast<const T*>(args.k_gain.data), rows_of<T>(args.k_out_TGQ),
                           rows_of<float>(args.k_rstd)},
                     .angles = angles_of<T>(args),
                     .Q = static_cast<int>(Q),
                     .lanes = 0,
                     .epsilon = args.epsilon};
    with_heads<kVec>("qk_norm_rope", args.kind, H + G, Q / 2,
                     [&]<int kPer, QkNormKind kKind>(BlockShape shape) {
                       a.lanes = shape.lanes;
                       launch("qk_norm_rope", qk_norm_rope_kernel<T, kVec, kPer, kKind>,
                              {.blocks = T_count, .threads = shape.threads}, stream, a);
                     });
  });
}

void qk_norm_rope_backward(const QkNormRopeBackwardArgs& args, Stream& stream) {
  const int64_t T_count = args.d_q_out_THQ[0], H = args.d_q_out_THQ[1], Q = args.d_q_out_THQ[2];
  const int64_t G = args.d_k_out_TGQ[1];
  const DType dtype = args.d_q_out_THQ.dtype;
  CHECK(args.d_k_out_TGQ.dtype == dtype && args.d_q_THQ.dtype == dtype);
  CHECK(args.d_k_TGQ.dtype == dtype && (args.q_THQ.empty() || args.q_THQ.dtype == dtype));
  const bool vectors = heads_are_vectors(Q, dtype, args.d_q_out_THQ, args.d_k_out_TGQ, args.q_THQ,
                                         args.k_TGQ, args.q_gain, args.k_gain, args.cos_SC,
                                         args.sin_SC, args.d_q_THQ, args.d_k_TGQ);
  const int64_t block_tokens = args.kind == QkNormKind::none ? kPlainTokens : args.block_tokens;
  with_storage(dtype, vectors, [&]<class T, int kVec>() {
    RopeBackward<T> a{.q = {head_shape(args.kind, H, 0, Q), rows_of<const T>(args.d_q_out_THQ),
                            rows_of<const T>(args.q_THQ), static_cast<const T*>(args.q_gain.data),
                            rows_of<const float>(args.q_rstd), rows_of<T>(args.d_q_THQ),
                            rows_of<float>(args.d_q_gain_leaf_BN)},
                      .k = {head_shape(args.kind, G, H, Q), rows_of<const T>(args.d_k_out_TGQ),
                            rows_of<const T>(args.k_TGQ), static_cast<const T*>(args.k_gain.data),
                            rows_of<const float>(args.k_rstd), rows_of<T>(args.d_k_TGQ),
                            rows_of<float>(args.d_k_gain_leaf_BN)},
                      .angles = angles_of<T>(args),
                      .T_count = T_count,
                      .block_tokens = block_tokens,
                      .Q = static_cast<int>(Q),
                      .lanes = 0};
    with_heads<kVec>("qk_norm_rope_backward", args.kind, H + G, Q / 2,
                     [&]<int kPer, QkNormKind kKind>(BlockShape shape) {
                       a.lanes = shape.lanes;
                       launch("qk_norm_rope_backward",
                              qk_norm_rope_backward_kernel<T, kVec, kPer, kKind>,
                              {.blocks = blocks_for(T_count, block_tokens),
                               .threads = shape.threads,
                               .shared_bytes = backward_bytes<kVec, kPer>(shape, (H + G) * Q)},
                              stream, a);
                     });
  });
}

}  // namespace cambium::cuda
