// The forward kernel of qk_norm_rope, and what it shares with the backward one: see
// kernels/qk_norm_rope.cu.
#pragma once

#include "kernels/cuda_launch.cuh"
#include "kernels/qk_norm_rope.h"

namespace cambium::cuda {

constexpr int kMaxThreads = 1024;
constexpr int kMaxPer = 4;  // vectors of a half that a lane may hold

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
  int Q, lanes = 0;  // lanes of a head
  int q_warps = 0;   // of a block; the others have keys
  float epsilon = 0;
  float direction = 1;  // of the angle without a norm, 1 or -1
};

// Offset of the head's gain: the heads share one, or have their own.
template <QkNormKind kKind>
__device__ __forceinline__ int64_t gain_offset(int own_head, int Q) {
  return kKind == QkNormKind::full_width ? int64_t{own_head} * Q : 0;
}

// Passes of a warp over its heads of a token.
template <int kPer>
inline constexpr int kPassesOf = kPer == 1 ? 3 : 1;
// Threads of a forward block: 96 registers each where a lane holds one vector.
constexpr int forward_threads(int per) { return per == 1 ? 640 : kMaxThreads; }

// A forward warp's heads of the queries or keys: `step` in a pass, of which this lane has one.
struct PassHeads {
  int head, step, lane;  // the lane's head in the first pass, its place in each head
  int heads;

  __device__ __forceinline__ PassHeads(int first, int heads_count, int lanes)
      : head(first + static_cast<int>(threadIdx.x) % kWarpLanes / lanes),
        step(kWarpLanes / lanes),
        lane(static_cast<int>(threadIdx.x) & (lanes - 1)),
        heads(heads_count) {}
  __device__ __forceinline__ bool is_there(int pass) const { return head + pass * step < heads; }
};

// Both halves of a lane's vectors of one head, as stored.
template <class T, int kVec, int kPer>
struct HalfVectors {
  Packed<T, kVec> part[kPer][2] = {};

  __device__ __forceinline__ void load(int i, const T* from, int half) {
    part[i][0] = load_packed<T, kVec>(from);
    part[i][1] = load_packed<T, kVec>(from + half);
  }
};

// The squares of a lane's elements in each pass, summed over the head's lanes.
template <int kPasses>
__device__ __forceinline__ void sum_heads(int lanes, float (&squares)[kPasses]) {
  for (int step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
    for (float& sum : squares) sum += __shfl_xor_sync(kAllLanes, sum, step);
  }
}

// Heads' sums of squares to their rstds: a head's lanes share the passes.
template <int kPasses, class T>
__device__ __forceinline__ void head_rstds(const RopeForward<T>& a, const HeadForward<T>& h,
                                           const PassHeads& place, float (&values)[kPasses]) {
  for (int begin = 0; begin < kPasses; begin += a.lanes) {
    const int own = begin + place.lane;
    float sum = 0.0f;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) sum = pass == own ? values[pass] : sum;
    const float rstd = 1.0f / sqrtf(sum / h.shape.width + a.epsilon);
    if (own < kPasses && place.is_there(own)) {
      h.rstd.row(blockIdx.x)[place.head + own * place.step] = rstd;
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const float shared = __shfl_sync(kAllLanes, rstd, pass - begin, a.lanes);
      if (pass >= begin && pass < begin + a.lanes) values[pass] = shared;
    }
  }
}

// The same where one rstd belongs to all heads; `by_head` holds a float each.
template <int kPasses, class T>
__device__ __forceinline__ void full_rstd(const RopeForward<T>& a, const HeadForward<T>& h,
                                          const PassHeads& place, float* by_head,
                                          float (&values)[kPasses]) {
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    if (place.lane > 0 || !place.is_there(pass)) continue;
    by_head[h.shape.first + place.head + pass * place.step] = values[pass];
  }
  __syncthreads();
  float sum = 0.0f;
  for (int head = 0; head < h.shape.heads; ++head) sum += by_head[h.shape.first + head];
  const float rstd = 1.0f / sqrtf(sum / h.shape.width + a.epsilon);
  if (place.lane == 0 && place.head == 0) *h.rstd.row(blockIdx.x) = rstd;
