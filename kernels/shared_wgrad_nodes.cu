// Weight gradients in plain fused multiply-adds (kernels/shared_wgrad_nodes.h).
//
// A block of threads owns 64 x 64 elements of one group and walks the node table over the group's
// rows, 32 rows at a time in shared memory; a thread holds 4 x 4 sums. Between two leaves of a node
// with offsets i and j the canonical tree joins at the highest bit in which i and j differ (it
// splits at the largest power of two below a count), so a pending left operand lies in the stack
// entry of that bit, and a leaf first takes in every pending entry below its own next join.
// Napkin: N K R / 67 TFLOP/s at best; a leaf costs one stack access per element beside its rows.
#include "kernels/cuda_launch.cuh"
#include "kernels/shared_wgrad_nodes.h"
#include "kernels/swiglu_device.cuh"

namespace cambium::cuda {

namespace {

constexpr int kTileSide = 64;
constexpr int kThreadSide = 4;  // elements of a thread along N and along K
constexpr int kThreads = (kTileSide / kThreadSide) * (kTileSide / kThreadSide);
constexpr int kBatchRows = 32;
constexpr int kMaxNodes = 1024;  // rows of one node table
constexpr int kTreeLevels = 24;  // 2^24 blocks
constexpr int kElements = kThreadSide * kThreadSide;

struct NodesParams {
  const void* d_y;
  const void* x;
  int64_t d_y_stride, x_stride;
  const int32_t* d_y_token;
  const int32_t* x_token;
  const int32_t* group_offset;
  const int32_t* row_block;
  int first_block, block_tokens, rows;
  int64_t N, K;
  float* slots;
  int64_t slot_stride, group_stride;
  uint8_t* present;
  int64_t present_stride;
  const int32_t* table;
  int64_t table_stride;
  int nodes;    // -1: modes `accumulate` and `store`
  bool stores;  // mode `store`
};

struct RowBatch {
  float d_y[kBatchRows][kTileSide];
  float x[kBatchRows][kTileSide];
  int block[kBatchRows + 1];
};

__device__ __forceinline__ int block_of_row(const NodesParams& p, int row) {
  return p.row_block != nullptr ? p.row_block[row] : p.first_block + row / p.block_tokens;
}

struct RowRange {
  int begin, end;
};

__device__ __forceinline__ RowRange rows_of_group(const NodesParams& p, int group) {
  if (p.group_offset == nullptr) return {0, p.rows};
  return {p.group_offset[group], p.group_offset[group + 1]};
}

// The first row of `rows` whose block is at least `block`.
__device__ int first_row_of(const NodesParams& p, RowRange rows, int block) {
  while (rows.begin < rows.end) {
    const int middle = (rows.begin + rows.end) / 2;
    if (block_of_row(p, middle) < block) {
      rows.begin = middle + 1;
    } else {
      rows.end = middle;
    }
  }
  return rows.begin;
}

template <class Element>
__device__ void load_batch(const NodesParams& p, RowBatch& batch, RowRange rows, int64_t n0,
                           int64_t k0) {
  const auto* d_y = static_cast<const Element*>(p.d_y);
  const auto* x = static_cast<const Element*>(p.x);
  for (int i = threadIdx.x; i < kBatchRows * kTileSide; i += kThreads) {
    const int r = i / kTileSide, column = i % kTileSide, row = rows.begin + r;
    const bool is_row = row < rows.end;
    float d_y_value = 0, x_value = 0;
    if (is_row && n0 + column < p.N) {
      const int64_t from = p.d_y_token != nullptr ? p.d_y_token[row] : row;
      d_y_value = widen(d_y[from * p.d_y_stride + n0 + column]);
    }
    if (is_row && k0 + column < p.K) {
      const int64_t from = p.x_token != nullptr ? p.x_token[row] : row;
      x_value = widen(x[from * p.x_stride + k0 + column]);
    }
    batch.d_y[r][column] = d_y_value;
    batch.x[r][column] = x_value;
  }
  if (p.nodes < 0) return;
  for (int r = threadIdx.x; r <= kBatchRows; r += kThreads) {
    const int row = rows.begin + r;
    batch.block[r] = row < rows.end ? block_of_row(p, row) : -1;  // -1: the node ends
  }
}

struct ThreadSums {
  float value[kElements] = {};

