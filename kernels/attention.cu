// Attention on the GPU: tensor cores for bf16 and head dims that are multiples of 8 up to 128,
// plain kernels for the rest. The choice depends on dtype, head dim and strides, never on T (D2).
#include <algorithm>
#include <climits>

#include "kernels/attention_key_gradient.cuh"
#include "kernels/attention_plain.cuh"
#include "kernels/attention_query_gradient.cuh"

namespace cambium::cuda {

namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, without linking the driver: a build machine has none.
EncodeTiled encode_tiled() {
  static const EncodeTiled found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                cudaEnableDefault, &result),
               "cuTensorMapEncodeTiled");
    CHECK(result == cudaDriverEntryPointSuccess);
    return reinterpret_cast<EncodeTiled>(function);
  }();
  return found;
}

template <class Args>
AttentionShape attention_shape(const Args& a) {
  const int64_t T = a.k_TGQ[0];
  const int64_t S = a.part == KeyPart::all ? a.sequence_length : a.sequence_length / a.share.ranks;
  CHECK_LT(T * a.share.ranks, int64_t{INT_MAX});
  CHECK_GT(a.scale, 0.0f);  // the largest score is that of the largest product
  return {.sequences = static_cast<int>(T / S),
          .S = static_cast<int>(S),
          .H = static_cast<int>(a.q_THQ[1]),
          .G = static_cast<int>(a.k_TGQ[1]),
          .Q = static_cast<int>(a.q_THQ[2]),
          .scale = a.scale,
          .document_start = a.document_start_T.pointer()};
}

// A ring's first part is the rank's own: every query sees a key of it, so that nothing is added to.
template <class Args>
PartAttentionShape part_shape(const Args& a, const AttentionShape& shape) {
  CHECK_EQ(a.part == KeyPart::first, a.key_rank == a.share.index);
  return {shape, a.share, {a.share.ranks, a.key_rank}, a.part == KeyPart::next};
}

constexpr int kTmaAlignmentBytes = 16;

// Whether TMA can carry every tensor, fp32 sums of parts have aligned rows too, and a padded head
// fits a tile.
template <class Args>
bool fits_tensor_cores(const Args& a) {
  bool fits = a.q_THQ[2] % 8 == 0 && a.q_THQ[2] <= 2 * kPanelColumns;
  visit_views(a, [&](const char*, const RawView& view) {
    if (view.shape.rank != 3 || view.empty()) return;
    fits = fits && view.row_stride * dtype_bytes(view.dtype) % kTmaAlignmentBytes == 0 &&
           reinterpret_cast<uintptr_t>(view.data) % kTmaAlignmentBytes == 0;
  });
  return fits && a.q_THQ.dtype == DType::bf16;
}

template <class Shape>
int64_t persistent_blocks(const Shape& shape) {
  const int64_t tiles = int64_t{shape.query_tiles()} * shape.sequences * shape.H;
  CHECK_LT(tiles, int64_t{INT_MAX / 2});
  return std::min<int64_t>(tiles, multiprocessors());
}

// Of the parts so far, or of all keys.
RawView lse_of(const AttentionArgs& a) {
  return a.part == KeyPart::all ? RawView(a.lse_TH) : RawView(a.lse_sum_TH);
}

template <int kColumns, class Shape>
void forward_tiles(const AttentionArgs& a, const Shape& shape, Stream& stream) {
  ForwardMaps maps{attention_map(a.q_THQ, shape, kTileRows),
                   attention_map(a.k_TGQ, shape, kTileRows),
                   attention_map(a.v_TGQ, shape, kTileRows),
                   {}};
  if constexpr (!Shape::kIsPart) maps.o = attention_map(a.o_THQ, shape, kWarpgroupRows);
  const RawView lse = lse_of(a);
  launch("attention", attention_forward_kernel<kColumns, Shape>,
         {.blocks = persistent_blocks(shape),
          .threads = kTileThreads,
          .shared_bytes = sizeof(ForwardShared<kColumns>)},
         stream, maps,
         ForwardArgs<Shape>{shape, static_cast<float*>(lse.data), lse.row_stride,
                            a.o_sum_THQ.pointer(), a.o_sum_THQ.row_stride});
}

// Where the dK and dV of shared sequences go.
struct KeySums {
  explicit KeySums(const AttentionBackwardArgs& a)
      : d_k(a.d_k_chain_SC.empty() ? RawView(a.d_k_sum_SC) : RawView(a.d_k_chain_SC)),
        d_v(a.d_v_chain_SC.empty() ? RawView(a.d_v_sum_SC) : RawView(a.d_v_chain_SC)) {}
  RawView d_k, d_v;
};

