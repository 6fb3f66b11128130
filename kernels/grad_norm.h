// Gradient norm over canonical tensors, and the scale that AdamW applies.
//
//   square_sum:  partial_M[canonical number of block b] = sum of squares of block b (4,096 elements
//                at most, kernels/block_table.h), in fp32 over 32 lanes (lane = element mod 32),
//                each fused
//   clip_scale:  total = fixed binary tree (split at the largest power of two below the count) over
//                each tensor's blocks, then the same tree over tensors, in fp64
//                norm  = sqrt(total) * inverse_tokens
//                scale = inverse_tokens * min(1, clip / (norm + 1e-6))   (torch.clip_grad_norm_)
//
// Shards cut on blocks, so partials are the same bits wherever they are computed; every element
// counts once. A NaN or infinity anywhere gives a non-finite partial; then the flag is set, the
// scale is NaN (AdamW changes nothing) and the first such tensor is named.
// Napkin, square_sum: 4 N bytes, 2 N FLOPs; memory bound.
#pragma once

#include "kernels/block_table.h"

namespace cambium {

constexpr int64_t kNormBlockElements = kTableBlockElements;
constexpr int64_t norm_block_count(int64_t element_count) {
  return (element_count + kNormBlockElements - 1) / kNormBlockElements;
}

struct SquareSumArgs {
  In<float> grad_N;
  BlockTable table;        // B = norm_block_count(N)
  InOut<float> partial_M;  // of all canonical tensors; other blocks' stay
};

// Entries of ClipScaleArgs::result_4.
enum ClipResult : int {
  kClipNorm = 0,         // already divided by the token count
  kClipScale = 1,        // AdamwArgs::scale_1
  kClipNonFinite = 2,    // 1 when any partial, or their sum, is not finite, else 0
  kClipFirstTensor = 3,  // the first tensor with a non-finite partial, else -1
};

struct ClipScaleArgs {
  In<float> partial_B;                // all tensors' partials, in canonical order
  In<int32_t> tensor_first_block_n1;  // n tensors: offsets into partial_B, the last one B
  double inverse_tokens = 1;          // 1 / N, N = global number of counted tokens
  double clip = 0;                    // maximal norm; 0 = no clipping
  Out<float> result_4;                // ClipResult
};

inline void check_args(const SquareSumArgs& a) {
  const int64_t N = a.grad_N.elements();
  check_shape("square_sum", "grad_N", a.grad_N, Shape(N));
  check_block_table("square_sum", a.table, N);
  check_shape("square_sum", "partial_M", a.partial_M, Shape(a.partial_M.elements()));
}

inline void check_args(const ClipScaleArgs& a) {
  check_shape("clip_scale", "partial_B", a.partial_B, Shape(a.partial_B.elements()));
  check_shape("clip_scale", "tensor_first_block_n1", a.tensor_first_block_n1,
              Shape(a.tensor_first_block_n1.elements()));
  check_shape("clip_scale", "result_4", a.result_4, Shape(4));
  CHECK_GE(a.tensor_first_block_n1[0], 2);
  CHECK_GE(a.clip, 0.0);
}

inline Cost cost(const SquareSumArgs& a) {
  const int64_t N = a.table.elements, whole = a.grad_N.elements();  // with padding
  return {"square_sum", {whole}, 2 * N, 4 * whole + 16 * a.table.block_BC[0], 0};
}

inline Cost cost(const ClipScaleArgs& a) {
  const int64_t B = a.partial_B[0], n = a.tensor_first_block_n1[0];
  return {"clip_scale", {B, n}, B, 4 * (B + n + 4), 0};
}

template <class Visitor>
void visit_views(const SquareSumArgs& a, Visitor&& visit) {
  visit("grad_N", a.grad_N);
  visit_views(a.table, visit);
  visit("partial_M", a.partial_M);
}

template <class Visitor>
void visit_views(const ClipScaleArgs& a, Visitor&& visit) {
  visit("partial_B", a.partial_B);
  visit("tensor_first_block_n1", a.tensor_first_block_n1);
  visit("result_4", a.result_4);
}

namespace reference {
void square_sum(const SquareSumArgs& args, Workers& workers);
void clip_scale(const ClipScaleArgs& args, Workers& workers);
}  // namespace reference
namespace cuda {
void square_sum(const SquareSumArgs& args, Stream& stream);
void clip_scale(const ClipScaleArgs& args, Stream& stream);
}  // namespace cuda

inline void square_sum(const SquareSumArgs& args, OpCall call) {
  execute(args, call, reference::square_sum, kHasCuda ? cuda::square_sum : nullptr);
}
inline void clip_scale(const ClipScaleArgs& args, OpCall call) {
  execute(args, call, reference::clip_scale, kHasCuda ? cuda::clip_scale : nullptr);
}

}  // namespace cambium
