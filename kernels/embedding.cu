// Embedding on the GPU: the forward pass gathers rows; the weight gradient gives an id's rows of
// d_x, in position order, to whoever adds them.
//
// A first kernel counts every id's rows (integer atomics: sums do not depend on their order) and
// finds its first one. `accumulate`: a warp per position, at work where the id occurs first; it
// walks the tokens until it has met all of the id's rows, so an id that occurs once costs no walk,
// and adds them. The order of the sum is that of positions, from the destination's value on, so an
// id of many rows cannot be cut into partial sums: its warp lists the rows, and blocks take 64
// bytes of its columns each, with 224 rows on their way. `nodes`: a block per id and the canonical
// tree of kernels/canonical_tree.cuh.
// Napkin, accumulate: d_x once, 8 D per distinct id, at most 4 T bytes of tokens an id that
// repeats.
#include "kernels/embedding.h"

#include "kernels/canonical_tree.cuh"
#include "kernels/permute.h"

namespace cambium::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kRowsInFlight = 8;
constexpr int kWarpRows = 8;     // of an id that one warp adds
constexpr int kTokensAhead = 8;  // of a lane that looks for an id's rows
constexpr int kChunks = 2;       // vectors of a row that a lane has at once
constexpr int kDepth = 31;       // a token's block number is an int

// What is known of an id: how many rows it has, and the first one's position (INT_MAX: none).
struct alignas(8) IdRows {
  int32_t count, first;
};
// Ids of more than kWarpRows rows are hot: their number is hot[0], the rows of them all are hot[1],
// and a hot id's rows begin at `begin` of row_T. Which place an id gets is chance; its rows are
// not.
struct HotId {
  int32_t id, begin;
};
struct IdTable {
  IdRows* rows_V;
  int32_t *hot, *row_T;
  HotId* hot_H;
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
  if (v < 2) ids.hot[v] = 0;
  if (v >= V) return;
  ids.rows_V[v] = {0, INT_MAX};
}

__global__ void __launch_bounds__(kThreads)
    count_ids_kernel(const int32_t* token_T, int T_count, IdTable ids, int V) {
  const int t = static_cast<int>(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= T_count) return;
  const int32_t id = token_T[t];
  device_check(id >= 0 && id < V);
  atomicAdd(&ids.rows_V[id].count, 1);  // tidy: allow float-atomics: integers
  atomicMin(&ids.rows_V[id].first, t);
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

// body(row, values) for the rows of `id` in [begin, end), ascending; `values` are the row's
// elements at `column`.
template <class T, int kVec, class Body>
__device__ __forceinline__ void for_rows(const EmbeddingWgrad& a, int32_t id, int begin, int end,
                                         int column, Body&& body) {
  __shared__ int found[kThreads];
  const T* d_x = static_cast<const T*>(a.d_x_TD) + column;
  for (int tile = begin; tile < end; tile += kThreads) {
    const int count = find_rows(a.token_T, tile, end, id, found);
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

// body(lanes, t, met) for each run of 32 positions from t on with the lanes that hold `id`, after
// `met` rows, until all `rows` of the id were met. `begin` is the first.
template <class Body>
__device__ __forceinline__ void for_matches(const EmbeddingWgrad& a, int32_t id, int begin,
                                            int rows, Body&& body) {
  const int lane = threadIdx.x % kWarpLanes;
  int met = 0;
  for (int first = begin; met < rows; first += kTokensAhead * kWarpLanes) {
    device_check(first < a.T_count);
    int32_t token[kTokensAhead];
#pragma unroll
    for (int i = 0; i < kTokensAhead; ++i) {
      const int t = first + i * kWarpLanes + lane;
      token[i] = t < a.T_count ? a.token_T[t] : -1;
    }
#pragma unroll
    for (int i = 0; i < kTokensAhead; ++i) {
      const unsigned lanes = __ballot_sync(kAllLanes, token[i] == id);
      if (lanes != 0) body(lanes, first + i * kWarpLanes, met);
      met += __popc(lanes);
    }
  }
}

// Lists the rows of a hot id for wgrad_hot_kernel. The warp calls it.
__device__ __forceinline__ void list_hot_id(const EmbeddingWgrad& a, int32_t id, int first,
                                            int rows) {
  const int lane = threadIdx.x % kWarpLanes;
  int begin = 0;
  if (lane == 0) {
    begin = atomicAdd(a.ids.hot + 1, rows);                   // tidy: allow float-atomics: integers
    a.ids.hot_H[atomicAdd(a.ids.hot, 1)] = HotId{id, begin};  // tidy: allow float-atomics: integers
  }
  begin = __shfl_sync(kAllLanes, begin, 0);
  for_matches(a, id, first, rows, [&](unsigned lanes, int t, int met) {
    const int before = __popc(lanes & ((1u << lane) - 1));
    if ((lanes >> lane & 1) != 0) a.ids.row_T[begin + met + before] = t + lane;
  });
}

// Adds the rows `row` of the first `rows` lanes, in order, to the id's gradient. The warp calls it.
template <class T, int kVec>
__device__ __forceinline__ void add_rows(const EmbeddingWgrad& a, int32_t id, int row, int rows) {
  constexpr int kColumns = kWarpLanes * kVec;  // of a chunk
  const T* d_x = static_cast<const T*>(a.d_x_TD);
  for (int chunk = 0; chunk < a.D; chunk += kChunks * kColumns) {
    const int first = chunk + threadIdx.x % kWarpLanes * kVec;
    float* to = a.d_w_SVD.data + int64_t{id} * a.D + first;
    float sum[kChunks][kVec];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (first + c * kColumns < a.D) load_floats<kVec>(to + c * kColumns, sum[c]);
    }
    for (int i = 0; i < rows; ++i) {
      const T* from = d_x + __shfl_sync(kAllLanes, row, i) * a.d_x_stride + first;
      Packed<T, kVec> packed[kChunks];
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (first + c * kColumns < a.D) packed[c] = load_packed<T, kVec>(from + c * kColumns);
      }
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        float values[kVec];
        unpack(packed[c], values);
#pragma unroll
        for (int j = 0; j < kVec; ++j) sum[c][j] += values[j];
      }
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (first + c * kColumns < a.D) store_floats<kVec>(to + c * kColumns, sum[c]);
    }
  }
}

