// Attention without tensor cores, for fp32 storage and for head dims that TMA cannot carry: one
// warp a row, fp32 throughout, and the GPU's own oracle of the fast kernels.
//
// Scores: a lane holds one of 32 keys (or queries) and walks the columns; outputs: a lane holds
// columns lane, lane + 32, ... and walks the 32 probabilities. Blocks of 32 keys begin at the row's
// first key, those of queries end at multiples of 32; sums run in position order, dK and dV over
// the group's heads within a block, whatever else is in the batch.
// Napkin: 2 T S H Q FMAs through L1, a few TFLOP/s; small models and tests only.
#pragma once

#include "kernels/attention_tiles.cuh"

namespace cambium::cuda {

constexpr int kPlainWarps = 4;
constexpr int kPlainSlots = 8;  // columns of a lane
constexpr int kPlainColumns = kPlainSlots * kWarpLanes;

// One [T][heads][Q] tensor.
template <class T>
struct PlainTensor {
  T* data;
  int64_t stride;
  __device__ T* row(int64_t token, int64_t head, int Q) const {
    return data + token * stride + head * Q;
  }
};
template <class T>
PlainTensor<T> plain_tensor(const RawView& view) {
  return {static_cast<T*>(view.data), view.row_stride};
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ void store_as(float* to, float value) { *to = value; }
__device__ __forceinline__ void store_as(__nv_bfloat16* to, float value) {
  *to = __float2bfloat16(value);
}

template <class T, class Shape>
struct PlainArgs {
  Shape shape;
  PlainTensor<const T> q, k, v, o, d_o;
  PlainTensor<std::conditional_t<Shape::kIsPart, float, T>> o_out, d_q;  // or their sums
  PlainTensor<std::conditional_t<Shape::kIsShared, float, T>> d_k, d_v;  // or their sums
  float* lse_out;
  const float* lse;
  int64_t lse_stride;
  float* delta;
  int64_t delta_stride;
};

template <class T>
__device__ __forceinline__ float plain_dot(const T* a, const T* b, int Q) {
  float sum = 0.0f;
  for (int d = 0; d < Q; ++d) sum = fmaf(to_float(a[d]), to_float(b[d]), sum);
  return sum;
}

// acc[slot] += sum over lanes i < count, in order, of weight(lane i) * row(i)[lane + 32 slot]
template <class T, class Row>
__device__ __forceinline__ void plain_accumulate(float (&acc)[kPlainSlots], float weight, int count,
                                                 int Q, Row&& row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  for (int i = 0; i < count; ++i) {
    const float w = __shfl_sync(kAllLanes, weight, i);
    const T* from = row(i);
#pragma unroll
    for (int slot = 0; slot < kPlainSlots; ++slot) {
      const int d = lane + slot * kWarpLanes;
      if (d < Q) acc[slot] = fmaf(w, to_float(from[d]), acc[slot]);
    }
  }
}

__device__ __forceinline__ void plain_load(const float* from, float (&acc)[kPlainSlots], int Q) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
#pragma unroll
  for (int slot = 0; slot < kPlainSlots; ++slot) {
    const int d = lane + slot * kWarpLanes;
    if (d < Q) acc[slot] = from[d];
  }
}

__device__ __forceinline__ void plain_add(const float* from, float (&acc)[kPlainSlots],
                                          float factor, int Q) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
#pragma unroll
  for (int slot = 0; slot < kPlainSlots; ++slot) {
    const int d = lane + slot * kWarpLanes;
    if (d < Q) acc[slot] = fmaf(from[d], factor, acc[slot]);
  }
}

template <class T>
__device__ __forceinline__ void plain_store(T* to, const float (&acc)[kPlainSlots], float factor,
                                            int Q) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
#pragma unroll
  for (int slot = 0; slot < kPlainSlots; ++slot) {
    const int d = lane + slot * kWarpLanes;
    if (d < Q) store_as(to + d, acc[slot] * factor);
  }
}

