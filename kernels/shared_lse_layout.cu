// A log-sum-exp between the layouts of kernels/attention_cudnn.h. A warp takes 32 positions of one
// head, the block's warps all heads of them: what one warp leaves of a row's sectors the next finds
// in L1. Napkin: 8 T H bytes, a few microseconds.
#include "kernels/attention_cudnn.h"
#include "kernels/cuda_launch.cuh"

namespace cambium::cuda {

namespace {

constexpr int kThreads = 256;

template <LseOrder kTo>
__global__ void __launch_bounds__(kThreads) reorder_lse_kernel(const LseLayouts lse) {
  const int64_t tiles = (lse.S + kWarpLanes - 1) / kWarpLanes;
  const int64_t sequence = blockIdx.x / tiles;
  const int64_t s = blockIdx.x % tiles * kWarpLanes + threadIdx.x % kWarpLanes;
  if (s >= lse.S) return;
  for (int64_t h = threadIdx.x / kWarpLanes; h < lse.H; h += kThreads / kWarpLanes) {
    float& by_position = lse.by_position[(sequence * lse.S + s) * lse.row_stride + h];
    float& by_head = lse.by_head[(sequence * lse.H + h) * lse.S + s];
    if constexpr (kTo == LseOrder::by_head) {
      by_head = by_position;
    } else {
      by_position = by_head;
    }
  }
}

}  // namespace

void reorder_lse(const LseLayouts& lse, LseOrder to, Stream& stream) {
  const LaunchShape shape{.blocks = lse.sequences * blocks_for(lse.S, kWarpLanes),
                          .threads = kThreads};
  launch("log-sum-exp layout",
         to == LseOrder::by_head ? reorder_lse_kernel<LseOrder::by_head>
                                 : reorder_lse_kernel<LseOrder::by_position>,
         shape, stream, lse);
}

}  // namespace cambium::cuda
