// Gathers on the GPU: rows move as bytes, a warp a row, 16 bytes a lane where rows allow it.
#include "kernels/permute.h"

#include "kernels/cuda_launch.cuh"

namespace cambium::cuda {

namespace {

constexpr int kWarpsPerBlock = 4;
constexpr int kThreads = kWarpsPerBlock * kWarpLanes;
constexpr int kUnitsInFlight = 8;  // a lane's loads before its first store: 4 KB a warp

// y_MU[m] = x_TU[index_M[m]]; zero bits where the index is -1, refused where `lowest_index` is 0.
template <class Unit>
__global__ void __launch_bounds__(kThreads)
    gather_rows_kernel(Rows<const Unit> x_TU, const int32_t* index_M, Rows<Unit> y_MU, int64_t M,
                       int64_t T, int units, int64_t lowest_index) {
  const int64_t m = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / kWarpLanes;
  if (m >= M) return;
  const int64_t t = index_M[m];
  device_check(t >= lowest_index && t < T);
  const Unit* from = x_TU.row(t);
  Unit* to = y_MU.row(m);
  for (int first = threadIdx.x % kWarpLanes; first < units; first += kUnitsInFlight * kWarpLanes) {
    Unit held[kUnitsInFlight] = {};
#pragma unroll
    for (int i = 0; i < kUnitsInFlight; ++i) {
      const int at = first + i * kWarpLanes;
      if (t >= 0 && at < units) held[i] = from[at];
    }
#pragma unroll
    for (int i = 0; i < kUnitsInFlight; ++i) {
      const int at = first + i * kWarpLanes;
      if (at < units) to[at] = held[i];
    }
  }
}

// y[i] = x[index[i]], `absent` where the index is -1.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gather_elements_kernel(const T* x, int64_t x_count, const int32_t* index, T* y, int64_t count,
                           T absent) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t source = index[i];
  device_check(source >= -1 && source < x_count);
  y[i] = source == -1 ? absent : x[source];
}

template <class Unit>
void launch_gather(const GatherRowsArgs& args, int64_t lowest_index, Stream& stream) {
  const int64_t width = dtype_bytes(args.x_TD.dtype), M = args.index_M[0];
  const auto units = [&](int64_t elements) {
    return elements * width / static_cast<int64_t>(sizeof(Unit));
  };
  launch("gather_rows", gather_rows_kernel<Unit>,
         {.blocks = blocks_for(M, kWarpsPerBlock), .threads = kThreads}, stream,
         Rows<const Unit>{static_cast<const Unit*>(args.x_TD.data), units(args.x_TD.row_stride)},
         args.index_M.pointer(),
         Rows<Unit>{static_cast<Unit*>(args.y_MD.data), units(args.y_MD.row_stride)}, M,
         args.x_TD[0], static_cast<int>(units(args.x_TD[1])), lowest_index);
}

void gather(const GatherRowsArgs& args, int64_t lowest_index, Stream& stream) {
  if (rows_are_vectors(args.x_TD, args.y_MD)) {
    launch_gather<uint4>(args, lowest_index, stream);
  } else if (args.x_TD.dtype == DType::f32) {
    launch_gather<uint32_t>(args, lowest_index, stream);
  } else {
    launch_gather<uint16_t>(args, lowest_index, stream);
  }
}

}  // namespace

void gather_rows(const GatherRowsArgs& args, Stream& stream) { gather(args, -1, stream); }
void gather_present_rows(const GatherRowsArgs& args, Stream& stream) { gather(args, 0, stream); }

void gather_scalars(const GatherScalarsArgs& args, Stream& stream) {
  const int64_t M = args.index_M.elements();
  launch("gather_scalars", gather_elements_kernel<float>,
         {.blocks = blocks_for(M, kThreads), .threads = kThreads}, stream, args.x_N.pointer(),
         args.x_N.elements(), args.index_M.pointer(), args.y_M.pointer(), M, 0.0f);
}

void gather_row_blocks(const GatherRowBlocksArgs& args, Stream& stream) {
  const int64_t R = args.row_token_R[0];
  launch("gather_row_blocks", gather_elements_kernel<int32_t>,
         {.blocks = blocks_for(R, kThreads), .threads = kThreads}, stream,
         args.token_block_T.pointer(), args.token_block_T[0], args.row_token_R.pointer(),
         args.row_block_R.pointer(), R, -1);
}

}  // namespace cambium::cuda
