// Query/key normalisation and rotary embedding on the GPU. A head is 1, 2, 4, ... 32 neighbouring
// lanes; a lane holds vectors of the head's first half and the same columns of its second half, so
// that the rotation stays inside the lane.
//
// D2: a head's sum depends on Q and the vector width, a full width's on the heads too. Forward: a
// block takes a token, a warp some of its query or key heads, 32 / lanes in a pass; it reads the
// angle once for all its passes, whose loads are under way together. Backward: a block per leaf,
// all heads of a token at once; a lane adds its columns' d_gain over the leaf's tokens in order,
// then heads are added in order, so that leaves do not depend on who computes them (D3).
// Napkin: at 32 + 4 heads of 128 in bf16, 8 lanes a head, 3 warps and 9 KB of loads a token.
#include "kernels/qk_norm_rope.h"

#include "kernels/qk_norm_rope_backward.cuh"

namespace cambium::cuda {

namespace {

struct BlockShape {
  int lanes = 0;  // of a head; 0: the heads do not fit
  int threads = 0;
  int q_warps = 0;  // forward
};

// Lanes of a head of which each holds `per` vectors of a half.
int64_t lanes_of(int64_t half, int vec, int per) {
  int64_t lanes = 1;
  while (lanes * per * vec < half) lanes *= 2;
  return lanes;
}

// Queries and keys have warps of their own.
BlockShape forward_shape(int64_t H, int64_t G, int64_t half, int vec, int per) {
  const int64_t lanes = lanes_of(half, vec, per);
  const auto warps = [&](int64_t heads) {
    return static_cast<int>(blocks_for(heads * lanes, kWarpLanes * (per == 1 ? kPassesOf<1> : 1)));
  };
  const int threads = (warps(H) + warps(G)) * kWarpLanes;
  if (lanes > kWarpLanes || threads > forward_threads(per)) return {};
  return {static_cast<int>(lanes), threads, warps(H)};
}

// All heads at once.
BlockShape backward_shape(int64_t heads, int64_t half, int vec, int per) {
  const int64_t lanes = lanes_of(half, vec, per);
  if (lanes > kWarpLanes || heads * lanes > max_threads(per)) return {};
  return {static_cast<int>(lanes),
          static_cast<int>(blocks_for(heads * lanes, kWarpLanes) * kWarpLanes)};
}

// body.operator()<kPer, kKind>(shape) with the fewest vectors a lane that fit a block, by
// shape_of(vec, per).
template <int kVec, class ShapeOf, class Body>
void with_heads(const char* op, QkNormKind kind, const ShapeOf& shape_of, Body&& body) {
  auto with_kind = [&]<int kPer>(const BlockShape& shape) {
    switch (kind) {
      case QkNormKind::none:
        return body.template operator()<kPer, QkNormKind::none>(shape);
      case QkNormKind::per_head:
        return body.template operator()<kPer, QkNormKind::per_head>(shape);
      case QkNormKind::full_width:
        return body.template operator()<kPer, QkNormKind::full_width>(shape);
    }
  };
  if constexpr (kVec > 1) {
    const BlockShape narrow = shape_of(kVec, 1);
    if (narrow.lanes > 0) return with_kind.template operator()<1>(narrow);
  }
  const BlockShape wide = shape_of(kVec, kMaxPer);
  if (wide.lanes > 0) return with_kind.template operator()<kMaxPer>(wide);
  fail(ExitCode::usage, "{}: these heads do not fit a block of the CUDA kernel", op);
}

// Halves of a head are whole vectors too.
template <class... Views>
bool heads_are_vectors(int64_t Q, DType dtype, const Views&... views) {
  return Q / 2 * dtype_bytes(dtype) % 16 == 0 && rows_are_vectors(views...);
}

HeadShape head_shape(QkNormKind kind, int64_t heads, int64_t first, int64_t Q) {
  const int64_t width = kind == QkNormKind::full_width ? heads * Q : Q;
  return {static_cast<int>(heads), static_cast<int>(first), static_cast<float>(width)};
}

template <class T, class Args>
Angles<T> angles_of(const Args& args) {
  return {rows_of<const float>(args.cos_SC), rows_of<const float>(args.sin_SC),
          args.position_T.pointer(), args.cos_SC[0]};
}

// Shared memory of a backward block: the queue, or a leaf's gradients by head, `width` in all.
template <int kVec, int kPer>
int64_t backward_bytes(const BlockShape& shape, int64_t width) {
  const int64_t queued = kIsQueued<kVec, kPer> ? kStages * kStageVectors * 16 * shape.threads : 0;
  return std::max(queued, 4 * width);
}

}  // namespace

void qk_norm_rope(const QkNormRopeArgs& args, Stream& stream) {
  const int64_t T_count = args.q_THQ[0], H = args.q_THQ[1], Q = args.q_THQ[2], G = args.k_TGQ[1];
  const DType dtype = args.q_THQ.dtype;
  CHECK(args.k_TGQ.dtype == dtype && args.q_out_THQ.dtype == dtype);
  CHECK(args.k_out_TGQ.dtype == dtype);
  CHECK(args.q_gain.empty() || args.q_gain.dtype == dtype);
  const bool vectors = heads_are_vectors(Q, dtype, args.q_THQ, args.k_TGQ, args.q_gain, args.k_gain,
                                         args.cos_SC, args.sin_SC, args.q_out_THQ, args.k_out_TGQ);
  with_storage(dtype, vectors, [&]<class T, int kVec>() {
    RopeForward<T> a{.q = {head_shape(args.kind, H, 0, Q), rows_of<const T>(args.q_THQ),
                           static_cast<const T*>(args.q_gain.data), rows_of<T>(args.q_out_THQ),
                           rows_of<float>(args.q_rstd)},
                     .k = {head_shape(args.kind, G, H, Q), rows_of<const T>(args.k_TGQ),
                           static_cast<const T*>(args.k_gain.data), rows_of<T>(args.k_out_TGQ),
                           rows_of<float>(args.k_rstd)},
                     .angles = angles_of<T>(args),
                     .Q = static_cast<int>(Q),
                     .lanes = 0,
                     .q_warps = 0,
                     .epsilon = args.epsilon};
    const auto shape_of = [&](int vec, int per) { return forward_shape(H, G, Q / 2, vec, per); };
    with_heads<kVec>("qk_norm_rope", args.kind, shape_of,
                     [&]<int kPer, QkNormKind kKind>(const BlockShape& shape) {
                       a.lanes = shape.lanes, a.q_warps = shape.q_warps;
                       const bool is_full = kKind == QkNormKind::full_width;
                       launch("qk_norm_rope", qk_norm_rope_kernel<T, kVec, kPer, kKind>,
                              {.blocks = T_count,
                               .threads = shape.threads,
                               .shared_bytes = is_full ? 4 * (H + G) : 0},
                              stream, a);
                     });
  });
}

void qk_norm_rope_backward(const QkNormRopeBackwardArgs& args, Stream& stream) {
  const int64_t T_count = args.d_q_out_THQ[0], H = args.d_q_out_THQ[1], Q = args.d_q_out_THQ[2];
  const int64_t G = args.d_k_out_TGQ[1];
  const DType dtype = args.d_q_out_THQ.dtype;
  CHECK(args.d_k_out_TGQ.dtype == dtype && args.d_q_THQ.dtype == dtype);
  CHECK(args.d_k_TGQ.dtype == dtype && (args.q_THQ.empty() || args.q_THQ.dtype == dtype));
  const bool vectors = heads_are_vectors(Q, dtype, args.d_q_out_THQ, args.d_k_out_TGQ, args.q_THQ,
                                         args.k_TGQ, args.q_gain, args.k_gain, args.cos_SC,
                                         args.sin_SC, args.d_q_THQ, args.d_k_TGQ);
  const int64_t block_tokens = args.kind == QkNormKind::none ? kPlainTokens : args.block_tokens;
  with_storage(dtype, vectors, [&]<class T, int kVec>() {
    RopeBackward<T> a{.q = {head_shape(args.kind, H, 0, Q), rows_of<const T>(args.d_q_out_THQ),
                            rows_of<const T>(args.q_THQ), static_cast<const T*>(args.q_gain.data),
                            rows_of<const float>(args.q_rstd), rows_of<T>(args.d_q_THQ),
                            rows_of<float>(args.d_q_gain_leaf_BN)},
                      .k = {head_shape(args.kind, G, H, Q), rows_of<const T>(args.d_k_out_TGQ),
                            rows_of<const T>(args.k_TGQ), static_cast<const T*>(args.k_gain.data),
                            rows_of<const float>(args.k_rstd), rows_of<T>(args.d_k_TGQ),
                            rows_of<float>(args.d_k_gain_leaf_BN)},
                      .angles = angles_of<T>(args),
                      .T_count = T_count,
                      .block_tokens = block_tokens,
                      .Q = static_cast<int>(Q),
                      .lanes = 0};
    const auto shape_of = [&](int vec, int per) { return backward_shape(H + G, Q / 2, vec, per); };
    with_heads<kVec>("qk_norm_rope_backward", args.kind, shape_of,
                     [&]<int kPer, QkNormKind kKind>(const BlockShape& shape) {
                       a.lanes = shape.lanes;
                       launch("qk_norm_rope_backward",
                              qk_norm_rope_backward_kernel<T, kVec, kPer, kKind>,
                              {.blocks = blocks_for(T_count, block_tokens),
                               .threads = shape.threads,
                               .shared_bytes = backward_bytes<kVec, kPer>(shape, (H + G) * Q)},
                              stream, a);
                     });
  });
}

}  // namespace cambium::cuda
