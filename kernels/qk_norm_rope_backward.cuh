// The backward kernel of qk_norm_rope: see kernels/qk_norm_rope.cu.
#pragma once

#include "kernels/qk_norm_rope_forward.cuh"

namespace cambium::cuda {

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

}  // namespace cambium::cuda
