// Backward pass on tensor cores, without atomics: one kernel for dQ, one for dK and dV.
//
// Both compute S and dP again (7 products for the 5 of a fused kernel): every sum has one owner
// that adds in a fixed order, nothing waits for another block, no gradient is staged in fp32
// through memory, and dS stays in registers as the next product's operand.
//   dQ: 128 queries of a head against its key tiles in position order.
//   dK, dV: 128 keys of a group against (query tile of 64, head of the group), scores transposed:
//     S^T = K Q^T, dP^T = V dO^T, so that P^T and dS^T are register operands of dV += P^T dO and
//     dK += dS^T Q. Where heads of a group are even in number, two blocks of a cluster take half
//     of them each and add their sums through shared memory: twice as many blocks of half the
//     length keep the GPU busy in small batches too. A chain (exact mode) is one block's, which
//     goes on from the sums of a call for earlier queries and leaves its own unscaled, so that
//     where the chain is cut changes no bit.
// P and dS are rounded to bf16 as operands; everything else is fp32. `delta` = d_o . o per row.
// Napkin at Q = 128: a step of 128 x 128 takes 3,072 (dQ) and 4,096 (dK, dV) cycles of tensor
// cores beside 1,024 of exp2 each.
#pragma once

#include "kernels/attention_forward.cuh"

namespace cambium::cuda {

constexpr int kBackwardStages = 2;
constexpr int kStepRows = 64;  // queries of a step of dK, dV

struct BackwardMaps {
  CUtensorMap q, d_o, k, v;   // boxes of 128 rows; q and d_o of 64 for dK, dV
  CUtensorMap d_q, d_k, d_v;  // boxes of 64 rows
};

template <class Shape>
struct BackwardArgs {
  Shape shape;
  const float* lse;
  int64_t lse_stride;
  const float* delta;
  int64_t delta_stride;
  float *d_k_sum, *d_v_sum;  // of shared sequences: the sums, or the chain so far
  int64_t d_k_stride, d_v_stride;
  float* d_q_sum;  // of a part
  int64_t d_q_sum_stride;
};

// A warpgroup's 64 rows from `staging` into `map`; the caller has written them.
template <int kColumns>
__device__ __forceinline__ void store_rows(const CUtensorMap* map, const char* staging,
                                           int panel_bytes, TileAt at) {
  for (int panel = 0; panel < kColumns / kPanelColumns; ++panel) {
    tma_store(map, staging + panel * panel_bytes,
              {panel * kPanelColumns, at.head, at.position, at.sequence});
  }
  commit_stores();
}

constexpr int kDeltaThreads = 256;
constexpr int kDeltaLanes = 16;  // of one row, 8 columns each at a time

struct DeltaArgs {
  const __nv_bfloat16 *o, *d_o;
  int64_t o_stride, d_o_stride, rows;  // rows: tokens * heads
  int H, Q;
  float* delta;
  int64_t delta_stride;
};

__global__ void __launch_bounds__(kDeltaThreads) attention_delta_kernel(const DeltaArgs a) {
  const int64_t row = (int64_t{blockIdx.x} * kDeltaThreads + threadIdx.x) / kDeltaLanes;
  const int lane = static_cast<int>(threadIdx.x) % kDeltaLanes;
  const bool exists = row < a.rows;
  const int64_t token = row / a.H, head = row % a.H;
  float sum = 0.0f;
  for (int column = lane * 8; exists && column < a.Q; column += kDeltaLanes * 8) {
    const auto o = *reinterpret_cast<const uint4*>(a.o + token * a.o_stride + head * a.Q + column);
    const auto d_o =
        *reinterpret_cast<const uint4*>(a.d_o + token * a.d_o_stride + head * a.Q + column);
    const auto* left = reinterpret_cast<const __nv_bfloat162*>(&o);
    const auto* right = reinterpret_cast<const __nv_bfloat162*>(&d_o);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = __bfloat1622float2(left[i]), y = __bfloat1622float2(right[i]);
      sum = fmaf(x.x, y.x, sum);
      sum = fmaf(x.y, y.y, sum);
    }
  }
  for (int step = kDeltaLanes / 2; step > 0; step /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, step);
  }
  if (exists && lane == 0) a.delta[token * a.delta_stride + head] = sum;
}

}  // namespace cambium::cuda
