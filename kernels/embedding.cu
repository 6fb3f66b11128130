// Embedding on the GPU: the forward pass gathers rows; the weight gradient gives each token id to
// one block, which reads the id's rows of d_x in position order.
//
// A first kernel counts every id's rows (integer atomics: sums do not depend on their order) and
// finds its first one. `accumulate`: a block per position, at work where the id occurs first; it
// walks the tokens until it has met all of the id's rows, so an id that occurs once costs no walk.
// `nodes`: a block per id and the canonical tree of kernels/canonical_tree.cuh.
// Napkin, accumulate: d_x once, 8 D per distinct id, at most 2 T bytes of tokens an id that
// repeats.
#include "kernels/embedding.h"

#include "kernels/canonical_tree.cuh"
#include "kernels/permute.h"

namespace cambium::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kRowsInFlight = 8;
constexpr int kDepth = 31;  // a token's block number is an int

// What the ids' blocks need to know: rows of an id, and its first position (INT_MAX: none).
struct IdTable {
  int32_t* count_V;
  int32_t* first_V;
};

struct EmbeddingWgrad {
  const void* d_x_TD;
  int64_t d_x_stride;
  const int32_t* token_T;
  Rows<float> d_w_SVD;
  Rows<uint8_t> present_SV;
  Rows<const int32_t> node_table_NC;
  IdTable ids;
  int64_t first_block;
  int T_count, D, V, nodes, slots, block_tokens;
};

__global__ void __launch_bounds__(kThreads) clear_ids_kernel(IdTable ids, int V) {
  const int v = static_cast<int>(blockIdx.x) * kThreads + threadIdx.x;
  if (v >= V) return;
  ids.count_V[v] = 0;
  ids.first_V[v] = INT_MAX;
}

__global__ void __launch_bounds__(kThreads)
    count_ids_kernel(const int32_t* token_T, int T_count, IdTable ids, int V) {
  const int t = static_cast<int>(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= T_count) return;
  const int32_t id = token_T[t];
  device_check(id >= 0 && id < V);
  atomicAdd(ids.count_V + id, 1);  // tidy: allow float-atomics: integers
  atomicMin(ids.first_V + id, t);
}

// Positions t in [begin, begin + kThreads) below `end` with token `id`, ascending, into `found`;
// returns their number. The whole block calls it.
__device__ __forceinline__ int find_rows(const int32_t* token_T, int begin, int end, int32_t id,
                                         int* found) {
  __shared__ unsigned match[kThreads / kWarpLanes];
  const int t = begin + threadIdx.x, warp = threadIdx.x / kWarpLanes;
  const bool is_match = t < end && token_T[t] == id;
  const unsigned lanes = __ballot_sync(kAllLanes, is_match);
  __syncthreads();  // the last call's matches and rows were read
  if (threadIdx.x % kWarpLanes == 0) match[warp] = lanes;
  __syncthreads();
  int total = 0, before = 0;
  for (int w = 0; w < kThreads / kWarpLanes; ++w) {
    if (w == warp) before = total;
    total += __popc(match[w]);
  }
  if (is_match) found[before + __popc(lanes & ((1u << threadIdx.x % kWarpLanes) - 1))] = t;
  __syncthreads();
  return total;
}

