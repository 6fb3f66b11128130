// Weight gradients of kernels/grouped_gemm.h on the GPU: fast modes on the tensor cores
// where extents are multiples of 64 and storage is bf16, everything else as plain chains
// (kernels/shared_wgrad_nodes.h). The operand whose rows are gathered is the tile's A.
#include "kernels/grouped_launch.cuh"
#include "kernels/grouped_wgrad_tile.cuh"
#include "kernels/shared_wgrad_nodes.h"

#include "kernels/grouped_gemm.h"

namespace cambium::cuda {

namespace {

void wgrad_as_chains(const GroupedWgradArgs& a, Stream& stream) {
  WgradNodesArgs nodes;
  nodes.d_y_RN = a.d_y_RN;
  nodes.x_RK = a.x_RK;
  nodes.d_y_token_R = a.d_y_token_R;
  nodes.x_token_R = a.x_token_R;
  nodes.rows = a.rows();
  nodes.groups = a.d_w_SeNK[1];
  nodes.group_offset_g1 = a.expert_offset_e1;
  nodes.row_block_R = a.row_block_R;
  nodes.slots = a.d_w_SeNK.pointer();
  nodes.slot_stride = a.d_w_SeNK.row_stride;
  nodes.group_stride = a.expert_stride;
  nodes.present = a.present_Se.pointer();
  nodes.present_stride = a.present_Se.row_stride;
  nodes.target = a.target;
  wgrad_nodes(nodes, stream);
}

bool is_tile_wgrad(const GroupedWgradArgs& a) {
  const bool gathers_one = a.d_y_token_R.empty() || a.x_token_R.empty();
  const bool has_aligned_matrices =
      a.expert_stride % 4 == 0 && reinterpret_cast<uintptr_t>(a.d_w_SeNK.data) % 16 == 0;
  return a.target.mode != GradMode::nodes && gathers_one && has_aligned_matrices &&
         is_tile_call({&a.d_y_RN, &a.x_RK}, a.d_y_RN[1], a.x_RK[1], a.d_w_SeNK[1]);
}

// Zeros for experts without rows, whose matrices the tiles do not touch; a block a share of one.
__global__ void zero_absent_kernel(const int32_t* expert_offset_e1, float* d_w, int64_t elements,
                                   int64_t expert_stride) {
  const int64_t x = blockIdx.y;
  if (expert_offset_e1[x] != expert_offset_e1[x + 1]) return;
  auto* matrix = reinterpret_cast<float4*>(d_w + x * expert_stride);
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < elements / 4; i += step) {
    matrix[i] = float4{};
  }
}

void zero_absent(const GroupedWgradArgs& a, Stream& stream) {
  constexpr unsigned kBlocks = 16, kThreads = 512;
  zero_absent_kernel<<<dim3(kBlocks, static_cast<unsigned>(a.d_w_SeNK[1])), kThreads, 0,
                       native_stream(stream)>>>(a.expert_offset_e1.pointer(), a.d_w_SeNK.pointer(),
                                                a.d_w_SeNK[2] * a.d_w_SeNK[3], a.expert_stride);
  check_cuda(cudaGetLastError(), "grouped_wgrad zeros");
}

// Experts' fp32 matrices [e, N, K] as boxes of 32 elements of K and `box_rows` of N.
CUtensorMap matrices_map(const GroupedWgradArgs& a, int box_rows) {
  return tensor_map_of(a.d_w_SeNK.pointer(),
                       {.extent = {a.d_w_SeNK[3], a.d_w_SeNK[2], a.d_w_SeNK[1]},
                        .stride = {a.d_w_SeNK[3], a.expert_stride},
                        .box = {32, box_rows, 1}});
}

template <WgradTile kTile>
void launch_wgrad(const GroupedWgradArgs& a, WgradTileParams& p, Stream& stream) {
  p.d_w_map = matrices_map(a, kWgradBoxRows<kTile>);
  launch_persistent("grouped_wgrad", grouped_wgrad_kernel<kTile>,
                    {kTurnCluster, kTurnThreads, TurnShared::kBytes}, p, stream);
}

}  // namespace

void grouped_wgrad(const GroupedWgradArgs& a, Stream& stream) {
  if (!is_tile_wgrad(a)) return wgrad_as_chains(a, stream);
  if (a.target.mode == GradMode::store) zero_absent(a, stream);
  if (a.rows() == 0) return;
  const bool is_transposed = !a.x_token_R.empty();
  const RawView& by_row = is_transposed ? static_cast<const RawView&>(a.x_RK) : a.d_y_RN;
  const RawView& by_map = is_transposed ? static_cast<const RawView&>(a.d_y_RN) : a.x_RK;
  WgradTileParams p{};
  p.extent = {.expert_offset = a.expert_offset_e1.pointer(),
              .experts = static_cast<int>(a.d_w_SeNK[1]),
              .rows = static_cast<int>(by_row[1]),
              .depth = 0,
              .columns = static_cast<int>(by_map[1]),
              .columns_of_tile = kTurnColumns};
  p.b_map = rows_map(by_map, kTurnBoxDepthOfB);
  p.a = tile_rows(by_row);
  p.a_stride = by_row.row_stride;
  p.a_token = is_transposed ? a.x_token_R.pointer() : a.d_y_token_R.pointer();
  p.b = tile_rows(by_map);
  p.b_stride = by_map.row_stride;
  p.mode = a.target.mode;
  if (is_transposed) {
    launch_wgrad<WgradTile::transposed>(a, p, stream);
  } else {
    launch_wgrad<WgradTile::as_stored>(a, p, stream);
  }
}

}  // namespace cambium::cuda