// A warp per position.
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads, 4) wgrad_accumulate_kernel(const EmbeddingWgrad a) {
  const int lane = threadIdx.x % kWarpLanes;
  const int t = static_cast<int>(blockIdx.x) * (kThreads / kWarpLanes) + threadIdx.x / kWarpLanes;
  if (t >= a.T_count) return;
  const int32_t id = a.token_T[t];
  const auto [rows, first_t] = a.ids.rows_V[id];
  if (first_t != t) return;
  if (rows > kWarpRows) return list_hot_id(a, id, t, rows);
  int row = t;  // of the id's row number `lane`
  if (rows > 1) {
    for_matches(a, id, t, rows, [&](unsigned lanes, int first, int met) {
      const int number = lane - met;
      if (number >= 0 && number < __popc(lanes)) row = first + __fns(lanes, 0, number + 1);
    });
  }
  add_rows<T, kVec>(a, id, row, rows);
}

// A hot id's columns by blocks. A stage is kHotRows rows of kHotVectors vectors, of which every
// thread copies one; then each thread of the first columns adds its own, row by row.
constexpr int kHotVectors = 4, kHotRows = 32, kHotStages = 8;  // 64 bytes of a row, 224 rows ahead
constexpr int kHotThreads = kHotVectors * kHotRows;
constexpr int kHotBlocks = 1024;  // that share the hot ids, however many there are

