// Query/key normalisation and rotary embedding on the GPU. A head is 1, 2, 4, ... 32 neighbouring
// lanes; a lane holds vectors of the head's first half and the same columns of its second half, so
// that the rotation stays inside the lane.
//
// D2: a head's sum depends on Q and the vector width, a full width's on the heads too. Forward: a
// block takes a token, a warp some of its query or key heads, 32 / lanes in a pass; it reads the
// angle once for all its passes, whose loads are under way together. Backward without a norm is the
// same by the opposite angle. With a norm a block has a leaf, and its order of d_gain's sum is the
// leaf's own, whoever computes it (D3). per_head: the queries and the keys of a leaf have a block
// each, warp w takes the leaf's tokens w, w + 4, ... and of each token the passes in order; lanes
// that hold the same columns are added by a butterfly, then the warps in order. full_width: all
// heads of a token at once, a lane adds its columns over the tokens in order.
// Napkin: at 32 + 4 heads of 128 in bf16, 8 lanes a head, 3 warps and 9 KB of loads a token; 16
// warps of a multiprocessor with 6 KB of loads each under way in the backward pass.
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

// A leaf's queries, or its keys, by warps.
BlockShape leaf_shape(int64_t half, int vec, int per) {
  const int64_t lanes = lanes_of(half, vec, per);
  if (lanes > kWarpLanes) return {};
  return {static_cast<int>(lanes), kLeafThreads};
}

// All heads at once.
BlockShape full_shape(int64_t heads, int64_t half, int vec, int per) {
  const int64_t lanes = lanes_of(half, vec, per);
  if (lanes > kWarpLanes || heads * lanes > full_threads(per)) return {};
  return {static_cast<int>(lanes),
          static_cast<int>(blocks_for(heads * lanes, kWarpLanes) * kWarpLanes)};
}

// body.operator()<kPer>(shape) with the fewest vectors a lane that fit a block, by
// shape_of(vec, per).
template <int kVec, class ShapeOf, class Body>
void with_vectors(const char* op, const ShapeOf& shape_of, Body&& body) {
  if constexpr (kVec > 1) {
    const BlockShape narrow = shape_of(kVec, 1);
    if (narrow.lanes > 0) return body.template operator()<1>(narrow);
  }
  const BlockShape wide = shape_of(kVec, kMaxPer);
  if (wide.lanes > 0) return body.template operator()<kMaxPer>(wide);
  fail(ExitCode::usage, "{}: these heads do not fit a block of the CUDA kernel", op);
}

template <class T, int kVec>
void launch_forward(const char* op, QkNormKind kind, RopeForward<T> a, int64_t T_count,
                    Stream& stream) {
  const int H = a.q.shape.heads, G = a.k.shape.heads;
  const auto shape_of = [&](int vec, int per) { return forward_shape(H, G, a.Q / 2, vec, per); };
  with_vectors<kVec>(op, shape_of, [&]<int kPer>(const BlockShape& shape) {
    a.lanes = shape.lanes, a.q_warps = shape.q_warps;
    LaunchShape blocks{.blocks = T_count, .threads = shape.threads};
    switch (kind) {
      case QkNormKind::none:
        return launch(op, qk_norm_rope_kernel<T, kVec, kPer, QkNormKind::none>, blocks, stream, a);
      case QkNormKind::per_head:
        return launch(op, qk_norm_rope_kernel<T, kVec, kPer, QkNormKind::per_head>, blocks, stream,
                      a);
      case QkNormKind::full_width:
        blocks.shared_bytes = 4 * (H + G);
        return launch(op, qk_norm_rope_kernel<T, kVec, kPer, QkNormKind::full_width>, blocks,
                      stream, a);
    }
  });
}

// With a norm.
template <class T, int kVec>
void launch_backward(const char* op, QkNormKind kind, RopeBackward<T> a, Stream& stream) {
  const int heads = a.q.shape.heads + a.k.shape.heads;
  const bool is_full = kind == QkNormKind::full_width;
  const auto shape_of = [&](int vec, int per) {
    return is_full ? full_shape(heads, a.Q / 2, vec, per) : leaf_shape(a.Q / 2, vec, per);
  };
  with_vectors<kVec>(op, shape_of, [&]<int kPer>(const BlockShape& shape) {
    a.lanes = shape.lanes;
    const int64_t queued =
        kIsQueued<kVec, kPer> ? int64_t{kStages * kStageVectors * 16} * shape.threads : 0;
    if (is_full) {
      return launch(op, full_backward_kernel<T, kVec, kPer>,
                    {.blocks = a.leaves, .threads = shape.threads, .shared_bytes = queued}, stream,
                    a);
    }
    launch(op, head_backward_kernel<T, kVec, kPer>,
           {.blocks = 2 * a.leaves,
            .threads = shape.threads,
            .shared_bytes = std::max(queued, int64_t{4 * kLeafWarps} * a.Q)},
           stream, a);
  });
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
    launch_forward<T, kVec>("qk_norm_rope", args.kind,
                            {.q = {head_shape(args.kind, H, 0, Q), rows_of<const T>(args.q_THQ),
                                   static_cast<const T*>(args.q_gain.data),
                                   rows_of<T>(args.q_out_THQ), rows_of<float>(args.q_rstd)},
                             .k = {head_shape(args.kind, G, H, Q), rows_of<const T>(args.k_TGQ),
                                   static_cast<const T*>(args.k_gain.data),
                                   rows_of<T>(args.k_out_TGQ), rows_of<float>(args.k_rstd)},
                             .angles = angles_of<T>(args),
                             .Q = static_cast<int>(Q),
                             .epsilon = args.epsilon},
                            T_count, stream);
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
  const char* op = "qk_norm_rope_backward";
  with_storage(dtype, vectors, [&]<class T, int kVec>() {
    const HeadShape q = head_shape(args.kind, H, 0, Q), k = head_shape(args.kind, G, H, Q);
    if (args.kind == QkNormKind::none) {
      return launch_forward<T, kVec>(
          op, args.kind,
          {.q = {q, rows_of<const T>(args.d_q_out_THQ), nullptr, rows_of<T>(args.d_q_THQ), {}},
           .k = {k, rows_of<const T>(args.d_k_out_TGQ), nullptr, rows_of<T>(args.d_k_TGQ), {}},
           .angles = angles_of<T>(args),
           .Q = static_cast<int>(Q),
           .direction = -1},
          T_count, stream);
    }
    launch_backward<T, kVec>(
        op, args.kind,
        {.q = {q, rows_of<const T>(args.d_q_out_THQ), rows_of<const T>(args.q_THQ),
               static_cast<const T*>(args.q_gain.data), rows_of<const float>(args.q_rstd),
               rows_of<T>(args.d_q_THQ), rows_of<float>(args.d_q_gain_leaf_BN)},
         .k = {k, rows_of<const T>(args.d_k_out_TGQ), rows_of<const T>(args.k_TGQ),
               static_cast<const T*>(args.k_gain.data), rows_of<const float>(args.k_rstd),
               rows_of<T>(args.d_k_TGQ), rows_of<float>(args.d_k_gain_leaf_BN)},
         .angles = angles_of<T>(args),
         .T_count = T_count,
         .block_tokens = args.block_tokens,
         .leaves = blocks_for(T_count, args.block_tokens),
         .Q = static_cast<int>(Q)},
        stream);
  });
}

}  // namespace cambium::cuda
