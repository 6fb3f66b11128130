// Leaf fold on the GPU. A block takes a few columns; its threads take aligned runs of leaves, whose
// sums meet in shared memory by the same tree (kernels/canonical_tree.cuh): bits are the
// reference's.
#include "kernels/leaf_fold.h"

#include "kernels/canonical_tree.cuh"

namespace cambium::cuda {

namespace {

constexpr int kThreads = 512;
constexpr int kLeavesAhead = 8;  // whose loads are under way together
constexpr int kDepth = 24;       // a thread's run has at most 2^24 leaves

struct LeafFold {
  Rows<const float> leaf_BN;
  Rows<float> d_w_SN;
  uint8_t* present_S;  // null: not `nodes`
  bool adds;           // `accumulate`
  int64_t present_stride;
  Rows<const int32_t> node_table_NC;
  int64_t first_block;
  int nodes, blocks, rows_per_block, N, slots;
  int columns;  // of a block, a power of two
};

// Sum of leaves [first, end) of this thread's column; `runs` runs, of which this thread has `run`.
__device__ __forceinline__ void fold_range(const LeafFold& a, int first, int end, int column,
                                           float* shared) {
  const int runs = kThreads / a.columns, run = threadIdx.x / a.columns;
  const int64_t length = power_of_two_from((end - first + runs - 1) / runs);
  const int64_t begin = first + run * length, stop = min(int64_t{end}, begin + length);
  TreeStack<float, 1, kDepth> stack;
  for (int64_t leaf = begin; leaf < stop && column < a.N; leaf += kLeavesAhead) {
    float leaves[kLeavesAhead][1] = {};
    for (int r = 0; r < a.rows_per_block; ++r) {
#pragma unroll
      for (int i = 0; i < kLeavesAhead; ++i) {
        if (leaf + i >= stop) continue;
        leaves[i][0] += a.leaf_BN.row((leaf + i) * a.rows_per_block + r)[column];
      }
    }
#pragma unroll
    for (int i = 0; i < kLeavesAhead; ++i) {
      if (leaf + i < stop) stack.push(static_cast<int>(leaf + i - begin), leaves[i]);
    }
  }
  float sum[1] = {0.0f};
  stack.finish(sum);
  float* at = shared + threadIdx.x;
  __syncthreads();  // the last node's sums were read
  *at = sum[0];
  sum_runs(at, run, runs, static_cast<int>((end - first + length - 1) / length), a.columns);
}

// value = the folds of the row's present left slots over `value`, stored in the destination.
__device__ __forceinline__ void fold_node(const LeafFold& a, const int32_t* node, int column,
                                          float value, const uint8_t* present) {
  const int folds = node[kNodeFoldCount];
  for (int f = 0; f < folds; ++f) {
    const int slot = node[kNodeFirstFold + f];
    if (present[slot] != 0) value = a.d_w_SN.row(slot)[column] + value;
  }
  a.d_w_SN.row(node[kNodeDestination])[column] = value;
}

__device__ __forceinline__ void check_node(const LeafFold& a, const int32_t* node) {
  device_check(node[kNodeFirstBlock] >= a.first_block && node[kNodeFoldCount] <= kMaxFold);
  device_check(node[kNodeEndBlock] <= a.first_block + a.blocks);
  device_check(node[kNodeDestination] >= 0 && node[kNodeDestination] < a.slots);
}

__global__ void __launch_bounds__(kThreads) leaf_fold_kernel(const LeafFold a) {
  __shared__ float shared[kThreads];
  extern __shared__ uint8_t present[];  // this block's copy: presence changes as nodes are stored
  const int column = static_cast<int>(blockIdx.x) * a.columns + threadIdx.x % a.columns;
  const bool is_first_run = static_cast<int>(threadIdx.x) < a.columns && column < a.N;
  if (a.present_S == nullptr) {
    fold_range(a, 0, a.blocks, column, shared);
    float* to = a.d_w_SN.row(0) + column;
    if (is_first_run) *to = (a.adds ? *to : 0.0f) + shared[threadIdx.x];
    return;
  }
  for (int s = threadIdx.x; s < a.slots; s += kThreads)
    present[s] = a.present_S[s * a.present_stride];
  for (int n = 0; n < a.nodes; ++n) {
    const int32_t* node = a.node_table_NC.row(n);
    check_node(a, node);
    fold_range(a, static_cast<int>(node[kNodeFirstBlock] - a.first_block),
               static_cast<int>(node[kNodeEndBlock] - a.first_block), column, shared);
    if (is_first_run) fold_node(a, node, column, shared[threadIdx.x], present);
    __syncthreads();
    if (threadIdx.x == 0) present[node[kNodeDestination]] = 1;
  }
}

// Every node has a contribution, so every destination becomes present; after all blocks have read.
__global__ void leaf_presence_kernel(const LeafFold a) {
  for (int n = threadIdx.x; n < a.nodes; n += kWarpLanes) {
    a.present_S[a.node_table_NC.row(n)[kNodeDestination] * a.present_stride] = 1;
  }
}

}  // namespace

void leaf_fold(const LeafFoldArgs& args, Stream& stream) {
  const int64_t N = args.leaf_BN[1], B = args.leaf_BN[0] / args.rows_per_block;
  const bool is_nodes = args.target.mode == GradMode::nodes;
  CHECK_LT(B, int64_t{1} << kDepth);
  if (B == 0 && args.target.mode == GradMode::store) {
    zero_matrices(args.d_w_SN.pointer(), 1, N, N, stream);
  }
  if (B == 0) return;
  LeafFold a{.leaf_BN = rows_of<const float>(args.leaf_BN),
             .d_w_SN = rows_of<float>(args.d_w_SN),
             .present_S = is_nodes ? args.present_S.pointer() : nullptr,
             .adds = args.target.mode == GradMode::accumulate,
             .present_stride = args.present_S.row_stride,
             .node_table_NC = rows_of<const int32_t>(args.target.node_table_NC),
             .first_block = args.first_block,
             .nodes = is_nodes ? static_cast<int>(args.target.node_table_NC[0]) : 0,
             .blocks = static_cast<int>(B),
             .rows_per_block = static_cast<int>(args.rows_per_block),
             .N = static_cast<int>(N),
             .slots = static_cast<int>(args.d_w_SN[0]),
             .columns = static_cast<int>(std::min<int64_t>(16, power_of_two_from(N)))};
  launch("leaf_fold", leaf_fold_kernel,
         {.blocks = blocks_for(N, a.columns), .threads = kThreads, .shared_bytes = a.slots}, stream,
         a);
  if (is_nodes) {
    launch("leaf_fold", leaf_presence_kernel, {.blocks = 1, .threads = kWarpLanes}, stream, a);
  }
}

}  // namespace cambium::cuda