// The row of this warp: a token of sequences of `length` rows and one of `heads` heads; false past
// the end.
struct PlainRow {
  int64_t token;
  int sequence, row, head;
};
__device__ __forceinline__ bool plain_row(int sequences, int length, int heads, PlainRow& row) {
  const int64_t index = int64_t{blockIdx.x} * kPlainWarps + threadIdx.x / kWarpLanes;
  row.token = index / heads;
  row.head = static_cast<int>(index % heads);
  row.sequence = static_cast<int>(row.token / length);
  row.row = static_cast<int>(row.token % length);
  return row.token < int64_t{sequences} * length;
}
template <class Shape>
__device__ __forceinline__ bool plain_query(const Shape& shape, PlainRow& row) {
  if (!plain_row(shape.sequences, shape.end_query() - shape.first_query(), shape.H, row)) {
    return false;
  }
  row.row += shape.first_query();
  row.token = int64_t{row.sequence} * shape.query_length() + row.row;
  return true;
}

template <class T, class Shape>
__global__ void __launch_bounds__(kPlainWarps* kWarpLanes)
    attention_plain_kernel(const PlainArgs<T, Shape> a) {
  const Shape& shape = a.shape;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes, Q = shape.Q;
  PlainRow row;
  if (!plain_query(shape, row)) return;
  const int group = row.head / shape.heads();
  const T* q = a.q.row(row.token, row.head, Q);
  float largest = -INFINITY, sum = 0.0f, o[kPlainSlots] = {};
  const int last = shape.last_key(row.row);
  for (int first = shape.first_key(row.sequence, row.row); first <= last; first += kWarpLanes) {
    const int count = min(kWarpLanes, last + 1 - first);
    const int64_t token = int64_t{row.sequence} * shape.S + first;
    const float score =
        lane < count ? shape.scale * plain_dot(q, a.k.row(token + lane, group, Q), Q) : -INFINITY;
    const float before = largest;
    largest = fmaxf(largest, warp_max(score));
    const float rescale = expf(before - largest), prob = expf(score - largest);
    sum = sum * rescale + warp_sum(prob);
    for (float& value : o) value *= rescale;
    plain_accumulate<T>(o, prob, count, Q, [&](int i) { return a.v.row(token + i, group, Q); });
  }
  auto* to = a.o_out.row(row.token, row.head, Q);
  float* lse = a.lse_out + row.token * a.lse_stride + row.head;
  if constexpr (Shape::kIsPart) {
    const float part = sum > 0.0f ? largest + logf(sum) : -INFINITY;
    const MergedLse merged(shape.adds ? *lse : -INFINITY, part);
    __syncwarp();  // every lane has read what one of them writes
    if (sum > 0.0f) {
      for (float& value : o) value *= merged.part / sum;
    }
    if (shape.adds) plain_add(to, o, merged.before, Q);
    plain_store(to, o, 1.0f, Q);
    if (lane == 0) *lse = merged.lse;
  } else {
    for (float& value : o) value /= sum;
    plain_store(to, o, 1.0f, Q);
    if (lane == 0) *lse = largest + logf(sum);
  }
}

template <class T, class Shape>
__global__ void __launch_bounds__(kPlainWarps* kWarpLanes)
    attention_plain_delta_kernel(const PlainArgs<T, Shape> a) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes, Q = a.shape.Q;
  PlainRow row;
  if (!plain_query(a.shape, row)) return;
  const T* o = a.o.row(row.token, row.head, Q);
  const T* d_o = a.d_o.row(row.token, row.head, Q);
  float sum = 0.0f;
  for (int d = lane; d < Q; d += kWarpLanes) sum = fmaf(to_float(o[d]), to_float(d_o[d]), sum);
  sum = warp_sum(sum);
  if (lane == 0) a.delta[row.token * a.delta_stride + row.head] = sum;
}

