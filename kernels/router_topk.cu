// Router on the GPU: one warp a token. Lane l holds experts l, l + 32, ... in registers; the K
// choices are K warp-wide argmax rounds (two reductions each), and lane k keeps choice k.
//
// D2: a token's arithmetic depends on E and K alone, never on T or on its neighbours.
// Napkin, forward: T (8 E + 8 K) bytes of traffic; at E = 128, K = 8 about 40 shuffle steps a round
// hide behind the loads of other warps.
#include <climits>

#include "kernels/cuda_launch.cuh"
#include "kernels/router_topk.h"

namespace cambium::cuda {

namespace {

constexpr int kWarpsPerBlock = 4;
static_assert(kMaxTopk == kWarpLanes, "lane k keeps choice k");
static_assert(kMaxExperts == kWarpLanes * 32, "a lane marks its experts in 32 bits");

struct RouterShape {
  int T, E, K;
  TopkNormalize normalize;
};

struct RouterForward {
  RouterShape shape;
  const float* logits_TE;
  int64_t logits_stride;
  const float* select_bias_E;      // null without a bias
  const int32_t* forced_index_TK;  // null where the kernel chooses
  int64_t forced_stride;
  float* probs_TE;
  int64_t probs_stride;
  int32_t* expert_index_TK;
  int64_t index_stride;
  float* weight_TK;
  int64_t weight_stride;
};

// Larger score first; equal scores, lower index first.
struct Candidate {
  float score;
  int expert;
};

// Floats in the order of unsigned integers; -0 counts as 0.
__device__ __forceinline__ uint32_t ordered_bits(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

// The expert of the best candidate of all lanes.
__device__ __forceinline__ int warp_best(const Candidate& best) {
  const uint32_t score = ordered_bits(best.score);
  const uint32_t most = __reduce_max_sync(kAllLanes, score);
  return __reduce_min_sync(kAllLanes, score == most ? best.expert : INT_MAX);
}

// probs[i] = softmax over the token's experts; slots beyond E hold 0.
template <int kSlots>
__device__ __forceinline__ void softmax_row(const float* logits, int E, int lane, float* probs) {
  float most = -INFINITY;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int e = lane + kWarpLanes * i;
    probs[i] = e < E ? logits[e] : -INFINITY;
    most = fmaxf(most, probs[i]);
  }
  most = warp_max(most);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int e = lane + kWarpLanes * i;
    probs[i] = e < E ? expf(probs[i] - most) : 0.0f;
    sum += probs[i];
  }
  sum = warp_sum(sum);
#pragma unroll
  for (int i = 0; i < kSlots; ++i) probs[i] /= sum;
}

// A NaN score counts as -infinity, as in the reference: indices stay valid and distinct.
template <int kSlots>
__device__ __forceinline__ Candidate lane_best(const float* score, uint32_t taken, int E,
                                               int lane) {
  Candidate best{-INFINITY, INT_MAX};
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int e = lane + kWarpLanes * i;
    const bool is_first = best.expert == INT_MAX;
    if (e < E && (taken >> i & 1u) == 0 && (is_first || score[i] > best.score)) {
      best = {score[i], e};
    }
  }
  return best;
}

// Sum over lanes 0..K-1 in lane order, the same in every lane.
__device__ __forceinline__ float ordered_sum(float value, int K) {
  float sum = 0;
  for (int k = 0; k < K; ++k) sum += __shfl_sync(kAllLanes, value, k);
  return sum;
}

template <int kSlots>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpLanes)
    router_topk_kernel(const RouterForward a) {
  const int lane = threadIdx.x % kWarpLanes;
  const int64_t t = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / kWarpLanes;
  if (t >= a.shape.T) return;
  const int E = a.shape.E, K = a.shape.K;
  float probs[kSlots], score[kSlots];
  softmax_row<kSlots>(a.logits_TE + t * a.logits_stride, E, lane, probs);
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int e = lane + kWarpLanes * i;
    score[i] = probs[i];
    if (e < E && a.select_bias_E != nullptr) score[i] += a.select_bias_E[e];
    if (isnan(score[i])) score[i] = -INFINITY;
    if (e < E) a.probs_TE[t * a.probs_stride + e] = probs[i];
  }
  uint32_t taken = 0;
  int my_expert = 0;
  float my_weight = 0;
  if (a.forced_index_TK != nullptr) {
    __syncwarp();  // other lanes wrote the probabilities that this one reads
    if (lane < K) {
      my_expert = a.forced_index_TK[t * a.forced_stride + lane];
      my_weight = a.probs_TE[t * a.probs_stride + my_expert];
    }
  }
  for (int k = 0; k < K && a.forced_index_TK == nullptr; ++k) {
    const int expert = warp_best(lane_best<kSlots>(score, taken, E, lane));
    float prob = 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) prob = expert / kWarpLanes == i ? probs[i] : prob;
    prob = __shfl_sync(kAllLanes, prob, expert % kWarpLanes);
    if (expert % kWarpLanes == lane) taken |= 1u << (expert / kWarpLanes);
    if (lane == k) {
      my_expert = expert;
      my_weight = prob;
    }
  }
  const float sum = ordered_sum(my_weight, K);
  if (lane >= K) return;
  if (a.shape.normalize == TopkNormalize::over_top_k) my_weight /= sum;
  a.expert_index_TK[t * a.index_stride + lane] = my_expert;
  a.weight_TK[t * a.weight_stride + lane] = my_weight;
}

