// The backward kernels of qk_norm_rope, with a norm: see kernels/qk_norm_rope.cu.
#pragma once

#include "kernels/qk_norm_rope_forward.cuh"

namespace cambium::cuda {

constexpr int kStages = 4;        // of a queue: the one worked on and the next; a power of two
constexpr int kStageVectors = 4;  // a lane's: both halves of d_out and of x
constexpr int kLeafWarps = 4, kLeafThreads = kLeafWarps * kWarpLanes;  // per_head

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
  int64_t T_count, block_tokens, leaves;
  int Q, lanes = 0;
};

// Threads of a block with all heads: 128 registers each where a lane holds one vector.
constexpr int full_threads(int per) { return per == 1 ? kMaxThreads / 2 : kMaxThreads; }

// A lane of a head of the queries or keys. Lanes of no head take part in shuffles only.
struct HeadLane {
  int head, lane;
  bool is_there;

  // Column of vector `i` in a half; `half` or more where there is none.
  template <int kVec>
  __device__ __forceinline__ int column(int i, int lanes) const {
    return is_there ? (i * lanes + lane) * kVec : INT_MAX;
  }
};

// Whether rows wait in shared memory instead of in registers: where a lane holds one vector.
template <int kVec, int kPer>
inline constexpr bool kIsQueued = kVec > 1 && kPer == 1;

// What a lane reads of one head in the backward pass, the rows as stored.
template <class T, int kVec, int kPer>
struct HeadLoads {
  Packed<T, kVec> d_out[kPer][2], x[kPer][2];
};

// `d_out` and `x` are a head's, at the lane's first column.
template <class T, int kVec, int kPer>
__device__ __forceinline__ void load_head(const T* d_out, const T* x, const HeadLane& place,
                                          int half, int lanes, HeadLoads<T, kVec, kPer>& loads) {
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    if (place.column<kVec>(i, lanes) >= half) continue;
    const int at = i * lanes * kVec;
    loads.d_out[i][0] = load_packed<T, kVec>(d_out + at);
    loads.d_out[i][1] = load_packed<T, kVec>(d_out + half + at);
    loads.x[i][0] = load_packed<T, kVec>(x + at);
    loads.x[i][1] = load_packed<T, kVec>(x + half + at);
  }
}

// The same by way of this thread's place in a stage, of `threads`: each reads what it copied
// itself, so no barrier is needed. One group a head.
__device__ __forceinline__ uint4* stage_of(int64_t number, int threads) {
  const int stage = static_cast<int>(number) & (kStages - 1);
  return queue + stage * kStageVectors * threads + threadIdx.x;
}
template <class T>
__device__ __forceinline__ void copy_head(const T* d_out, const T* x, int half, uint4* stage,
                                          int threads) {
  copy_async(stage, d_out);
  copy_async(stage + threads, d_out + half);
  copy_async(stage + 2 * threads, x);
  copy_async(stage + 3 * threads, x + half);
}
template <class T, int kVec>
__device__ __forceinline__ void finish_head(const uint4* stage, int threads,
                                            HeadLoads<T, kVec, 1>& loads) {
  wait_copy_groups<kStages - 1>();
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    *reinterpret_cast<uint4*>(&loads.d_out[0][part]) = stage[part * threads];
    *reinterpret_cast<uint4*>(&loads.x[0][part]) = stage[(2 + part) * threads];
  }
}

// A lane's columns of a token's angle, and of the gains of its head.
template <int kVec, int kPer>
struct AngleVectors {
  float cos[kPer][kVec], sin[kPer][kVec];

  template <class T>
  __device__ __forceinline__ void load(const Angles<T>& angles, int64_t row, const HeadLane& place,
                                       int half, int lanes) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int column = place.column<kVec>(i, lanes);
      if (column >= half) continue;
      load_floats<kVec>(angles.cos_SC.row(row) + column, cos[i]);
      load_floats<kVec>(angles.sin_SC.row(row) + column, sin[i]);
    }
  }
};
template <class T, int kVec, int kPer>
__device__ __forceinline__ void load_gains(const T* gain, const HeadLane& place, int half,
                                           int lanes, Packed<T, kVec> (&gains)[kPer][2]) {
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int column = place.column<kVec>(i, lanes);
    if (column >= half) continue;
    gains[i][0] = load_packed<T, kVec>(gain + column);
    gains[i][1] = load_packed<T, kVec>(gain + half + column);
  }
}