// body(row, values) for the rows of `id` in [begin, end), ascending, until `rows` were met;
// `values` are the row's elements at `column`.
template <class T, int kVec, class Body>
__device__ __forceinline__ void for_rows(const EmbeddingWgrad& a, int32_t id, int begin, int end,
                                         int rows, int column, Body&& body) {
  __shared__ int found[kThreads];
  const T* d_x = static_cast<const T*>(a.d_x_TD) + column;
  for (int tile = begin; tile < end && rows > 0; tile += kThreads) {
    const int count = find_rows(a.token_T, tile, end, id, found);
    rows -= count;
    if (column >= a.D) continue;
    for (int first = 0; first < count; first += kRowsInFlight) {
      Packed<T, kVec> packed[kRowsInFlight];
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        if (first + i < count) {
          packed[i] = load_packed<T, kVec>(d_x + found[first + i] * a.d_x_stride);
        }
      }
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        if (first + i >= count) break;
        float values[kVec];
        unpack(packed[i], values);
        body(found[first + i], values);
      }
    }
  }
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads, 4) wgrad_accumulate_kernel(const EmbeddingWgrad a) {
  const int t = static_cast<int>(blockIdx.x);
  const int32_t id = a.token_T[t];
  if (a.ids.first_V[id] != t) return;
  const int rows = a.ids.count_V[id];
  for (int first = 0; first < a.D; first += kThreads * kVec) {
    const int column = first + threadIdx.x * kVec;
    float* to = a.d_w_SVD.data + int64_t{id} * a.D + column;
    float sum[kVec] = {};
    if (column < a.D) load_floats<kVec>(to, sum);
    const auto add = [&](int, const float(&values)[kVec]) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum[j] += values[j];
    };
    if (rows > 1) {
      for_rows<T, kVec>(a, id, t, a.T_count, rows, column, add);
    } else if (column < a.D) {
      float values[kVec];
      load_values<T, kVec>(static_cast<const T*>(a.d_x_TD) + t * a.d_x_stride + column, values);
      add(t, values);
    }
    if (column < a.D) store_floats<kVec>(to, sum);
  }
}

// The canonical tree sum of the id's rows in blocks [begin, end), local numbers, at `column`.
template <class T, int kVec>
__device__ __forceinline__ bool tree_sum_rows(const EmbeddingWgrad& a, int32_t id, int begin,
                                              int end, int column, float (&sum)[kVec]) {
  TreeStack<float, kVec, kDepth> stack;
  float leaf[kVec];
  int block = -1;  // of `leaf`
  for_rows<T, kVec>(a, id, begin * a.block_tokens, end * a.block_tokens, INT_MAX, column,
                    [&](int row, const float(&values)[kVec]) {
                      if (row / a.block_tokens != block) {
                        if (block >= 0) stack.push(block - begin, leaf);
                        block = row / a.block_tokens;
#pragma unroll
                        for (int j = 0; j < kVec; ++j) leaf[j] = 0.0f;
                      }
#pragma unroll
                      for (int j = 0; j < kVec; ++j) leaf[j] += values[j];
                    });
  if (block >= 0) stack.push(block - begin, leaf);
  return stack.finish(sum);
}

// slots[destination] of the id = the folds of the node's present left slots over `sum`, where
// `row_count` > 0.
template <int kVec>
__device__ __forceinline__ void fold_row(const EmbeddingWgrad& a, const int32_t* node, int32_t id,
                                         int column, int row_count, float (&sum)[kVec]) {
  bool has_value = row_count > 0;
  const int64_t offset = int64_t{id} * a.D + column;
  for (int f = 0; f < node[kNodeFoldCount]; ++f) {
    const int slot = node[kNodeFirstFold + f];
    if (a.present_SV.row(slot)[id] == 0) continue;
    float left[kVec];
    load_floats<kVec>(a.d_w_SVD.row(slot) + offset, left);
#pragma unroll
    for (int j = 0; j < kVec; ++j) sum[j] = has_value ? left[j] + sum[j] : left[j];
    has_value = true;
  }
  if (has_value) store_floats<kVec>(a.d_w_SVD.row(node[kNodeDestination]) + offset, sum);
}

__device__ __forceinline__ bool any_fold_present(const EmbeddingWgrad& a, const int32_t* node,
                                                 int32_t id) {
  bool is_any = false;
  for (int f = 0; f < node[kNodeFoldCount]; ++f) {
    is_any |= a.present_SV.row(node[kNodeFirstFold + f])[id] != 0;
  }
  return is_any;
}