struct RouterBackward {
  RouterShape shape;
  const float* probs_TE;
  int64_t probs_stride;
  const int32_t* expert_index_TK;
  int64_t index_stride;
  const float* d_weight_TK;
  int64_t d_weight_stride;
  const float* d_probs_TE;  // may be null
  int64_t d_probs_stride;
  const float* d_logits_in_TE;  // may be null
  int64_t d_logits_in_stride;
  float* d_logits_TE;
  int64_t d_logits_stride;
};

__global__ void __launch_bounds__(kWarpsPerBlock* kWarpLanes)
    router_topk_backward_kernel(const RouterBackward a) {
  const int lane = threadIdx.x % kWarpLanes;
  const int64_t t = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / kWarpLanes;
  if (t >= a.shape.T) return;
  const int E = a.shape.E, K = a.shape.K;
  const float* probs = a.probs_TE + t * a.probs_stride;
  const float* d_probs = a.d_probs_TE == nullptr ? nullptr : a.d_probs_TE + t * a.d_probs_stride;
  // Lane k: gradient of the k-th selected probability.
  const int my_expert = lane < K ? a.expert_index_TK[t * a.index_stride + lane] : -1;
  const float my_prob = lane < K ? probs[my_expert] : 0.0f;
  float my_gradient = lane < K ? a.d_weight_TK[t * a.d_weight_stride + lane] : 0.0f;
  if (a.shape.normalize == TopkNormalize::over_top_k) {
    const float sum = ordered_sum(my_prob, K);
    const float dot = ordered_sum(my_gradient * (my_prob / sum), K);
    my_gradient = (my_gradient - dot) / sum;
  }
  float mean = ordered_sum(my_gradient * my_prob, K);
  if (d_probs != nullptr) {
    float sum = 0;
    for (int e = lane; e < E; e += kWarpLanes) sum += d_probs[e] * probs[e];
    mean += warp_sum(sum);
  }
  for (int first = 0; first < E; first += kWarpLanes) {  // the whole warp: it shuffles inside
    const int e = first + lane;
    float gradient = d_probs != nullptr && e < E ? d_probs[e] : 0.0f;
    for (int k = 0; k < K; ++k) {
      const int expert = __shfl_sync(kAllLanes, my_expert, k);
      const float selected = __shfl_sync(kAllLanes, my_gradient, k);
      if (expert == e) gradient += selected;
    }
    if (e >= E) continue;
    float d_logit = probs[e] * (gradient - mean);
    if (a.d_logits_in_TE != nullptr) d_logit += a.d_logits_in_TE[t * a.d_logits_in_stride + e];
    a.d_logits_TE[t * a.d_logits_stride + e] = d_logit;
  }
}

RouterShape shape_of(const RawView& logits_TE, const RawView& index_TK, TopkNormalize normalize) {
  CHECK_LT(logits_TE[0], int64_t{INT_MAX});
  return {static_cast<int>(logits_TE[0]), static_cast<int>(logits_TE[1]),
          static_cast<int>(index_TK[1]), normalize};
}

unsigned blocks_of(const RouterShape& shape) {
  return static_cast<unsigned>((shape.T + kWarpsPerBlock - 1) / kWarpsPerBlock);
}

template <int kSlots>
void launch_forward(const RouterForward& a, cudaStream_t stream) {
  router_topk_kernel<kSlots><<<blocks_of(a.shape), kWarpsPerBlock * kWarpLanes, 0, stream>>>(a);
}

}  // namespace

void router_topk(const RouterTopkArgs& args, Stream& stream) {
  const RouterForward a{shape_of(args.logits_TE, args.expert_index_TK, args.normalize),
                        args.logits_TE.pointer(),
                        args.logits_TE.row_stride,
                        args.select_bias_E.pointer(),
                        args.forced_index_TK.pointer(),
                        args.forced_index_TK.row_stride,
                        args.probs_TE.pointer(),
                        args.probs_TE.row_stride,
                        args.expert_index_TK.pointer(),
                        args.expert_index_TK.row_stride,
                        args.weight_TK.pointer(),
                        args.weight_TK.row_stride};
  if (a.shape.T == 0) return;
  const cudaStream_t native = native_stream(stream);
  const int slots = (a.shape.E + kWarpLanes - 1) / kWarpLanes;
  if (slots <= 1) {
    launch_forward<1>(a, native);
  } else if (slots <= 2) {
    launch_forward<2>(a, native);
  } else if (slots <= 4) {
    launch_forward<4>(a, native);
  } else if (slots <= 8) {
    launch_forward<8>(a, native);
  } else if (slots <= 16) {
    launch_forward<16>(a, native);
  } else {
    launch_forward<32>(a, native);
  }
  check_cuda(cudaGetLastError(), "router_topk");
}

void router_topk_backward(const RouterTopkBackwardArgs& args, Stream& stream) {
  const RouterBackward a{shape_of(args.probs_TE, args.expert_index_TK, args.normalize),
                         args.probs_TE.pointer(),
                         args.probs_TE.row_stride,
                         args.expert_index_TK.pointer(),
                         args.expert_index_TK.row_stride,
                         args.d_weight_TK.pointer(),
                         args.d_weight_TK.row_stride,
                         args.d_probs_TE.pointer(),
                         args.d_probs_TE.row_stride,
                         args.d_logits_in_TE.pointer(),
                         args.d_logits_in_TE.row_stride,
                         args.d_logits_TE.pointer(),
                         args.d_logits_TE.row_stride};
  if (a.shape.T == 0) return;
  router_topk_backward_kernel<<<blocks_of(a.shape), kWarpsPerBlock * kWarpLanes, 0,
                                native_stream(stream)>>>(a);
  check_cuda(cudaGetLastError(), "router_topk_backward");
}

}  // namespace cambium::cuda