#pragma unroll
  for (float& value : values) value = rstd;
}

// out = n of one vector, both halves, turned by the token's angle.
template <int kVec>
__device__ __forceinline__ void turn(const float (&n)[2][kVec], const float (&cos)[kVec],
                                     const float (&sin)[kVec], float (&out)[2][kVec]) {
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    out[0][j] = n[0][j] * cos[j] - n[1][j] * sin[j];
    out[1][j] = n[1][j] * cos[j] + n[0][j] * sin[j];
  }
}

// Forward, full width: sums by head. Backward: the queue, then a leaf's gradients by warp.
extern __shared__ uint4 queue[];

// Lanes without a head or a vector load and store nothing; what they hold is zeros or unused.
template <class T, int kVec, int kPer, QkNormKind kKind>
__global__ void __launch_bounds__(forward_threads(kPer))
    qk_norm_rope_kernel(const RopeForward<T> a) {
  constexpr int kPasses = kPassesOf<kPer>;
  const int64_t t = blockIdx.x;
  const int warp = threadIdx.x / kWarpLanes, half = a.Q / 2;
  const bool is_query = warp < a.q_warps;
  const HeadForward<T>& h = is_query ? a.q : a.k;
  const int passes_before = (is_query ? warp : warp - a.q_warps) * kPasses;
  const PassHeads place(passes_before * (kWarpLanes / a.lanes), h.shape.heads, a.lanes);
  const auto column_of = [&](int i) { return (i * a.lanes + place.lane) * kVec; };
  const int pass_stride = place.step * a.Q;
  HalfVectors<T, kVec, kPer> x[kPasses], gain;
  const T* const x_row = h.x.row(t) + place.head * a.Q;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (!place.is_there(pass) || column_of(i) >= half) continue;
      x[pass].load(i, x_row + pass * pass_stride + column_of(i), half);
    }
  }
  const int64_t angle = a.angles.row_of(t);
  float cos[kPer][kVec] = {}, sin[kPer][kVec] = {}, rstd[kPasses] = {}, n[2][kVec], out[2][kVec];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    if (column_of(i) >= half) continue;
    load_floats<kVec>(a.angles.cos_SC.row(angle) + column_of(i), cos[i]);
    load_floats<kVec>(a.angles.sin_SC.row(angle) + column_of(i), sin[i]);
    if constexpr (kKind == QkNormKind::none) {
#pragma unroll
      for (float& value : sin[i]) value *= a.direction;
    }
  }
  if constexpr (kKind != QkNormKind::none) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        unpack(x[pass].part[i][0], n[0]), unpack(x[pass].part[i][1], n[1]);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          rstd[pass] = fmaf(n[0][j], n[0][j], fmaf(n[1][j], n[1][j], rstd[pass]));
        }
      }
    }
    sum_heads(a.lanes, rstd);
    if constexpr (kKind == QkNormKind::per_head) {
      head_rstds(a, h, place, rstd);
    } else {
      full_rstd(a, h, place, reinterpret_cast<float*>(queue), rstd);
    }
  }
  T* const out_row = h.out.row(t) + place.head * a.Q;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    if (!place.is_there(pass)) break;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int at = pass * pass_stride + column_of(i);
      if (column_of(i) >= half) continue;
      if constexpr (kKind != QkNormKind::none) {
        const int64_t head_gain = gain_offset<kKind>(place.head + pass * place.step, a.Q);
        gain.load(i, h.gain + head_gain + column_of(i), half);
      }
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        unpack(x[pass].part[i][part], n[part]);
        if constexpr (kKind != QkNormKind::none) {
          float scale[kVec];
          unpack(gain.part[i][part], scale);
#pragma unroll
          for (int j = 0; j < kVec; ++j) n[part][j] = scale[j] * (n[part][j] * rstd[pass]);
        }
      }
      turn<kVec>(n, cos[i], sin[i], out);
      store_values<T, kVec>(out_row + at, out[0]);
      store_values<T, kVec>(out_row + at + half, out[1]);
    }
  }
}

}  // namespace cambium::cuda