template <class T, int kVec>
__global__ void __launch_bounds__(kHotThreads) wgrad_hot_kernel(const EmbeddingWgrad a) {
  constexpr int kColumns = kHotVectors * kVec;
  static_assert(kColumns <= kHotThreads);
  __shared__ alignas(16) T stages[kHotStages][kHotRows][kColumns];
  const int own_row = threadIdx.x / kHotVectors, own_column = threadIdx.x % kHotVectors * kVec;
  const int groups = (a.D + kColumns - 1) / kColumns;
  const T* d_x = static_cast<const T*>(a.d_x_TD);
  for (int item = blockIdx.x; item < a.ids.hot[0] * groups; item += kHotBlocks) {
    const HotId hot = a.ids.hot_H[item / groups];
    const int first = item % groups * kColumns, column = first + threadIdx.x;
    const int rows = a.ids.rows_V[hot.id].count, stage_count = (rows + kHotRows - 1) / kHotRows;
    const bool is_summing = threadIdx.x < kColumns && column < a.D;
    const auto row_of = [&](int stage) {
      const int number = stage * kHotRows + own_row;
      return number < rows ? a.ids.row_T[hot.begin + number] : -1;
    };
    const auto start = [&](int stage, int row) {
      T* to = &stages[stage % kHotStages][own_row][own_column];
      if (row >= 0 && first + own_column < a.D) {
        const T* from = d_x + row * a.d_x_stride + first + own_column;
        if constexpr (kVec == 1) {
          *to = *from;
        } else {
          copy_async(reinterpret_cast<uint4*>(to), from);
        }
      }
      end_copy_group();
    };
    int ahead[kHotStages];
#pragma unroll
    for (int stage = 0; stage < kHotStages; ++stage) ahead[stage] = row_of(stage);
#pragma unroll
    for (int stage = 0; stage < kHotStages - 1; ++stage) start(stage, ahead[stage]);
    int next_row = ahead[kHotStages - 1];
    float* to = a.d_w_SVD.data + int64_t{hot.id} * a.D + column;
    float sum = is_summing ? *to : 0.0f;
    for (int stage = 0; stage < stage_count; ++stage) {
      wait_copy_groups<kHotStages - 2>();
      __syncthreads();  // the stage is there, and the one before it was read
      start(stage + kHotStages - 1, next_row);
      next_row = row_of(stage + kHotStages);
      const int count = min(kHotRows, rows - stage * kHotRows);
      if (!is_summing) continue;
      const T(&values)[kHotRows][kColumns] = stages[stage % kHotStages];
#pragma unroll
      for (int row = 0; row < kHotRows; ++row) {
        if (row < count) sum += to_f32(values[row][threadIdx.x]);
      }
    }
    if (is_summing) *to = sum;
    __syncthreads();  // the last stages were read
  }
}

// The canonical tree sum of the id's rows in blocks [begin, end), local numbers, at `column`.
template <class T, int kVec>
__device__ __forceinline__ bool tree_sum_rows(const EmbeddingWgrad& a, int32_t id, int begin,
                                              int end, int column, float (&sum)[kVec]) {
  TreeStack<float, kVec, kDepth> stack;
  float leaf[kVec];
  int block = -1;  // of `leaf`
  for_rows<T, kVec>(a, id, begin * a.block_tokens, end * a.block_tokens, column,
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
    const bool has_rows = a.ids.rows_V[id].count > 0 &&
                          occurs_in(a, id, begin * a.block_tokens, end * a.block_tokens);
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
  const int64_t hot_ids = T_count / (kWarpRows + 1);
  const StreamScratch scratch(4 * (2 * V + 2 + T_count + 2 * hot_ids), stream);
  int32_t* const tables = scratch.as<int32_t>();
  const IdTable ids{reinterpret_cast<IdRows*>(tables), tables + 2 * V, tables + 2 * V + 2,
                    reinterpret_cast<HotId*>(tables + 2 * V + 2 + T_count)};
  const EmbeddingWgrad a{.d_x_TD = args.d_x_TD.data,
                         .d_x_stride = args.d_x_TD.row_stride,
                         .token_T = args.token_T.pointer(),
                         .d_w_SVD = rows_of<float>(args.d_w_SVD),
                         .present_SV = rows_of<uint8_t>(args.present_SV),
                         .node_table_NC = rows_of<const int32_t>(args.target.node_table_NC),
                         .ids = ids,
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
    if (is_nodes) {
      return launch("embedding_wgrad", wgrad_nodes_kernel<T, kVec>,
                    {.blocks = V, .threads = kThreads}, stream, a);
    }
    launch("embedding_wgrad", wgrad_accumulate_kernel<T, kVec>,
           {.blocks = blocks_for(T_count, kThreads / kWarpLanes), .threads = kThreads}, stream, a);
    launch("embedding_wgrad", wgrad_hot_kernel<T, kVec>,
           {.blocks = hot_ids > 0 ? kHotBlocks : 0, .threads = kHotThreads}, stream, a);
  });
}

}  // namespace cambium::cuda
