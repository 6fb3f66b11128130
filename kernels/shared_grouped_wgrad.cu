// Weight gradients of kernels/grouped_gemm.h on the GPU: fast modes on the tensor cores
// where extents are multiples of 64 and storage is bf16, everything else as plain chains
// (kernels/shared_wgrad_nodes.h). The operand whose rows are gathered is the tile's A.
#include "kernels/grouped_launch.cuh"
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

}  // namespace

void grouped_wgrad(const GroupedWgradArgs& a, Stream& stream) {
  if (!is_tile_wgrad(a)) return wgrad_as_chains(a, stream);
  if (a.target.mode == GradMode::store) {
    zero_matrices(a.d_w_SeNK.pointer(), a.d_w_SeNK[1], a.d_w_SeNK[2] * a.d_w_SeNK[3],
                  a.expert_stride, stream);
  }
  if (a.rows() == 0) return;
  const bool is_transposed = !a.x_token_R.empty();
  const RawView& by_row = is_transposed ? static_cast<const RawView&>(a.x_RK) : a.d_y_RN;
  const RawView& by_map = is_transposed ? static_cast<const RawView&>(a.d_y_RN) : a.x_RK;
  GroupedTileParams p{};
  p.extent = {.expert_offset = a.expert_offset_e1.pointer(),
              .experts = static_cast<int>(a.d_w_SeNK[1]),
              .rows = static_cast<int>(by_row[1]),
              .depth = 0,
              .columns = static_cast<int>(by_map[1]),
              .columns_of_tile = kTileColumns};
  p.b_map = rows_map(by_map, kBoxDepthOfB);
  p.a = tile_rows(by_row);
  p.a_stride = by_row.row_stride;
  p.a_token = is_transposed ? a.x_token_R.pointer() : a.d_y_token_R.pointer();
  p.b = tile_rows(by_map);
  p.b_stride = by_map.row_stride;
  p.d_w = a.d_w_SeNK.pointer();
  p.d_w_expert_stride = a.expert_stride;
  p.d_w_stride = a.d_w_SeNK[3];
  if (is_transposed) {
    launch_tiles<Product::wgrad_transposed>("grouped_wgrad", p, stream);
  } else {
    launch_tiles<Product::wgrad>("grouped_wgrad", p, stream);
  }
}

}  // namespace cambium::cuda
