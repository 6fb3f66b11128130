// Launching the tensor cores' kernel of the grouped GEMM: what it can take, tensor maps, grid.
#pragma once

#include <initializer_list>

#include "kernels/grouped_epilogue.cuh"

namespace cambium::cuda {

// CTAs that share B through one multicast.
constexpr int kGroupedCluster = 2;

// Whether rows of `view` are bf16 and can be moved 16 bytes at a time. By layout alone, never by
// the row count: which kernel takes a call decides the bits (D2).
inline bool has_tile_rows(const RawView& view) {
  return view.dtype == DType::bf16 && view.row_stride % 8 == 0;
}

// Whether the tensor cores' kernel takes a call with these operands and extents.
inline bool is_tile_call(std::initializer_list<const RawView*> views, int64_t D, int64_t F,
                         int64_t experts) {
  for (const RawView* view : views) {
    if (!has_tile_rows(*view)) return false;
  }
  return D > 0 && F > 0 && D % 64 == 0 && F % 64 == 0 && experts <= kMaxExperts;
}

inline const __nv_bfloat16* tile_rows(const RawView& view) {
  CHECK_EQ(reinterpret_cast<uintptr_t>(view.data) % 16, uintptr_t{0});
  return static_cast<const __nv_bfloat16*>(view.data);
}
inline __nv_bfloat16* tile_rows_out(const RawView& view) {
  return const_cast<__nv_bfloat16*>(tile_rows(view));
}

// A [rows, columns] as boxes of 64 columns and `box_rows` rows.
inline CUtensorMap rows_map(const RawView& view, int box_rows) {
  return tensor_map_of(tile_rows(view),
                       {.extent = {view.shape[1], view.shape[0], 1},
                        .stride = {view.row_stride, view.row_stride * view.shape[0]},
                        .box = {64, box_rows, 1}});
}

// Experts' matrices [e, outer, inner] as boxes of 64 inner and `box_rows` outer elements.
inline CUtensorMap weights_map(const RawView& view, int box_rows) {
  return tensor_map_of(tile_rows(view), {.extent = {view.shape[2], view.shape[1], view.shape[0]},
                                         .stride = {view.shape[2], view.row_stride},
                                         .box = {64, box_rows, 1}});
}
constexpr int kBoxRowsOfB = kTileColumns / 2;  // contracted extent inside
constexpr int kBoxDepthOfB = kTileDepth / 2;   // contracted extent outside

// One CTA per SM, in clusters.
struct TileLaunch {
  int cluster, threads, shared_bytes;
};

template <class Params>
void launch_persistent(const char* op, void (*kernel)(Params), const TileLaunch& launch,
                       const std::remove_const_t<Params>& p, Stream& stream) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  launch.shared_bytes),
             op);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(launch.cluster));
  config.blockDim = dim3(static_cast<unsigned>(launch.threads));
  config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
  config.stream = native_stream(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  // One kernel's answer does not change: clusters of four leave some SMs out.
  static const int clusters = [&] {
    int count = 0;
    check_cuda(cudaOccupancyMaxActiveClusters(&count, kernel, &config), op);
    return count;
  }();
  config.gridDim.x = static_cast<unsigned>(clusters * launch.cluster);
  check_cuda(cudaLaunchKernelEx(&config, kernel, p), op);
}

template <Product kProduct>
void launch_tiles(const char* op, const GroupedTileParams& p, Stream& stream) {
  launch_persistent(op, grouped_tile_kernel<kProduct, kGroupedCluster>,
                    {kGroupedCluster, kGroupedThreads, GroupedShared::kBytes}, p, stream);
}

}  // namespace cambium::cuda