template <int kColumns, class Shape>
void backward_tiles(const AttentionBackwardArgs& a, const Shape& shape, Stream& stream) {
  const DeltaArgs delta{static_cast<const __nv_bfloat16*>(a.o_THQ.data),
                        static_cast<const __nv_bfloat16*>(a.d_o_THQ.data),
                        a.o_THQ.row_stride,
                        a.d_o_THQ.row_stride,
                        a.q_THQ[0] * shape.H,
                        shape.H,
                        shape.Q,
                        a.delta_TH.pointer(),
                        a.delta_TH.row_stride};
  constexpr int kRowsPerBlock = kDeltaThreads / kDeltaLanes;
  launch("attention delta", attention_delta_kernel,
         {.blocks = blocks_for(delta.rows, kRowsPerBlock), .threads = kDeltaThreads}, stream,
         delta);
  BackwardMaps maps{attention_map(a.q_THQ, shape, kTileRows),
                    attention_map(a.d_o_THQ, shape, kTileRows),
                    attention_map(a.k_TGQ, shape, kTileRows),
                    attention_map(a.v_TGQ, shape, kTileRows),
                    {},
                    {},
                    {}};
  if constexpr (!Shape::kIsPart) maps.d_q = attention_map(a.d_q_THQ, shape, kWarpgroupRows);
  if constexpr (!Shape::kIsShared) {
    maps.d_k = attention_map(a.d_k_TGQ, shape, kWarpgroupRows);
    maps.d_v = attention_map(a.d_v_TGQ, shape, kWarpgroupRows);
  }
  const KeySums sums(a);
  const BackwardArgs<Shape> args{shape,
                                 a.lse_TH.pointer(),
                                 a.lse_TH.row_stride,
                                 a.delta_TH.pointer(),
                                 a.delta_TH.row_stride,
                                 static_cast<float*>(sums.d_k.data),
                                 static_cast<float*>(sums.d_v.data),
                                 sums.d_k.row_stride,
                                 sums.d_v.row_stride,
                                 a.d_q_sum_THQ.pointer(),
                                 a.d_q_sum_THQ.row_stride};
  launch("attention d_q", attention_query_gradient_kernel<kColumns, Shape>,
         {.blocks = persistent_blocks(shape),
          .threads = kTileThreads,
          .shared_bytes = sizeof(QueryGradientShared<kColumns>)},
         stream, maps, args);
  maps.q = attention_map(a.q_THQ, shape, kStepRows);
  maps.d_o = attention_map(a.d_o_THQ, shape, kStepRows);
  const int split = shape.heads() % 2 == 0 && !a.one_chain ? 2 : 1;
  launch("attention d_k, d_v",
         split == 2 ? attention_key_gradient_kernel<kColumns, 2, Shape>
                    : attention_key_gradient_kernel<kColumns, 1, Shape>,
         {.blocks = int64_t{split} * shape.key_tiles() * shape.sequences * shape.G,
          .threads = kTileThreads,
          .shared_bytes = sizeof(KeyGradientShared<kColumns>),
          .cluster = split},
         stream, maps, args);
}

enum class PlainRows { queries, keys };
template <class T, class Shape>
void launch_plain(void (*kernel)(PlainArgs<T, Shape>), PlainRows rows, Stream& stream,
                  const PlainArgs<T, Shape>& args) {
  const Shape& shape = args.shape;
  const int64_t length =
      rows == PlainRows::keys ? shape.S : shape.end_query() - shape.first_query();
  const int heads = rows == PlainRows::keys ? shape.G : shape.H;
  launch("attention", kernel,
         {.blocks = blocks_for(int64_t{shape.sequences} * length * heads, kPlainWarps),
          .threads = kPlainWarps * kWarpLanes},
         stream, args);
}

template <class T, class Shape, class Args>
PlainArgs<T, Shape> plain_args(const Args& a, const Shape& shape) {
  if (shape.Q > kPlainColumns) {
    fail(ExitCode::usage, "attention: head dim {} exceeds {} on the GPU; set run.device = \"cpu\"",
         shape.Q, kPlainColumns);
  }
  PlainArgs<T, Shape> plain{};
  plain.shape = shape;
  plain.q = plain_tensor<const T>(a.q_THQ);
  plain.k = plain_tensor<const T>(a.k_TGQ);
  plain.v = plain_tensor<const T>(a.v_TGQ);
  return plain;
}

template <class T, class Shape>
void forward_plain(const AttentionArgs& a, const Shape& shape, Stream& stream) {
  auto plain = plain_args<T>(a, shape);
  if constexpr (Shape::kIsPart) {
    plain.o_out = plain_tensor<float>(a.o_sum_THQ);
  } else {
    plain.o_out = plain_tensor<T>(a.o_THQ);
  }
  const RawView lse = lse_of(a);
  plain.lse_out = static_cast<float*>(lse.data);
  plain.lse_stride = lse.row_stride;
  launch_plain(attention_plain_kernel<T, Shape>, PlainRows::queries, stream, plain);
}

