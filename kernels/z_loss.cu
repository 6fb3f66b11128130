// Router z-loss on the GPU: a warp a token, lane l holds logits l, l + 32, ... as it walks them.
#include "kernels/z_loss.h"

#include "kernels/cuda_launch.cuh"

namespace cambium::cuda {

namespace {

constexpr int kWarpsPerBlock = 4;

__global__ void __launch_bounds__(kWarpsPerBlock* kWarpLanes)
    z_loss_kernel(Rows<const float> logits_TE, float* loss_T, Rows<float> d_logits_TE,
                  int64_t T_count, int E, float loss_scale, float gradient_scale) {
  const int64_t t = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / kWarpLanes;
  if (t >= T_count) return;
  const int lane = threadIdx.x % kWarpLanes;
  const float* logits = logits_TE.row(t);
  float most = -INFINITY, total = 0;
  for (int e = lane; e < E; e += kWarpLanes) most = fmaxf(most, logits[e]);
  most = warp_max(most);
  for (int e = lane; e < E; e += kWarpLanes) total += expf(logits[e] - most);
  total = warp_sum(total);
  const float lse = most + logf(total);
  const float coefficient = gradient_scale * 2.0f * lse / total;
  if (lane == 0) loss_T[t] = loss_scale * (lse * lse);
  for (int e = lane; e < E; e += kWarpLanes) {
    d_logits_TE.row(t)[e] = expf(logits[e] - most) * coefficient;
  }
}

}  // namespace

void z_loss(const ZLossArgs& args, Stream& stream) {
  const int64_t T_count = args.logits_TE[0];
  launch("z_loss", z_loss_kernel,
         {.blocks = blocks_for(T_count, kWarpsPerBlock), .threads = kWarpsPerBlock * kWarpLanes},
         stream, rows_of<const float>(args.logits_TE), args.loss_T.pointer(),
         rows_of<float>(args.d_logits_TE), T_count, static_cast<int>(args.logits_TE[1]),
         args.loss_scale, args.gradient_scale);
}

}  // namespace cambium::cuda
