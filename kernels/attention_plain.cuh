// Attention without tensor cores, for fp32 storage and for head dims that TMA cannot carry: one
// warp a row, fp32 throughout, and the GPU's own oracle of the fast kernels.
//
// Scores: a lane holds one of 32 keys (or queries) and walks the columns; outputs: a lane holds
// columns lane, lane + 32, ... and walks the 32 probabilities. Blocks of 32 begin at the row's own
// first key; sums run in position order, whatever else is in the batch.
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

template <class T>
struct PlainArgs {
  AttentionShape shape;
  PlainTensor<const T> q, k, v, o, d_o;
  PlainTensor<T> o_out, d_q, d_k, d_v;
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

// The row of this warp: a token and one of `heads` heads; false past the end.
struct PlainRow {
  int64_t token, sequence_row;
  int sequence, position, head;
};
__device__ __forceinline__ bool plain_row(const AttentionShape& shape, int heads, PlainRow& row) {
  const int64_t index = int64_t{blockIdx.x} * kPlainWarps + threadIdx.x / kWarpLanes;
  row.token = index / heads;
  row.head = static_cast<int>(index % heads);
  row.sequence = static_cast<int>(row.token / shape.S);
  row.position = static_cast<int>(row.token % shape.S);
  row.sequence_row = int64_t{row.sequence} * shape.S;
  return row.token < int64_t{shape.sequences} * shape.S;
}

template <class T>
__global__ void __launch_bounds__(kPlainWarps* kWarpLanes)
    attention_plain_kernel(const PlainArgs<T> a) {
  const AttentionShape& shape = a.shape;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes, Q = shape.Q;
  PlainRow row;
  if (!plain_row(shape, shape.H, row)) return;
  const int group = row.head / shape.heads();
  const T* q = a.q.row(row.token, row.head, Q);
  float largest = -INFINITY, sum = 0.0f, o[kPlainSlots] = {};
  for (int first = shape.first_key(row.sequence, row.position); first <= row.position;
       first += kWarpLanes) {
    const int count = min(kWarpLanes, row.position + 1 - first);
    const int64_t token = row.sequence_row + first;
    const float score =
        lane < count ? shape.scale * plain_dot(q, a.k.row(token + lane, group, Q), Q) : -INFINITY;
    const float before = largest;
    largest = fmaxf(largest, warp_max(score));
    const float rescale = expf(before - largest), prob = expf(score - largest);
    sum = sum * rescale + warp_sum(prob);
    for (float& value : o) value *= rescale;
    plain_accumulate<T>(o, prob, count, Q, [&](int i) { return a.v.row(token + i, group, Q); });
  }
  for (float& value : o) value /= sum;
  plain_store(a.o_out.row(row.token, row.head, Q), o, 1.0f, Q);
  if (lane == 0) a.lse_out[row.token * a.lse_stride + row.head] = largest + logf(sum);
}

template <class T>
__global__ void __launch_bounds__(kPlainWarps* kWarpLanes)
    attention_plain_delta_kernel(const PlainArgs<T> a) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes, Q = a.shape.Q;
  PlainRow row;
  if (!plain_row(a.shape, a.shape.H, row)) return;
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
template <class T>
__device__ __forceinline__ PlainPair plain_pair(const PlainArgs<T>& a, int64_t query, int head,
                                                int64_t key, int group) {
  const int Q = a.shape.Q;
  const float score = a.shape.scale * plain_dot(a.q.row(query, head, Q), a.k.row(key, group, Q), Q);
  PlainPair pair;
  pair.prob = expf(score - a.lse[query * a.lse_stride + head]);
  const float d_prob = plain_dot(a.d_o.row(query, head, Q), a.v.row(key, group, Q), Q);
  pair.d_score = pair.prob * (d_prob - a.delta[query * a.delta_stride + head]) * a.shape.scale;
  return pair;
}

template <class T>
__global__ void __launch_bounds__(kPlainWarps* kWarpLanes)
    attention_plain_query_gradient_kernel(const PlainArgs<T> a) {
  const AttentionShape& shape = a.shape;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes, Q = shape.Q;
  PlainRow row;
  if (!plain_row(shape, shape.H, row)) return;
  const int group = row.head / shape.heads();
  float d_q[kPlainSlots] = {};
  for (int first = shape.first_key(row.sequence, row.position); first <= row.position;
       first += kWarpLanes) {
    const int count = min(kWarpLanes, row.position + 1 - first);
    const int64_t token = row.sequence_row + first;
    PlainPair pair;
    if (lane < count) pair = plain_pair(a, row.token, row.head, token + lane, group);
    plain_accumulate<T>(d_q, pair.d_score, count, Q,
                        [&](int i) { return a.k.row(token + i, group, Q); });
  }
  plain_store(a.d_q.row(row.token, row.head, Q), d_q, 1.0f, Q);
}

template <class T>
__global__ void __launch_bounds__(kPlainWarps* kWarpLanes)
    attention_plain_key_gradient_kernel(const PlainArgs<T> a) {
  const AttentionShape& shape = a.shape;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes, Q = shape.Q;
  PlainRow row;
  if (!plain_row(shape, shape.G, row)) return;
  float d_k[kPlainSlots] = {}, d_v[kPlainSlots] = {};
  for (int i = 0; i < shape.heads(); ++i) {
    const int head = row.head * shape.heads() + i;
    for (int first = row.position; first < shape.S; first += kWarpLanes) {
      const int count = min(kWarpLanes, shape.S - first);
      const bool sees = lane < count && shape.first_key(row.sequence, first + lane) <= row.position;
      if (__ballot_sync(kAllLanes, sees) == 0) break;  // later queries are of later documents
      const int64_t token = row.sequence_row + first;
      PlainPair pair;
      if (sees) pair = plain_pair(a, token + lane, head, row.token, row.head);
      plain_accumulate<T>(d_k, pair.d_score, count, Q,
                          [&](int j) { return a.q.row(token + j, head, Q); });
      plain_accumulate<T>(d_v, pair.prob, count, Q,
                          [&](int j) { return a.d_o.row(token + j, head, Q); });
    }
  }
  plain_store(a.d_k.row(row.token, row.head, Q), d_k, 1.0f, Q);
  plain_store(a.d_v.row(row.token, row.head, Q), d_v, 1.0f, Q);
}

}  // namespace cambium::cuda
