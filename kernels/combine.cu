// Combine on the GPU: a warp a token. A lane owns 16-byte columns and adds the token's rows to them
// in k order, kRowsInFlight loads at a time; sums are fp32 and rounded once.
#include "kernels/combine.h"

#include "kernels/cuda_launch.cuh"

namespace cambium::cuda {

namespace {

constexpr int kWarpsPerBlock = 4;
constexpr int kRowsInFlight = 8;

template <class T>
struct CombineRows {
  Rows<const T> y_RD;
  Rows<const int32_t> row_index_TK;
  Rows<const T> residual_TD;
  Rows<T> out_TD;
  int64_t R, T_count;
  int D, K;
};

// sum = ((r_0 + r_1) + ...) of the rows of `index` at this lane's column; false without a row.
template <class T, int kVec>
__device__ __forceinline__ bool sum_rows(const CombineRows<T>& a, const int32_t* index, int column,
                                         float (&sum)[kVec]) {
  bool is_begun = false;
  for (int k = 0; k < a.K; k += kRowsInFlight) {
    int64_t row[kRowsInFlight];
    Packed<T, kVec> packed[kRowsInFlight];
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      row[i] = k + i < a.K ? index[k + i] : -1;
      device_check(row[i] >= -1 && row[i] < a.R);
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      if (row[i] >= 0) packed[i] = load_packed<T, kVec>(a.y_RD.row(row[i]) + column);
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      if (row[i] < 0) continue;
      float values[kVec];
      unpack(packed[i], values);
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum[j] = is_begun ? sum[j] + values[j] : values[j];
      is_begun = true;
    }
  }
  return is_begun;
}

template <class T, int kVec>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpLanes)
    combine_rows_kernel(const CombineRows<T> a) {
  const int64_t t = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / kWarpLanes;
  if (t >= a.T_count) return;
  const int32_t* index = a.row_index_TK.row(t);
  for (int column = threadIdx.x % kWarpLanes * kVec; column < a.D; column += kWarpLanes * kVec) {
    float sum[kVec] = {};
    const bool has_rows = sum_rows<T, kVec>(a, index, column, sum);
    if (!a.residual_TD.is_absent()) {
      float residual[kVec];
      load_values<T, kVec>(a.residual_TD.row(t) + column, residual);
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum[j] = has_rows ? residual[j] + sum[j] : residual[j];
    }
    store_values<T, kVec>(a.out_TD.row(t) + column, sum);
  }
}

}  // namespace

void combine_rows(const CombineRowsArgs& args, Stream& stream) {
  CHECK(args.y_RD.dtype == args.out_TD.dtype);
  CHECK(args.residual_TD.empty() || args.residual_TD.dtype == args.out_TD.dtype);
  const bool vectors = rows_are_vectors(args.y_RD, args.residual_TD, args.out_TD);
  with_storage(args.out_TD.dtype, vectors, [&]<class T, int kVec>() {
    const CombineRows<T> a{rows_of<const T>(args.y_RD),
                           rows_of<const int32_t>(args.row_index_TK),
                           rows_of<const T>(args.residual_TD),
                           rows_of<T>(args.out_TD),
                           args.y_RD[0],
                           args.out_TD[0],
                           static_cast<int>(args.out_TD[1]),
                           static_cast<int>(args.row_index_TK[1])};
    launch(
        "combine_rows", combine_rows_kernel<T, kVec>,
        {.blocks = blocks_for(a.T_count, kWarpsPerBlock), .threads = kWarpsPerBlock * kWarpLanes},
        stream, a);
  });
}

}  // namespace cambium::cuda