// d_n = the rows of d_out turned back by the token's angle; returns this lane's part of the sum
// of gain d_n x.
template <class T, int kVec, int kPer>
__device__ __forceinline__ float turn_back(const HeadLane& place, int half, int lanes,
                                           const AngleVectors<kVec, kPer>& angle,
                                           const HeadLoads<T, kVec, kPer>& loads,
                                           const Packed<T, kVec> (&gains)[kPer][2],
                                           float (&d_n)[kPer][2][kVec]) {
  float first[kVec], second[kVec], gain[kVec], x[kVec], along = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    if (place.column<kVec>(i, lanes) >= half) continue;
    const float(&cos)[kVec] = angle.cos[i], (&sin)[kVec] = angle.sin[i];
    unpack(loads.d_out[i][0], first), unpack(loads.d_out[i][1], second);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      d_n[i][0][j] = first[j] * cos[j] + second[j] * sin[j];
      d_n[i][1][j] = second[j] * cos[j] - first[j] * sin[j];
    }
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      unpack(gains[i][part], gain), unpack(loads.x[i][part], x);
#pragma unroll
      for (int j = 0; j < kVec; ++j) along = fmaf(gain[j] * d_n[i][part][j], x[j], along);
    }
  }
  return along;
}

// d_x of a head from d_n and `mean`, the norm group's mean of gain d_n x, times rstd; adds to
// d_gain.
template <class T, int kVec, int kPer>
__device__ __forceinline__ void finish_gradient(T* d_x, const HeadLane& place, int half, int lanes,
                                                float rstd, float mean,
                                                const HeadLoads<T, kVec, kPer>& loads,
                                                const Packed<T, kVec> (&gains)[kPer][2],
                                                float (&d_n)[kPer][2][kVec],
                                                float (&d_gain)[kPer][2][kVec]) {
  float gain[kVec], x[kVec];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int column = place.column<kVec>(i, lanes);
    if (column >= half) continue;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      float(&d)[kVec] = d_n[i][part];
      unpack(gains[i][part], gain), unpack(loads.x[i][part], x);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const float n = x[j] * rstd;
        d_gain[i][part][j] = fmaf(d[j], n, d_gain[i][part][j]);
        d[j] = rstd * fmaf(-n, mean, gain[j] * d[j]);
      }
      store_values<T, kVec>(d_x + part * half + column, d);
    }
  }
}

__device__ __forceinline__ float sum_lanes(float value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  return value;
}

// What a warp reads of a leaf, pass by pass: this lane's head `head` of token `t`, from its first
// column on. In a pass a warp has `step` heads, of which the lane's is number `own`.
template <class T>
struct LeafReader {
  const HeadBackward<T>& h;
  int own, step, Q, column;
  int64_t t;
  int head = 0;
  const T *d_out = nullptr, *x = nullptr;

  __device__ __forceinline__ void begin_token() {
    head = own;
    d_out = h.d_out.row(t) + own * Q + column;
    x = h.x.row(t) + own * Q + column;
  }
  __device__ __forceinline__ void advance() {
    head += step, d_out += step * Q, x += step * Q;
    if (head - own < h.shape.heads) return;
    t += kLeafWarps;
    begin_token();
  }
};