template <class T, class Shape>
void backward_plain(const AttentionBackwardArgs& a, const Shape& shape, Stream& stream) {
  auto plain = plain_args<T>(a, shape);
  plain.o = plain_tensor<const T>(a.o_THQ);
  plain.d_o = plain_tensor<const T>(a.d_o_THQ);
  if constexpr (Shape::kIsPart) {
    plain.d_q = plain_tensor<float>(a.d_q_sum_THQ);
  } else {
    plain.d_q = plain_tensor<T>(a.d_q_THQ);
  }
  if constexpr (Shape::kIsShared) {
    const KeySums sums(a);
    plain.d_k = plain_tensor<float>(sums.d_k);
    plain.d_v = plain_tensor<float>(sums.d_v);
  } else {
    plain.d_k = plain_tensor<T>(a.d_k_TGQ);
    plain.d_v = plain_tensor<T>(a.d_v_TGQ);
  }
  plain.lse = a.lse_TH.pointer();
  plain.lse_stride = a.lse_TH.row_stride;
  plain.delta = a.delta_TH.pointer();
  plain.delta_stride = a.delta_TH.row_stride;
  launch_plain(attention_plain_delta_kernel<T, Shape>, PlainRows::queries, stream, plain);
  launch_plain(attention_plain_query_gradient_kernel<T, Shape>, PlainRows::queries, stream, plain);
  launch_plain(attention_plain_key_gradient_kernel<T, Shape>, PlainRows::keys, stream, plain);
}

template <class Args>
void check_whole_tiles(const Args& a) {
  CHECK_EQ(a.sequence_length % (2 * a.share.ranks * kAttentionTile), 0);  // derive() asks for it
}

template <class Shape>
void attention_of(const AttentionArgs& a, const Shape& shape, Stream& stream) {
  if (fits_tensor_cores(a)) {
    if constexpr (Shape::kIsShared) check_whole_tiles(a);
    if (shape.Q <= kPanelColumns) return forward_tiles<kPanelColumns>(a, shape, stream);
    return forward_tiles<2 * kPanelColumns>(a, shape, stream);
  }
  if (a.q_THQ.dtype == DType::f32) return forward_plain<float>(a, shape, stream);
  forward_plain<__nv_bfloat16>(a, shape, stream);
}

template <class Shape>
void attention_backward_of(const AttentionBackwardArgs& a, const Shape& shape, Stream& stream) {
  if (fits_tensor_cores(a)) {
    if constexpr (Shape::kIsShared) check_whole_tiles(a);
    if (shape.Q <= kPanelColumns) return backward_tiles<kPanelColumns>(a, shape, stream);
    return backward_tiles<2 * kPanelColumns>(a, shape, stream);
  }
  if (a.q_THQ.dtype == DType::f32) return backward_plain<float>(a, shape, stream);
  backward_plain<__nv_bfloat16>(a, shape, stream);
}

}  // namespace

CUtensorMap attention_map(const RawView& view, const AttentionShape& shape, int rows) {
  const auto Q = static_cast<cuuint64_t>(shape.Q);
  const auto S = static_cast<cuuint64_t>(view[0] / shape.sequences);
  const auto row_bytes = static_cast<cuuint64_t>(view.row_stride) * 2;
  const cuuint64_t extents[4] = {Q, static_cast<cuuint64_t>(view[1]), S,
                                 static_cast<cuuint64_t>(shape.sequences)};
  const cuuint64_t strides[3] = {Q * 2, row_bytes, row_bytes * S};
  const cuuint32_t box[4] = {kPanelColumns, 1, static_cast<cuuint32_t>(rows), 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, view.data, extents, strides, box,
                     element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  CHECK_EQ(static_cast<int>(result), static_cast<int>(CUDA_SUCCESS));
  return map;
}

void attention(const AttentionArgs& args, Stream& stream) {
  if (args.q_THQ[0] == 0) return;
  if (args.kernel == AttentionKernel::cudnn) return attention_cudnn(args, stream);
  const AttentionShape shape = attention_shape(args);
  if (args.share.ranks == 1) return attention_of(args, shape, stream);
  if (args.part != KeyPart::all) return attention_of(args, part_shape(args, shape), stream);
  attention_of(args, SharedAttentionShape{shape, args.share}, stream);
}

void attention_backward(const AttentionBackwardArgs& args, Stream& stream) {
  if (args.q_THQ[0] == 0) return;
  if (args.kernel == AttentionKernel::cudnn) return attention_backward_cudnn(args, stream);
  const AttentionShape shape = attention_shape(args);
  if (args.share.ranks == 1) return attention_backward_of(args, shape, stream);
  CHECK(args.d_k_partial_MC.empty());  // the CPU's
  if (args.part != KeyPart::all) {
    return attention_backward_of(args, part_shape(args, shape), stream);
  }
  attention_backward_of(args, SharedAttentionShape{shape, args.share, args.queries}, stream);
}

}  // namespace cambium::cuda