// The probability and the score's gradient of one (query, key); both rows exist.
struct PlainPair {
  float prob = 0.0f, d_score = 0.0f;
};
template <class T, class Shape>
__device__ __forceinline__ PlainPair plain_pair(const PlainArgs<T, Shape>& a, int64_t query,
                                                int head, int64_t key, int group) {
  const int Q = a.shape.Q;
  const float score = a.shape.scale * plain_dot(a.q.row(query, head, Q), a.k.row(key, group, Q), Q);
  PlainPair pair;
  pair.prob = expf(score - a.lse[query * a.lse_stride + head]);
  const float d_prob = plain_dot(a.d_o.row(query, head, Q), a.v.row(key, group, Q), Q);
  pair.d_score = pair.prob * (d_prob - a.delta[query * a.delta_stride + head]) * a.shape.scale;
  return pair;
}

template <class T, class Shape>
__global__ void __launch_bounds__(kPlainWarps* kWarpLanes)
    attention_plain_query_gradient_kernel(const PlainArgs<T, Shape> a) {
  const Shape& shape = a.shape;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes, Q = shape.Q;
  PlainRow row;
  if (!plain_query(shape, row)) return;
  const int group = row.head / shape.heads();
  float d_q[kPlainSlots] = {};
  const int last = shape.last_key(row.row);
  for (int first = shape.first_key(row.sequence, row.row); first <= last; first += kWarpLanes) {
    const int count = min(kWarpLanes, last + 1 - first);
    const int64_t token = int64_t{row.sequence} * shape.S + first;
    PlainPair pair;
    if (lane < count) pair = plain_pair(a, row.token, row.head, token + lane, group);
    plain_accumulate<T>(d_q, pair.d_score, count, Q,
                        [&](int i) { return a.k.row(token + i, group, Q); });
  }
  auto* to = a.d_q.row(row.token, row.head, Q);
  if constexpr (Shape::kIsPart) {
    if (shape.adds) plain_add(to, d_q, 1.0f, Q);
  }
  plain_store(to, d_q, 1.0f, Q);
}

template <class T, class Shape>
__global__ void __launch_bounds__(kPlainWarps* kWarpLanes)
    attention_plain_key_gradient_kernel(const PlainArgs<T, Shape> a) {
  const Shape& shape = a.shape;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes, Q = shape.Q;
  PlainRow row;
  if (!plain_row(shape.sequences, shape.S, shape.G, row)) return;
  const int position = row.row, length = shape.query_length(), end = shape.end_query();
  float d_k[kPlainSlots] = {}, d_v[kPlainSlots] = {};
  int64_t to = row.token;
  if constexpr (Shape::kIsShared) {
    to = shape.sum_row(row.sequence, position);
    if (shape.is_chain()) {
      plain_load(a.d_k.row(to, row.head, Q), d_k, Q);
      plain_load(a.d_v.row(to, row.head, Q), d_v, Q);
    }
  }
  int first = max(shape.first_row(position), shape.first_query()), count = 0;
  for (; first < end; first += count) {
    count = min(kWarpLanes - first % kWarpLanes, end - first);
    const bool sees = lane < count && shape.first_key(row.sequence, first + lane) <= position;
    if (__ballot_sync(kAllLanes, sees) == 0) break;  // later queries are of later documents
    const int64_t token = int64_t{row.sequence} * length + first;
    for (int i = 0; i < shape.heads(); ++i) {
      const int head = row.head * shape.heads() + i;
      PlainPair pair;
      if (sees) pair = plain_pair(a, token + lane, head, row.token, row.head);
      plain_accumulate<T>(d_k, pair.d_score, count, Q,
                          [&](int j) { return a.q.row(token + j, head, Q); });
      plain_accumulate<T>(d_v, pair.prob, count, Q,
                          [&](int j) { return a.d_o.row(token + j, head, Q); });
    }
  }
  plain_store(a.d_k.row(to, row.head, Q), d_k, 1.0f, Q);
  plain_store(a.d_v.row(to, row.head, Q), d_v, 1.0f, Q);
}

}  // namespace cambium::cuda