// The leaf's gain gradient from the lanes' sums: over the heads of a pass, then over warps.
template <class T, int kVec, int kPer>
__device__ __forceinline__ void store_head_gain(const HeadBackward<T>& h, int64_t leaf, int Q,
                                                int lanes, float (&d_gain)[kPer][2][kVec]) {
  float* by_warp = reinterpret_cast<float*>(queue);  // [kLeafWarps, Q]
  const int warp = threadIdx.x / kWarpLanes, in_warp = threadIdx.x % kWarpLanes;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int column = (i * lanes + in_warp % lanes) * kVec;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        float sum = d_gain[i][part][j];
        for (int step = lanes; step < kWarpLanes; step *= 2) {
          sum += __shfl_xor_sync(kAllLanes, sum, step);
        }
        if (in_warp >= lanes || column >= Q / 2) continue;
        by_warp[warp * Q + part * (Q / 2) + column + j] = sum;
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < Q; i += kLeafThreads) {
    float sum = by_warp[i];
#pragma unroll
    for (int w = 1; w < kLeafWarps; ++w) sum += by_warp[w * Q + i];
    h.d_gain_leaf.row(leaf)[i] = sum;
  }
}

// d_x of a leaf's queries or keys, and its gain gradient.
template <class T, int kVec, int kPer>
__device__ __forceinline__ void leaf_gradients(const RopeBackward<T>& a, const HeadBackward<T>& h,
                                               int64_t leaf) {
  const int64_t begin = leaf * a.block_tokens, end = min(a.T_count, begin + a.block_tokens);
  const int half = a.Q / 2, heads = h.shape.heads, step = kWarpLanes / a.lanes;
  const int in_warp = threadIdx.x % kWarpLanes, lane = in_warp & (a.lanes - 1);
  const int own = in_warp / a.lanes, column = lane * kVec;
  const auto place_of = [&](int head) { return HeadLane{head, lane, head < heads}; };
  const auto rstd_of = [&](int64_t t, int head) {
    return t < end && head < heads ? h.rstd.row(t)[head] : 1.0f;
  };
  int64_t t = begin + threadIdx.x / kWarpLanes;
  LeafReader<T> ahead{h, own, step, a.Q, column, t};
  ahead.begin_token();
  const auto start = [&](int64_t n) {
    if (ahead.t < end && ahead.head < heads && column < half) {
      copy_head(ahead.d_out, ahead.x, half, stage_of(n, kLeafThreads), kLeafThreads);
    }
    end_copy_group();
    ahead.advance();
  };
  int n = 0;  // passes begun
  for (; n < kStages - 1 && kIsQueued<kVec, kPer>; ++n) start(n);
  Packed<T, kVec> gains[kPer][2];
  load_gains(h.gain, place_of(own), half, a.lanes, gains);
  float d_gain[kPer][2][kVec] = {}, d_n[kPer][2][kVec], rstd = rstd_of(t, own);
  AngleVectors<kVec, kPer> angle;
  HeadLoads<T, kVec, kPer> loads;
  for (int64_t row = t < end ? a.angles.row_of(t) : 0; t < end; t += kLeafWarps) {
    angle.load(a.angles, row, place_of(own), half, a.lanes);
    if (t + kLeafWarps < end) row = a.angles.row_of(t + kLeafWarps);
    T* d_x = h.d_x.row(t) + own * a.Q;
    for (int head = own; head - own < heads; head += step, d_x += step * a.Q, ++n) {
      const bool is_last = head + step - own >= heads;
      const float next_rstd = is_last ? rstd_of(t + kLeafWarps, own) : rstd_of(t, head + step);
      const HeadLane place = place_of(head);
      if constexpr (kIsQueued<kVec, kPer>) {
        start(n);
        finish_head<T, kVec>(stage_of(n + 1, kLeafThreads), kLeafThreads, loads);
      } else {
        load_head<T, kVec, kPer>(ahead.d_out, ahead.x, place, half, a.lanes, loads);
        ahead.advance();
      }
      const float own_part = turn_back(place, half, a.lanes, angle, loads, gains, d_n);
      const float mean = sum_lanes(own_part, a.lanes) * rstd / h.shape.width;
      finish_gradient(d_x, place, half, a.lanes, rstd, mean, loads, gains, d_n, d_gain);
      rstd = next_rstd;
    }
  }
  wait_copy_groups<0>();
  __syncthreads();  // store_head_gain takes the queue's memory
  store_head_gain(h, leaf, a.Q, a.lanes, d_gain);
}