// Whether `id` occurs in the tokens [begin, end).
__device__ __forceinline__ bool occurs_in(const EmbeddingWgrad& a, int32_t id, int begin, int end) {
  bool is_match = false;
  for (int t = begin + threadIdx.x; t < end; t += kThreads) is_match |= a.token_T[t] == id;
  return __syncthreads_or(is_match) != 0;
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) wgrad_nodes_kernel(const EmbeddingWgrad a) {
  const int32_t id = static_cast<int32_t>(blockIdx.x);
  for (int n = 0; n < a.nodes; ++n) {
    const int32_t* node = a.node_table_NC.row(n);
    const int begin = static_cast<int>(node[kNodeFirstBlock] - a.first_block);
    const int end = static_cast<int>(node[kNodeEndBlock] - a.first_block);
    device_check(begin >= 0 && begin < end && int64_t{end} * a.block_tokens <= a.T_count);
    device_check(node[kNodeDestination] >= 0 && node[kNodeDestination] < a.slots);
    const bool has_rows =
        a.ids.count_V[id] > 0 && occurs_in(a, id, begin * a.block_tokens, end * a.block_tokens);
    const bool is_present = has_rows || any_fold_present(a, node, id);
    for (int first = 0; first < a.D && is_present; first += kThreads * kVec) {
      const int column = first + threadIdx.x * kVec;
      float sum[kVec] = {};
      if (has_rows) tree_sum_rows<T, kVec>(a, id, begin, end, column, sum);
      if (column < a.D) fold_row<kVec>(a, node, id, column, has_rows ? 1 : 0, sum);
    }
    __syncthreads();
    if (threadIdx.x == 0) a.present_SV.row(node[kNodeDestination])[id] = is_present ? 1 : 0;
    __syncthreads();
  }
}

}  // namespace

void embedding(const EmbeddingArgs& args, Stream& stream) {
  gather_present_rows({.x_TD = args.w_VD, .index_M = args.token_T, .y_MD = args.x_TD}, stream);
}

void embedding_wgrad(const EmbeddingWgradArgs& args, Stream& stream) {
  const int64_t T_count = args.d_x_TD[0], D = args.d_x_TD[1], V = args.d_w_SVD[1];
  const bool is_nodes = args.target.mode == GradMode::nodes;
  CHECK_LT(T_count, int64_t{INT_MAX});
  if (args.target.mode == GradMode::store) {
    zero_matrices(args.d_w_SVD.pointer(), 1, V * D, V * D, stream);
  }
  const StreamScratch scratch(8 * V, stream);
  const EmbeddingWgrad a{.d_x_TD = args.d_x_TD.data,
                         .d_x_stride = args.d_x_TD.row_stride,
                         .token_T = args.token_T.pointer(),
                         .d_w_SVD = rows_of<float>(args.d_w_SVD),
                         .present_SV = rows_of<uint8_t>(args.present_SV),
                         .node_table_NC = rows_of<const int32_t>(args.target.node_table_NC),
                         .ids = {scratch.as<int32_t>(), scratch.as<int32_t>() + V},
                         .first_block = args.first_block,
                         .T_count = static_cast<int>(T_count),
                         .D = static_cast<int>(D),
                         .V = static_cast<int>(V),
                         .nodes = is_nodes ? static_cast<int>(args.target.node_table_NC[0]) : 0,
                         .slots = static_cast<int>(args.d_w_SVD[0]),
                         .block_tokens = static_cast<int>(args.block_tokens)};
  launch("embedding_wgrad", clear_ids_kernel,
         {.blocks = blocks_for(V, kThreads), .threads = kThreads}, stream, a.ids, a.V);
  launch("embedding_wgrad", count_ids_kernel,
         {.blocks = blocks_for(T_count, kThreads), .threads = kThreads}, stream, a.token_T,
         a.T_count, a.ids, a.V);
  const RawView row(In<float>(args.d_w_SVD.pointer(), Shape(1, D)));  // ids lie D elements apart
  const bool vectors = rows_are_vectors(args.d_x_TD, args.d_w_SVD, row);
  with_storage(args.d_x_TD.dtype, vectors, [&]<class T, int kVec>() {
    launch("embedding_wgrad",
           is_nodes ? wgrad_nodes_kernel<T, kVec> : wgrad_accumulate_kernel<T, kVec>,
           {.blocks = is_nodes ? V : T_count, .threads = kThreads}, stream, a);
  });
}

}  // namespace cambium::cuda
