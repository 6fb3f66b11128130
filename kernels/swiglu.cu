// SwiGLU on the GPU: a thread a vector of h, by the formula of the grouped GEMM's epilogues.
#include "kernels/swiglu.h"

#include "kernels/cuda_launch.cuh"
#include "kernels/swiglu_device.cuh"

namespace cambium::cuda {

namespace {

constexpr int kThreads = 256;

template <class T>
struct SwigluRows {
  Rows<const T> gate_up_RN, d_h_RF;
  Rows<T> h_RF, d_gate_up_RN;
  int64_t vectors;  // of all rows of h
  int F, row_vectors;
};

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(const SwigluRows<T> a) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= a.vectors) return;
  const int64_t row = i / a.row_vectors, column = i % a.row_vectors * kVec;
  float gate[kVec], up[kVec];
  load_values<T, kVec>(a.gate_up_RN.row(row) + column, gate);
  load_values<T, kVec>(a.gate_up_RN.row(row) + a.F + column, up);
#pragma unroll
  for (int j = 0; j < kVec; ++j) up[j] = swiglu_value(gate[j], up[j]);
  store_values<T, kVec>(a.h_RF.row(row) + column, up);
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) swiglu_backward_kernel(const SwigluRows<T> a) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= a.vectors) return;
  const int64_t row = i / a.row_vectors, column = i % a.row_vectors * kVec;
  float gate[kVec], up[kVec], d_h[kVec];
  load_values<T, kVec>(a.gate_up_RN.row(row) + column, gate);
  load_values<T, kVec>(a.gate_up_RN.row(row) + a.F + column, up);
  load_values<T, kVec>(a.d_h_RF.row(row) + column, d_h);
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    const DownDgradPoint point = down_dgrad_point(gate[j], up[j], 1.0f, d_h[j]);
    gate[j] = point.d_gate;
    up[j] = point.d_up;
  }
  store_values<T, kVec>(a.d_gate_up_RN.row(row) + column, gate);
  store_values<T, kVec>(a.d_gate_up_RN.row(row) + a.F + column, up);
}

template <class T, int kVec>
SwigluRows<T> rows_with(const RawView& gate_up_RN, const RawView& rows_RF) {
  const int64_t row_vectors = rows_RF[1] / kVec;
  return {.gate_up_RN = rows_of<const T>(gate_up_RN),
          .d_h_RF = {},
          .h_RF = {},
          .d_gate_up_RN = {},
          .vectors = rows_RF[0] * row_vectors,
          .F = static_cast<int>(rows_RF[1]),
          .row_vectors = static_cast<int>(row_vectors)};
}

}  // namespace

void swiglu(const SwigluArgs& args, Stream& stream) {
  CHECK(args.h_RF.dtype == args.gate_up_RN.dtype);
  const bool vectors = rows_are_vectors(args.gate_up_RN, args.h_RF);
  with_storage(args.h_RF.dtype, vectors, [&]<class T, int kVec>() {
    SwigluRows<T> a = rows_with<T, kVec>(args.gate_up_RN, args.h_RF);
    a.h_RF = rows_of<T>(args.h_RF);
    launch("swiglu", swiglu_kernel<T, kVec>,
           {.blocks = blocks_for(a.vectors, kThreads), .threads = kThreads}, stream, a);
  });
}

void swiglu_backward(const SwigluBackwardArgs& args, Stream& stream) {
  const DType dtype = args.gate_up_RN.dtype;
  CHECK(args.d_h_RF.dtype == dtype && args.d_gate_up_RN.dtype == dtype);
  const bool vectors = rows_are_vectors(args.gate_up_RN, args.d_h_RF, args.d_gate_up_RN);
  with_storage(dtype, vectors, [&]<class T, int kVec>() {
    SwigluRows<T> a = rows_with<T, kVec>(args.gate_up_RN, args.d_h_RF);
    a.d_h_RF = rows_of<const T>(args.d_h_RF);
    a.d_gate_up_RN = rows_of<T>(args.d_gate_up_RN);
    launch("swiglu_backward", swiglu_backward_kernel<T, kVec>,
           {.blocks = blocks_for(a.vectors, kThreads), .threads = kThreads}, stream, a);
  });
}

}  // namespace cambium::cuda