// per_head: blocks of all leaves' queries, then of their keys.
template <class T, int kVec, int kPer>
__global__ void __launch_bounds__(kLeafThreads, kPer == 1 ? 4 : 1)
    head_backward_kernel(const RopeBackward<T> a) {
  if (blockIdx.x < a.leaves) {
    leaf_gradients<T, kVec, kPer>(a, a.q, blockIdx.x);
  } else {
    leaf_gradients<T, kVec, kPer>(a, a.k, blockIdx.x - a.leaves);
  }
}

// full_width: a block per leaf, all heads of a token at once.
template <class T, int kVec, int kPer>
__global__ void __launch_bounds__(full_threads(kPer))
    full_backward_kernel(const RopeBackward<T> a) {
  __shared__ float by_head[2][kMaxThreads];
  const int among = threadIdx.x / a.lanes;  // queries, then keys
  const bool is_query = among < a.q.shape.heads;
  const HeadBackward<T>& h = is_query ? a.q : a.k;
  const int half = a.Q / 2;
  const HeadLane place{among - h.shape.first, static_cast<int>(threadIdx.x) & (a.lanes - 1),
                       among - h.shape.first < h.shape.heads};
  const int64_t begin = int64_t{blockIdx.x} * a.block_tokens;
  const int64_t end = min(a.T_count, begin + a.block_tokens);
  const auto load_rstd = [&](int64_t t) { return place.is_there ? *h.rstd.row(t) : 1.0f; };
  Packed<T, kVec> gains[kPer][2];
  float d_gain[kPer][2][kVec] = {}, d_n[kPer][2][kVec];
  if (place.is_there) load_gains(h.gain + place.head * a.Q, place, half, a.lanes, gains);
  const int threads = blockDim.x, first = place.head * a.Q + place.lane * kVec;
  const auto start = [&](int64_t t) {
    if (t < end && place.column<kVec>(0, a.lanes) < half) {
      copy_head(h.d_out.row(t) + first, h.x.row(t) + first, half, stage_of(t, threads), threads);
    }
    end_copy_group();
  };
  for (int64_t t = begin; t < begin + kStages - 1 && kIsQueued<kVec, kPer>; ++t) start(t);
  int64_t angle_row = a.angles.row_of(begin), next_row = angle_row;
  float rstd = load_rstd(begin), next_rstd = rstd;
  AngleVectors<kVec, kPer> angle;
  HeadLoads<T, kVec, kPer> loads;
  for (int64_t t = begin; t < end; ++t, angle_row = next_row, rstd = next_rstd) {
    if (t + 1 < end) next_row = a.angles.row_of(t + 1), next_rstd = load_rstd(t + 1);
    angle.load(a.angles, angle_row, place, half, a.lanes);
    if constexpr (kIsQueued<kVec, kPer>) {
      start(t + kStages - 1);
      finish_head<T, kVec>(stage_of(t, threads), threads, loads);
    } else {
      load_head<T, kVec, kPer>(h.d_out.row(t) + first, h.x.row(t) + first, place, half, a.lanes,
                               loads);
    }
    const float own = sum_lanes(turn_back(place, half, a.lanes, angle, loads, gains, d_n), a.lanes);
    float* const sums = by_head[t & 1];  // one barrier between the uses of each
    if (place.is_there && place.lane == 0) sums[h.shape.first + place.head] = own;
    __syncthreads();
    float along = 0.0f;
    for (int head = 0; head < h.shape.heads; ++head) along += sums[h.shape.first + head];
    finish_gradient(h.d_x.row(t) + place.head * a.Q, place, half, a.lanes, rstd,
                    along * rstd / h.shape.width, loads, gains, d_n, d_gain);
  }
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int column = place.column<kVec>(i, a.lanes);
    if (column >= half) continue;
    float* to = h.d_gain_leaf.row(blockIdx.x) + place.head * a.Q + column;
#pragma unroll
    for (int j = 0; j < kVec; ++j) to[j] = d_gain[i][0][j], to[half + j] = d_gain[i][1][j];
  }
}

}  // namespace cambium::cuda
