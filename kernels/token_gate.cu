// The gate of a shared expert on the GPU: a block a token, then the gradient of w, a thread a
// column of a block of tokens.
//
// D2: a token's sums depend on D, F and the vector width alone. D3: a leaf adds its tokens in
// position order, whoever computes it.
#include "kernels/cuda_launch.cuh"
#include "kernels/swiglu_device.cuh"
#include "kernels/token_gate.h"

namespace cambium::cuda {

namespace {

constexpr int kThreads = 256;

template <class T>
struct GateRows {
  Rows<const T> x_TD, h_TF, d_y_TF, d_residual_TD;
  const T* w_D;
  Rows<T> y_TF, d_h_TF, d_x_TD;
  float* gate_T;  // read by backward
  float* d_logit_T;
  int D, F;
};

// <a, b> of one token, in every thread.
template <class T, int kVec>
__device__ __forceinline__ float token_dot(const T* a, const T* b, int count, float (*shared)[1]) {
  float sum[1] = {};
  for (int i = static_cast<int>(threadIdx.x) * kVec; i < count; i += kThreads * kVec) {
    float left[kVec], right[kVec];
    load_values<T, kVec>(a + i, left);
    load_values<T, kVec>(b + i, right);
#pragma unroll
    for (int j = 0; j < kVec; ++j) sum[0] = fmaf(left[j], right[j], sum[0]);
  }
  block_sum(sum, shared);
  return sum[0];
}

template <class T, int kVec>
__device__ __forceinline__ void scale_row(float factor, const T* from, T* to, int count) {
  for (int i = static_cast<int>(threadIdx.x) * kVec; i < count; i += kThreads * kVec) {
    float values[kVec];
    load_values<T, kVec>(from + i, values);
#pragma unroll
    for (int j = 0; j < kVec; ++j) values[j] *= factor;
    store_values<T, kVec>(to + i, values);
  }
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) token_gate_kernel(const GateRows<T> a) {
  __shared__ float shared[kThreads / kWarpLanes][1];
  const int64_t t = blockIdx.x;
  const float gate = sigmoid(token_dot<T, kVec>(a.x_TD.row(t), a.w_D, a.D, shared));
  if (threadIdx.x == 0) a.gate_T[t] = gate;
  scale_row<T, kVec>(gate, a.h_TF.row(t), a.y_TF.row(t), a.F);
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) token_gate_backward_kernel(const GateRows<T> a) {
  __shared__ float shared[kThreads / kWarpLanes][1];
  const int64_t t = blockIdx.x;
  const float gate = a.gate_T[t];
  const float along = token_dot<T, kVec>(a.d_y_TF.row(t), a.h_TF.row(t), a.F, shared);
  const float d_logit = gate * (1.0f - gate) * along;
  if (threadIdx.x == 0) a.d_logit_T[t] = d_logit;
  scale_row<T, kVec>(gate, a.d_y_TF.row(t), a.d_h_TF.row(t), a.F);
  scale_row<T, kVec>(gate, a.h_TF.row(t), a.y_TF.row(t), a.F);
  for (int i = static_cast<int>(threadIdx.x) * kVec; i < a.D; i += kThreads * kVec) {
    float d_x[kVec], residual[kVec];
    load_values<T, kVec>(a.w_D + i, d_x);
#pragma unroll
    for (int j = 0; j < kVec; ++j) d_x[j] *= d_logit;
    if (!a.d_residual_TD.is_absent()) {
      load_values<T, kVec>(a.d_residual_TD.row(t) + i, residual);
#pragma unroll
      for (int j = 0; j < kVec; ++j) d_x[j] = residual[j] + d_x[j];
    }
    store_values<T, kVec>(a.d_x_TD.row(t) + i, d_x);
  }
}

template <class T>
struct GateLeaves {
  Rows<const T> x_TD;
  const float* d_logit_T;
  Rows<float> d_w_leaf_BD;
  int64_t T_count, block_tokens, column_blocks;
  int D;
};

template <class T>
__global__ void __launch_bounds__(kThreads) token_gate_leaf_kernel(const GateLeaves<T> a) {
  const int64_t leaf = blockIdx.x / a.column_blocks, part = blockIdx.x % a.column_blocks;
  const int64_t column = part * kThreads + threadIdx.x;
  if (column >= a.D) return;
  const int64_t begin = leaf * a.block_tokens;
  const int64_t end = min(a.T_count, begin + a.block_tokens);
  float sum = 0.0f;
  for (int64_t t = begin; t < end; ++t) {
    sum = fmaf(a.d_logit_T[t], widen(a.x_TD.row(t)[column]), sum);
  }
  a.d_w_leaf_BD.row(leaf)[column] = sum;
}

}  // namespace

void token_gate(const TokenGateArgs& args, Stream& stream) {
  const DType dtype = args.x_TD.dtype;
  CHECK(args.w_D.dtype == dtype && args.h_TF.dtype == dtype && args.y_TF.dtype == dtype);
  const bool vectors = rows_are_vectors(args.x_TD, args.w_D, args.h_TF, args.y_TF);
  with_storage(dtype, vectors, [&]<class T, int kVec>() {
    GateRows<T> a{};
    a.x_TD = rows_of<const T>(args.x_TD);
    a.w_D = static_cast<const T*>(args.w_D.data);
    a.h_TF = rows_of<const T>(args.h_TF);
    a.y_TF = rows_of<T>(args.y_TF);
    a.gate_T = args.gate_T.pointer();
    a.D = static_cast<int>(args.x_TD[1]);
    a.F = static_cast<int>(args.h_TF[1]);
    launch("token_gate", token_gate_kernel<T, kVec>, {.blocks = args.x_TD[0], .threads = kThreads},
           stream, a);
  });
}

void token_gate_backward(const TokenGateBackwardArgs& args, Stream& stream) {
  const DType dtype = args.x_TD.dtype;
  CHECK(args.w_D.dtype == dtype && args.h_TF.dtype == dtype && args.d_y_TF.dtype == dtype);
  CHECK(args.d_h_TF.dtype == dtype && args.y_TF.dtype == dtype && args.d_x_TD.dtype == dtype);
  CHECK(args.d_residual_TD.empty() || args.d_residual_TD.dtype == dtype);
  const bool vectors = rows_are_vectors(args.x_TD, args.w_D, args.h_TF, args.d_y_TF,
                                        args.d_residual_TD, args.d_h_TF, args.y_TF, args.d_x_TD);
  const int64_t D = args.x_TD[1];
  with_storage(dtype, vectors, [&]<class T, int kVec>() {
    GateRows<T> a{};
    a.x_TD = rows_of<const T>(args.x_TD);
    a.w_D = static_cast<const T*>(args.w_D.data);
    a.h_TF = rows_of<const T>(args.h_TF);
    a.d_y_TF = rows_of<const T>(args.d_y_TF);
    a.d_residual_TD = rows_of<const T>(args.d_residual_TD);
    a.y_TF = rows_of<T>(args.y_TF);
    a.d_h_TF = rows_of<T>(args.d_h_TF);
    a.d_x_TD = rows_of<T>(args.d_x_TD);
    a.gate_T = const_cast<float*>(args.gate_T.pointer());
    a.d_logit_T = args.d_logit_T.pointer();
    a.D = static_cast<int>(D);
    a.F = static_cast<int>(args.h_TF[1]);
    launch("token_gate_backward", token_gate_backward_kernel<T, kVec>,
           {.blocks = args.x_TD[0], .threads = kThreads}, stream, a);
    const GateLeaves<T> leaves{rows_of<const T>(args.x_TD),
                               args.d_logit_T.pointer(),
                               rows_of<float>(args.d_w_leaf_BD),
                               args.x_TD[0],
                               args.block_tokens,
                               blocks_for(D, kThreads),
                               static_cast<int>(D)};
    launch("token_gate_leaf", token_gate_leaf_kernel<T>,
           {.blocks = args.d_w_leaf_BD[0] * leaves.column_blocks, .threads = kThreads}, stream,
           leaves);
  });
}

}  // namespace cambium::cuda