  __device__ __forceinline__ void multiply(const RowBatch& batch, int row, int n, int k) {
    const auto a = *reinterpret_cast<const float4*>(&batch.d_y[row][n]);
    const auto b = *reinterpret_cast<const float4*>(&batch.x[row][k]);
    const float left[kThreadSide] = {a.x, a.y, a.z, a.w}, right[kThreadSide] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      value[i] = fmaf(left[i / kThreadSide], right[i % kThreadSide], value[i]);
    }
  }
  __device__ __forceinline__ void add_left(const ThreadSums& left) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) value[i] = left.value[i] + value[i];
  }
};

// The thread's elements of one slot; those beyond the matrix are neither read nor written.
struct ThreadElements {
  int64_t N, K, n, k;

  template <class Use>
  __device__ __forceinline__ void each(Use&& use) const {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int64_t row = n + i / kThreadSide, column = k + i % kThreadSide;
      if (row < N && column < K) use(i, row * K + column);
    }
  }
  __device__ __forceinline__ ThreadSums load(const float* matrix) const {
    ThreadSums sums;
    each([&](int i, int64_t at) { sums.value[i] = matrix[at]; });
    return sums;
  }
  __device__ __forceinline__ void store(const ThreadSums& sums, float* matrix) const {
    each([&](int i, int64_t at) { matrix[at] = sums.value[i]; });
  }
};

// The end of a leaf: pending left operands that join before `next_block` does are added, then the
// value waits for what joins it there. `next_block` is -1 at the end of the node.
struct TreeStack {
  uint32_t pending = 0;
  ThreadSums entry[kTreeLevels];

  __device__ __forceinline__ void end_leaf(ThreadSums& sums, int offset, int next_offset) {
    const int join = next_offset < 0 ? 31 : 31 - __clz(offset ^ next_offset);
    const uint32_t below = (1u << join) - 1;
    for (uint32_t rest = pending & below; rest != 0; rest &= rest - 1) {
      sums.add_left(entry[__ffs(static_cast<int>(rest)) - 1]);
    }
    pending &= ~below;
    if (next_offset < 0) return;
    entry[join] = sums;
    sums = ThreadSums{};
    pending |= 1u << join;
  }
};

// Presence of `slot` before row `node` of the table: what an earlier row stored, else the flag.
__device__ bool is_present(const NodesParams& p, const uint8_t* stored, int node, int slot,
                           int group) {
  for (int earlier = node - 1; earlier >= 0; --earlier) {
    if (p.table[earlier * p.table_stride + kNodeDestination] == slot) return stored[earlier] != 0;
  }
  return p.present[slot * p.present_stride + group] != 0;
}

template <class Element>
__device__ ThreadSums sum_rows(const NodesParams& p, RowBatch& batch, RowRange rows,
                               int first_block, int64_t n0, int64_t k0, ThreadSums sums) {
  const int n = threadIdx.x / (kTileSide / kThreadSide) * kThreadSide;
  const int k = threadIdx.x % (kTileSide / kThreadSide) * kThreadSide;
  TreeStack stack;
  for (int begin = rows.begin; begin < rows.end; begin += kBatchRows) {
    __syncthreads();
    load_batch<Element>(p, batch, {begin, rows.end}, n0, k0);
    __syncthreads();
    const int count = min(kBatchRows, rows.end - begin);
    for (int r = 0; r < count; ++r) {
      sums.multiply(batch, r, n, k);
      if (p.nodes < 0 || batch.block[r] == batch.block[r + 1]) continue;
      const int next = batch.block[r + 1] < 0 ? -1 : batch.block[r + 1] - first_block;
      stack.end_leaf(sums, batch.block[r] - first_block, next);
    }
  }
  return sums;
}

