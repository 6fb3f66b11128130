// Grouped GEMM on the GPU (kernels/grouped_gemm.h): which kernel takes a call.
#include "kernels/grouped_gemm.h"

#include "kernels/shared_grouped_rows.h"
#include "kernels/shared_wgrad_nodes.h"

namespace cambium::cuda {

void grouped_up(const GroupedUpArgs& a, Stream& stream) { grouped_up_rows(a, stream); }

void grouped_down(const GroupedDownArgs& a, Stream& stream) { grouped_down_rows(a, stream); }

void grouped_down_dgrad(const GroupedDownDgradArgs& a, Stream& stream) {
  grouped_down_dgrad_rows(a, stream);
}

void grouped_up_dgrad(const GroupedUpDgradArgs& a, Stream& stream) {
  grouped_up_dgrad_rows(a, stream);
}

void grouped_wgrad(const GroupedWgradArgs& a, Stream& stream) {
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

}  // namespace cambium::cuda
