// Plain products and block-wise weight gradients: one thread an element, operands staged in shared
// memory 16 x 16. For small and odd extents; a chain of fp32 fused multiply-adds per element.
// Napkin: 2 FLOPs per two shared loads, about 2 TFLOP/s on an H100.
#include <cuda_bf16.h>

#include "kernels/cuda_launch.cuh"
#include "kernels/cuda_linear.cuh"

namespace cambium::cuda {

namespace {

constexpr int kTile = 16;

struct Operand {
  const void* data;
  int64_t outer_step, inner_step;
  bool is_bf16;
  __device__ __forceinline__ float at(int64_t i, int64_t j) const {
    const int64_t index = i * outer_step + j * inner_step;
    return is_bf16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index])
                   : static_cast<const float*>(data)[index];
  }
};

Operand operand(const RawView& view, int64_t outer_step, int64_t inner_step) {
  return {view.data, outer_step, inner_step, view.dtype == DType::bf16};
}

struct Tiles {
  float a[kTile][kTile + 1], b[kTile][kTile];
};

// Continues the chain of element (row, column) over depth [begin, end). All threads call it.
__device__ __forceinline__ float chain(const Operand& a, const Operand& b, int64_t row0,
                                       int64_t rows, int64_t column0, int64_t columns,
                                       int64_t begin, int64_t end, Tiles& tiles) {
  const int x = threadIdx.x, y = threadIdx.y;
  float sum = 0;
  for (int64_t k0 = begin; k0 < end; k0 += kTile) {
    __syncthreads();
    tiles.a[y][x] = row0 + y < rows && k0 + x < end ? a.at(row0 + y, k0 + x) : 0.0f;
    tiles.b[y][x] = k0 + y < end && column0 + x < columns ? b.at(k0 + y, column0 + x) : 0.0f;
    __syncthreads();
    const int depth = end - k0 < kTile ? static_cast<int>(end - k0) : kTile;
    for (int k = 0; k < depth; ++k) sum = __fmaf_rn(tiles.a[y][k], tiles.b[k][x], sum);
  }
  return sum;
}

__global__ void __launch_bounds__(kTile* kTile)
    product_kernel(Operand a, Operand b, Operand residual, int64_t rows, int64_t columns,
                   int64_t depth, void* out, int64_t out_stride, bool out_is_bf16) {
  __shared__ Tiles tiles;
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t column0 = static_cast<int64_t>(blockIdx.x) * kTile;
  float sum = chain(a, b, row0, rows, column0, columns, 0, depth, tiles);
  const int64_t row = row0 + threadIdx.y, column = column0 + threadIdx.x;
  if (row >= rows || column >= columns) return;
  if (residual.data != nullptr) sum = __fadd_rn(sum, residual.at(row, column));
  const int64_t index = row * out_stride + column;
  if (out_is_bf16) {
    static_cast<__nv_bfloat16*>(out)[index] = __float2bfloat16_rn(sum);
  } else {
    static_cast<float*>(out)[index] = sum;
  }
}

struct NodeProduct {
  Operand d_y, x;  // d_y(n, t), x(t, k)
  int64_t N, K;
  const int32_t* table;
  int nodes;
  int64_t first_block, block_tokens;
  float* slots;
  int64_t slot_stride;
  uint8_t* present;
  int64_t present_stride;
};

// The canonical tree of a node's blocks is a binary counter: after leaf i, as many merges as i + 1
// has trailing zero bits; what is left at the end folds from the top (kernels/grad_target.h).
__global__ void __launch_bounds__(kTile* kTile) nodes_kernel(NodeProduct p) {
  __shared__ Tiles tiles;
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t column0 = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t row = row0 + threadIdx.y, column = column0 + threadIdx.x;
  const bool inside = row < p.N && column < p.K;
  uint64_t stored = 0;  // slots that this call filled; their flags in memory are set afterwards
  for (int node = 0; node < p.nodes; ++node) {
    const int32_t* columns = p.table + node * kNodeColumns;
    float stack[kMaxFold + 1];
    int depth = 0;
    const int blocks = columns[kNodeEndBlock] - columns[kNodeFirstBlock];
    for (int i = 0; i < blocks; ++i) {
      const int64_t t = (columns[kNodeFirstBlock] + i - p.first_block) * p.block_tokens;
      float sum = chain(p.d_y, p.x, row0, p.N, column0, p.K, t, t + p.block_tokens, tiles);
      for (int bits = i + 1; bits % 2 == 0; bits /= 2) sum = __fadd_rn(stack[--depth], sum);
      stack[depth++] = sum;
    }
    float value = stack[--depth];
    while (depth > 0) value = __fadd_rn(stack[--depth], value);
    for (int fold = 0; fold < columns[kNodeFoldCount]; ++fold) {
      const int left = columns[kNodeFirstFold + fold];
      const bool present = (stored >> left & 1) != 0 || p.present[left * p.present_stride] != 0;
      if (!inside || !present) continue;
      value = __fadd_rn(p.slots[left * p.slot_stride + row * p.K + column], value);
    }
    const int destination = columns[kNodeDestination];
    if (inside) p.slots[destination * p.slot_stride + row * p.K + column] = value;
    stored |= uint64_t{1} << destination;
  }
}

// A launch of its own: blocks of `nodes_kernel` read the flags as they were before the call.
__global__ void present_kernel(NodeProduct p) {
  for (int node = threadIdx.x; node < p.nodes; node += blockDim.x) {
    p.present[p.table[node * kNodeColumns + kNodeDestination] * p.present_stride] = 1;
  }
}

dim3 tile_grid(int64_t rows, int64_t columns) {
  return dim3(static_cast<unsigned>((columns + kTile - 1) / kTile),
              static_cast<unsigned>((rows + kTile - 1) / kTile));
}

}  // namespace

void plain_product(const PlainProduct& p, Stream& stream) {
  product_kernel<<<tile_grid(p.rows, p.columns), dim3(kTile, kTile), 0, native_stream(stream)>>>(
      operand(p.a.view, p.a.outer_step, p.a.inner_step),
      operand(p.b.view, p.b.outer_step, p.b.inner_step),
      operand(p.residual, p.residual.row_stride, 1), p.rows, p.columns, p.depth, p.out.data,
      p.out.row_stride, p.out.dtype == DType::bf16);
  check_cuda(cudaGetLastError(), "plain product");
}

void linear_wgrad_nodes(const LinearWgradArgs& a, Stream& stream) {
  const int64_t N = a.d_y_TN[1], K = a.x_TK[1];
  const NodeProduct product{.d_y = operand(a.d_y_TN, 1, a.d_y_TN.row_stride),
                            .x = operand(a.x_TK, a.x_TK.row_stride, 1),
                            .N = N,
                            .K = K,
                            .table = a.target.node_table_NC.pointer(),
                            .nodes = static_cast<int>(a.target.node_table_NC[0]),
                            .first_block = a.first_block,
                            .block_tokens = a.block_tokens,
                            .slots = a.d_w_SNK.pointer(),
                            .slot_stride = a.d_w_SNK.row_stride,
                            .present = a.present_S.pointer(),
                            .present_stride = a.present_S.row_stride};
  CHECK_LE(a.d_w_SNK[0], 64);  // bits of `stored`
  if (product.nodes == 0 || N == 0 || K == 0) return;
  nodes_kernel<<<tile_grid(N, K), dim3(kTile, kTile), 0, native_stream(stream)>>>(product);
  present_kernel<<<1, kWarpLanes, 0, native_stream(stream)>>>(product);
  check_cuda(cudaGetLastError(), "linear_wgrad nodes");
}

}  // namespace cambium::cuda