template <class Element>
__global__ void __launch_bounds__(kThreads) wgrad_nodes_kernel(const NodesParams p) {
  __shared__ RowBatch batch;
  __shared__ uint8_t stored[kMaxNodes];
  const int group = blockIdx.y;
  const int tiles_k = static_cast<int>((p.K + kTileSide - 1) / kTileSide);
  const int64_t n0 = int64_t{blockIdx.x} / tiles_k * kTileSide;
  const int64_t k0 = int64_t{blockIdx.x} % tiles_k * kTileSide;
  const ThreadElements elements{p.N, p.K,
                                n0 + threadIdx.x / (kTileSide / kThreadSide) * kThreadSide,
                                k0 + threadIdx.x % (kTileSide / kThreadSide) * kThreadSide};
  float* slots = p.slots + group * p.group_stride;
  const RowRange group_rows = rows_of_group(p, group);
  if (p.nodes < 0) {
    if (group_rows.begin == group_rows.end && !p.stores) return;
    const ThreadSums start = p.stores ? ThreadSums{} : elements.load(slots);
    elements.store(sum_rows<Element>(p, batch, group_rows, 0, n0, k0, start), slots);
    return;
  }
  for (int node = 0; node < p.nodes; ++node) {
    const int32_t* row = p.table + node * p.table_stride;
    const RowRange rows{first_row_of(p, group_rows, row[kNodeFirstBlock]),
                        first_row_of(p, group_rows, row[kNodeEndBlock])};
    bool has_value = rows.begin < rows.end;
    ThreadSums sums = sum_rows<Element>(p, batch, rows, row[kNodeFirstBlock], n0, k0, ThreadSums{});
    for (int f = 0; f < row[kNodeFoldCount]; ++f) {
      const int slot = row[kNodeFirstFold + f];
      if (!is_present(p, stored, node, slot, group)) continue;
      ThreadSums left = elements.load(slots + slot * p.slot_stride);
      if (has_value) {
        sums.add_left(left);
      } else {
        sums = left;
      }
      has_value = true;
    }
    if (has_value) elements.store(sums, slots + row[kNodeDestination] * p.slot_stride);
    if (threadIdx.x == 0) stored[node] = has_value ? 1 : 0;
    __syncthreads();
  }
}

// Updates the flags once all tiles have read them: a thread a group.
__global__ void node_presence_kernel(const NodesParams p, int groups) {
  const int group = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (group >= groups) return;
  const RowRange rows = rows_of_group(p, group);
  for (int node = 0; node < p.nodes; ++node) {
    const int32_t* row = p.table + node * p.table_stride;
    bool any =
        first_row_of(p, rows, row[kNodeFirstBlock]) < first_row_of(p, rows, row[kNodeEndBlock]);
    for (int f = 0; f < row[kNodeFoldCount]; ++f) {
      any = any || p.present[row[kNodeFirstFold + f] * p.present_stride + group] != 0;
    }
    p.present[row[kNodeDestination] * p.present_stride + group] = any ? 1 : 0;
  }
}

}  // namespace

void wgrad_nodes(const WgradNodesArgs& args, Stream& stream) {
  const bool has_nodes = args.target.mode == GradMode::nodes;
  const RawView& table = args.target.node_table_NC;
  NodesParams p{};
  p.d_y = args.d_y_RN.data;
  p.x = args.x_RK.data;
  p.d_y_stride = args.d_y_RN.row_stride;
  p.x_stride = args.x_RK.row_stride;
  p.d_y_token = args.d_y_token_R.pointer();
  p.x_token = args.x_token_R.pointer();
  p.group_offset = args.group_offset_g1.pointer();
  p.row_block = args.row_block_R.pointer();
  p.first_block = static_cast<int>(args.first_block);
  p.block_tokens = static_cast<int>(args.block_tokens);
  p.rows = static_cast<int>(args.rows);
  p.N = args.d_y_RN[1];
  p.K = args.x_RK[1];
  p.slots = args.slots;
  p.slot_stride = args.slot_stride;
  p.group_stride = args.group_stride;
  p.present = args.present;
  p.present_stride = args.present_stride;
  p.table = args.target.node_table_NC.pointer();
  p.table_stride = table.row_stride;
  p.nodes = has_nodes ? static_cast<int>(table.shape[0]) : -1;
  p.stores = args.target.mode == GradMode::store;
  CHECK(args.d_y_RN.dtype == args.x_RK.dtype);
  CHECK_LE(p.nodes, kMaxNodes);
  CHECK_LT(args.target.total_blocks, int64_t{1} << kTreeLevels);
  const int64_t tiles = ((p.N + kTileSide - 1) / kTileSide) * ((p.K + kTileSide - 1) / kTileSide);
  const auto groups = static_cast<unsigned>(args.groups);
  if (tiles == 0 || groups == 0) return;
  const dim3 grid(static_cast<unsigned>(tiles), groups);
  const cudaStream_t native = native_stream(stream);
  if (args.x_RK.dtype == DType::bf16) {
    wgrad_nodes_kernel<__nv_bfloat16><<<grid, kThreads, 0, native>>>(p);
  } else {
    wgrad_nodes_kernel<float><<<grid, kThreads, 0, native>>>(p);
  }
  check_cuda(cudaGetLastError(), "wgrad_nodes");
  if (!has_nodes) return;
  node_presence_kernel<<<(groups + kThreads - 1) / kThreads, kThreads, 0, native>>>(
      p, static_cast<int>(groups));
  check_cuda(cudaGetLastError(), "node_presence");
}

}  // namespace cambium::cuda
