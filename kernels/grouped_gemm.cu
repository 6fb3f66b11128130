// Grouped GEMM on the GPU (kernels/grouped_gemm.h): the tensor cores' kernel where extents are
// multiples of 64 and storage is bf16 (kernels/grouped_tile.cuh), plain chains elsewhere
// (kernels/shared_grouped_rows.h). The choice is by shape and layout, never by the row count (D2).
#include "kernels/grouped_gemm.h"

#include "kernels/grouped_dgrad_tile.cuh"
#include "kernels/grouped_launch.cuh"
#include "kernels/shared_grouped_rows.h"

namespace cambium::cuda {

namespace {

GroupedExtent extent_of(const In<int32_t>& expert_offset_e1, int64_t depth, int64_t columns,
                        int columns_of_tile) {
  return {.expert_offset = expert_offset_e1.pointer(),
          .experts = static_cast<int>(expert_offset_e1[0] - 1),
          .rows = 0,
          .depth = static_cast<int>(depth),
          .columns = static_cast<int>(columns),
          .columns_of_tile = columns_of_tile};
}

// Rows of `view` as a warp of the down input gradient moves them.
CUtensorMap dgrad_map(const RawView& view) {
  return tensor_map_of(tile_rows(view),
                       {.extent = {view.shape[1], view.shape[0], 1},
                        .stride = {view.row_stride, view.row_stride * view.shape[0]},
                        .box = {kDgradChunkColumns, kWarpRows, 1},
                        .swizzle_bytes = kDgradRowBytes});
}

void launch_down_dgrad(const DownDgradParams& p, Stream& stream) {
  launch_persistent("grouped_down_dgrad", grouped_down_dgrad_kernel<>,
                    {kTurnCluster, kTurnThreads, TurnShared::kBytes}, p, stream);
}

// d_weight[r] = the row's partial sums, columns ascending.
__global__ void sum_partials_kernel(const float* partial_TR, int parts, int R, float* d_weight_R) {
  const int row = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (row >= R) return;
  float sum = partial_TR[row];
  for (int part = 1; part < parts; ++part) sum += partial_TR[int64_t{part} * R + row];
  d_weight_R[row] = sum;
}

}  // namespace

void grouped_up(const GroupedUpArgs& a, Stream& stream) {
  const int64_t D = a.x_RD[1], F = a.h_RF[1], R = a.h_RF[0];
  if (R == 0) return;
  if (!is_tile_call({&a.x_RD, &a.w_up_eND, &a.gate_up_RN, &a.h_RF}, D, F, a.w_up_eND[0])) {
    return grouped_up_rows(a, stream);
  }
  GroupedTileParams p{};
  p.extent = extent_of(a.expert_offset_e1, D, F, kUpColumns);
  p.b_map = weights_map(a.w_up_eND, kBoxRowsOfB);
  p.a = tile_rows(a.x_RD);
  p.a_stride = a.x_RD.row_stride;
  p.a_token = a.row_token_R.pointer();
  p.F = static_cast<int>(F);
  p.wide = tile_rows_out(a.gate_up_RN);
  p.wide_stride = a.gate_up_RN.row_stride;
  p.narrow = tile_rows_out(a.h_RF);
  p.narrow_stride = a.h_RF.row_stride;
  launch_tiles<Product::up>("grouped_up", p, stream);
}

void grouped_down(const GroupedDownArgs& a, Stream& stream) {
  const int64_t D = a.y_RD[1], F = a.h_RF[1], R = a.h_RF[0];
  if (R == 0) return;
  if (!is_tile_call({&a.h_RF, &a.w_down_eDF, &a.y_RD}, D, F, a.w_down_eDF[0])) {
    return grouped_down_rows(a, stream);
  }
  GroupedTileParams p{};
  p.extent = extent_of(a.expert_offset_e1, F, D, kTileColumns);
  p.a_map = rows_map(a.h_RF, kSliceRows);
  p.b_map = weights_map(a.w_down_eDF, kBoxRowsOfB);
  p.narrow = tile_rows_out(a.y_RD);
  p.narrow_stride = a.y_RD.row_stride;
  p.weight = a.weight_R.pointer();
  launch_tiles<Product::down>("grouped_down", p, stream);
}

void grouped_down_dgrad(const GroupedDownDgradArgs& a, Stream& stream) {
  const int64_t D = a.d_y_RD[1], F = a.weighted_h_RF[1], R = a.gate_up_RN[0];
  if (R == 0) return;
  if (!is_tile_call({&a.d_y_RD, &a.w_down_eDF, &a.gate_up_RN, &a.d_gate_up_RN, &a.weighted_h_RF}, D,
                    F, a.w_down_eDF[0])) {
    return grouped_down_dgrad_rows(a, stream);
  }
  DownDgradParams params{};
  params.gate_up_map = dgrad_map(a.gate_up_RN);
  params.d_gate_up_map = dgrad_map(a.d_gate_up_RN);
  params.weighted_h_map = dgrad_map(a.weighted_h_RF);
  GroupedTileParams& p = params.tile;
  p.extent = extent_of(a.expert_offset_e1, D, F, kTurnColumns);
  p.b_map = weights_map(a.w_down_eDF, kTurnBoxDepthOfB);
  p.a = tile_rows(a.d_y_RD);
  p.a_stride = a.d_y_RD.row_stride;
  p.a_token = a.row_token_R.pointer();
  p.F = static_cast<int>(F);
  p.wide = tile_rows_out(a.d_gate_up_RN);
  p.wide_stride = a.d_gate_up_RN.row_stride;
  p.narrow = tile_rows_out(a.weighted_h_RF);
  p.narrow_stride = a.weighted_h_RF.row_stride;
  p.weight = a.weight_R.pointer();
  p.R = static_cast<int>(R);
  if (a.d_weight_R.empty()) {
    return launch_down_dgrad(params, stream);
  }
  const cudaStream_t native = native_stream(stream);
  const int parts = static_cast<int>((F + kTurnColumns - 1) / kTurnColumns);
  void* partial = nullptr;
  check_cuda(cudaMallocAsync(&partial, sizeof(float) * static_cast<size_t>(parts * R), native),
             "grouped_down_dgrad partial sums");
  p.partial_dot = static_cast<float*>(partial);
  launch_down_dgrad(params, stream);
  constexpr int kThreads = 256;
  const auto blocks = static_cast<unsigned>((R + kThreads - 1) / kThreads);
  sum_partials_kernel<<<blocks, kThreads, 0, native>>>(p.partial_dot, parts, p.R,
                                                       a.d_weight_R.pointer());
  check_cuda(cudaGetLastError(), "grouped_down_dgrad sum of partials");
  check_cuda(cudaFreeAsync(partial, native), "grouped_down_dgrad partial sums");
}

void grouped_up_dgrad(const GroupedUpDgradArgs& a, Stream& stream) {
  const int64_t D = a.d_x_RD[1], N = a.d_gate_up_RN[1], R = a.d_x_RD[0];
  if (R == 0) return;
  if (!is_tile_call({&a.d_gate_up_RN, &a.w_up_eND, &a.d_x_RD}, D, N, a.w_up_eND[0])) {
    return grouped_up_dgrad_rows(a, stream);
  }
  GroupedTileParams p{};
  p.extent = extent_of(a.expert_offset_e1, N, D, kTileColumns);
  p.a_map = rows_map(a.d_gate_up_RN, kSliceRows);
  p.b_map = weights_map(a.w_up_eND, kBoxDepthOfB);
  p.narrow = tile_rows_out(a.d_x_RD);
  p.narrow_stride = a.d_x_RD.row_stride;
  launch_tiles<Product::up_dgrad>("grouped_up_dgrad", p, stream);
}

}  // namespace cambium::cuda
