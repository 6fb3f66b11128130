// Linear layer on the GPU: cuBLASLt for bf16 products, own kernels for what it cannot take.
//
// D2: the algorithm is found once per (kind, N, K, strides, dtypes), with a nominal row count, and
// serves every row count: tile, cluster and stages never follow the batch, and K is never split
// (REDUCTION_SCHEME_NONE). Each stream has its own handle and workspace, as cuBLAS asks for bit
// equality. The own product kernel makes the chain that kernels/linear.h promises, one thread an
// element (about 2 TFLOP/s); it serves fp32 operands and extents that are not multiples of 8
// (16-byte rows). Such weight gradients, and mode `nodes`, run through shared_wgrad_nodes.h.
#include <cublasLt.h>
#include <cuda_bf16.h>

#include <algorithm>
#include <array>
#include <map>

#include "kernels/cuda_launch.cuh"
#include "kernels/linear.h"
#include "kernels/shared_wgrad_nodes.h"

namespace cambium::cuda {

namespace {

constexpr size_t kWorkspaceBytes = size_t{32} << 20;  // what cuBLAS recommends for Hopper
constexpr int64_t kNominalRows = 8192;                // of the heuristic's question
constexpr int64_t kRowAlignment = 8;                  // elements: 16 bytes of bf16
constexpr int kBiasThreads = 256;
constexpr int64_t kMostBiasRows = 1024;  // blocks along the rows

void check_blas(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  fail(ExitCode::internal, "{}: cuBLASLt error {}", what, static_cast<int>(status));
}

// D [m, n] = op(A) op(B) + beta C, column-major as cuBLAS sees it. `rows` is the row count of the
// batch, which is n of a forward product or an input gradient, and k of a weight gradient.
struct Product {
  enum Kind : int64_t { forward, dgrad, wgrad };
  Kind kind;
  int64_t m, n, k;
  RawView a, b, c, d;  // c: empty = beta 0
  int64_t rows() const { return kind == wgrad ? k : n; }
};

cudaDataType_t blas_type(DType dtype) { return dtype == DType::bf16 ? CUDA_R_16BF : CUDA_R_32F; }

struct Layouts {
  cublasLtMatmulDescOpaque_t operation;
  cublasLtMatrixLayoutOpaque_t a, b, c, d;
};

void init_layout(cublasLtMatrixLayoutOpaque_t& layout, const RawView& view, int64_t height,
                 int64_t width) {
  check_blas(cublasLtMatrixLayoutInit(&layout, blas_type(view.dtype), static_cast<uint64_t>(height),
                                      static_cast<uint64_t>(width), view.row_stride),
             "cublasLtMatrixLayoutInit");
}

// Row-major [rows, width] is column-major [width, rows].
Layouts make_layouts(const Product& p, int64_t rows) {
  Layouts layouts;
  check_blas(cublasLtMatmulDescInit(&layouts.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F),
             "cublasLtMatmulDescInit");
  const cublasOperation_t transpose = CUBLAS_OP_T;
  if (p.kind != Product::dgrad) {
    const auto attribute =
        p.kind == Product::forward ? CUBLASLT_MATMUL_DESC_TRANSA : CUBLASLT_MATMUL_DESC_TRANSB;
    check_blas(
        cublasLtMatmulDescSetAttribute(&layouts.operation, attribute, &transpose, sizeof transpose),
        "cublasLtMatmulDescSetAttribute");
  }
  const int64_t n = p.kind == Product::wgrad ? p.n : rows;
  const int64_t k = p.kind == Product::wgrad ? rows : p.k;
  if (p.kind == Product::forward) {
    init_layout(layouts.a, p.a, k, p.m);
  } else {
    init_layout(layouts.a, p.a, p.m, k);
  }
  if (p.kind == Product::wgrad) {
    init_layout(layouts.b, p.b, n, k);
  } else {
    init_layout(layouts.b, p.b, k, n);
  }
  init_layout(layouts.d, p.d, p.m, n);
  init_layout(layouts.c, p.c.empty() ? p.d : p.c, p.m, n);
  return layouts;
}

// A stream's handle, workspace and the algorithms found so far.
class Blas {
 public:
  Blas() : workspace_(static_cast<int64_t>(kWorkspaceBytes)) {
    check_blas(cublasLtCreate(&handle_), "cublasLtCreate");
  }
  ~Blas() { cublasLtDestroy(handle_); }
  Blas(const Blas&) = delete;
  Blas& operator=(const Blas&) = delete;

  void multiply(const Product& p, cudaStream_t stream) {
    const cublasLtMatmulAlgo_t& algorithm = this->algorithm(p);
    Layouts l = make_layouts(p, p.rows());
    const float alpha = 1, beta = p.c.empty() ? 0.0f : 1.0f;
    check_blas(cublasLtMatmul(handle_, &l.operation, &alpha, p.a.data, &l.a, p.b.data, &l.b, &beta,
                              p.c.empty() ? p.d.data : p.c.data, &l.c, p.d.data, &l.d, &algorithm,
                              workspace_.data(), kWorkspaceBytes, stream),
               "cublasLtMatmul");
  }

 private:
  using Key = std::array<int64_t, 11>;

  const cublasLtMatmulAlgo_t& algorithm(const Product& p) {
    const bool is_wgrad = p.kind == Product::wgrad;
    const Key key{p.kind,
                  p.m,
                  is_wgrad ? p.n : p.k,
                  p.a.row_stride,
                  p.b.row_stride,
                  p.d.row_stride,
                  p.c.empty() ? 0 : p.c.row_stride,
                  static_cast<int64_t>(p.a.dtype),
                  static_cast<int64_t>(p.b.dtype),
                  static_cast<int64_t>(p.d.dtype),
                  p.c.empty() ? 0 : 1};
    const auto found = algorithms_.find(key);
    if (found != algorithms_.end()) return found->second;
    return algorithms_.emplace(key, find_algorithm(p)).first->second;
  }

  cublasLtMatmulAlgo_t find_algorithm(const Product& p) {
    Layouts l = make_layouts(p, kNominalRows);
    cublasLtMatmulPreferenceOpaque_t preference;
    check_blas(cublasLtMatmulPreferenceInit(&preference), "cublasLtMatmulPreferenceInit");
    const auto set = [&](cublasLtMatmulPreferenceAttributes_t name, const auto& value) {
      check_blas(cublasLtMatmulPreferenceSetAttribute(&preference, name, &value, sizeof value),
                 "cublasLtMatmulPreferenceSetAttribute");
    };
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{kWorkspaceBytes});
    set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, uint32_t{CUBLASLT_REDUCTION_SCHEME_NONE});
    for (const auto name :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
      set(name, uint32_t{16});
    }
    cublasLtMatmulHeuristicResult_t result;
    int count = 0;
    check_blas(cublasLtMatmulAlgoGetHeuristic(handle_, &l.operation, &l.a, &l.b, &l.c, &l.d,
                                              &preference, 1, &result, &count),
               "cublasLtMatmulAlgoGetHeuristic");
    CHECK_EQ(count, 1);
    uint32_t splits = 0;
    size_t written = 0;
    check_blas(cublasLtMatmulAlgoConfigGetAttribute(&result.algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM,
                                                    &splits, sizeof splits, &written),
               "cublasLtMatmulAlgoConfigGetAttribute");
    CHECK_LE(splits, 1u);
    return result.algo;
  }

  cublasLtHandle_t handle_ = nullptr;
  DeviceMemory workspace_;
  std::map<Key, cublasLtMatmulAlgo_t> algorithms_;
};

Blas& blas_of(Stream& stream) {
  auto& state = static_cast<NativeStream*>(stream.device())->blas_state;
  if (state == nullptr) state = std::make_shared<Blas>();
  return *static_cast<Blas*>(state.get());
}

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

// The chain of element (row, column) over all of the depth. All threads of the block call it.
__device__ __forceinline__ float chain(const Operand& a, const Operand& b, int64_t row0,
                                       int64_t rows, int64_t column0, int64_t columns,
                                       int64_t depth, Tiles& tiles) {
  const int x = threadIdx.x, y = threadIdx.y;
  float sum = 0;
  for (int64_t k0 = 0; k0 < depth; k0 += kTile) {
    __syncthreads();
    tiles.a[y][x] = row0 + y < rows && k0 + x < depth ? a.at(row0 + y, k0 + x) : 0.0f;
    tiles.b[y][x] = k0 + y < depth && column0 + x < columns ? b.at(k0 + y, column0 + x) : 0.0f;
    __syncthreads();
    const int count = depth - k0 < kTile ? static_cast<int>(depth - k0) : kTile;
    for (int k = 0; k < count; ++k) sum = __fmaf_rn(tiles.a[y][k], tiles.b[k][x], sum);
  }
  return sum;
}

__global__ void __launch_bounds__(kTile* kTile)
    product_kernel(Operand a, Operand b, Operand residual, int64_t rows, int64_t columns,
                   int64_t depth, void* out, int64_t out_stride, DType out_dtype) {
  __shared__ Tiles tiles;
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t column0 = static_cast<int64_t>(blockIdx.x) * kTile;
  float sum = chain(a, b, row0, rows, column0, columns, depth, tiles);
  const int64_t row = row0 + threadIdx.y, column = column0 + threadIdx.x;
  if (row >= rows || column >= columns) return;
  if (residual.data != nullptr) sum = __fadd_rn(sum, residual.at(row, column));
  const int64_t index = row * out_stride + column;
  if (out_dtype == DType::bf16) {
    static_cast<__nv_bfloat16*>(out)[index] = __float2bfloat16_rn(sum);
  } else {
    static_cast<float*>(out)[index] = sum;
  }
}

// An operand as element (i, j) = data[i * outer_step + j * inner_step].
struct PlainOperand {
  RawView view;
  int64_t outer_step, inner_step;
};

// out[i][j] = sum over k of a(i, k) b(k, j), one chain over ascending k, + residual[i][j].
struct PlainProduct {
  int64_t rows, columns, depth;
  PlainOperand a, b;
  RawView residual;  // optional; may be `out`
  RawView out;
};

void plain_product(const PlainProduct& p, Stream& stream) {
  const dim3 grid(static_cast<unsigned>((p.columns + kTile - 1) / kTile),
                  static_cast<unsigned>((p.rows + kTile - 1) / kTile));
  product_kernel<<<grid, dim3(kTile, kTile), 0, native_stream(stream)>>>(
      operand(p.a.view, p.a.outer_step, p.a.inner_step),
      operand(p.b.view, p.b.outer_step, p.b.inner_step),
      operand(p.residual, p.residual.row_stride, 1), p.rows, p.columns, p.depth, p.out.data,
      p.out.row_stride, p.out.dtype);
  check_cuda(cudaGetLastError(), "plain product");
}

template <class T>
__global__ void __launch_bounds__(kBiasThreads)
    add_bias_kernel(const T* bias, T* y, int64_t rows, int64_t columns, int64_t stride) {
  const int64_t column = int64_t{blockIdx.x} * kBiasThreads + threadIdx.x;
  if (column >= columns) return;
  const float added = to_f32(bias[column]);
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    T& element = y[row * stride + column];
    const float sum = __fadd_rn(to_f32(element), added);
    if constexpr (sizeof(T) == 2) {
      element = __float2bfloat16_rn(sum);
    } else {
      element = sum;
    }
  }
}

template <class T>
void launch_add_bias(const AddBiasArgs& a, Stream& stream) {
  const int64_t T_count = a.y_TN[0], N = a.y_TN[1];
  const dim3 grid(static_cast<unsigned>((N + kBiasThreads - 1) / kBiasThreads),
                  static_cast<unsigned>(std::min<int64_t>(T_count, kMostBiasRows)));
  add_bias_kernel<T><<<grid, kBiasThreads, 0, native_stream(stream)>>>(
      static_cast<const T*>(a.bias_N.data), static_cast<T*>(a.y_TN.data), T_count, N,
      a.y_TN.row_stride);
  check_cuda(cudaGetLastError(), "add_bias");
}

// Whether cuBLASLt takes the operands: by extents and types, never by the row count.
bool suits_blas(const RawView& a, const RawView& b, const RawView& c, const RawView& d) {
  if (a.dtype != DType::bf16 || b.dtype != DType::bf16) return false;
  if (!c.empty() && c.dtype != d.dtype) return false;
  for (const RawView* view : {&a, &b, &c, &d}) {
    if (view->empty()) continue;
    if (view->row_stride % kRowAlignment != 0) return false;
    if (view->shape.row_elements() % kRowAlignment != 0) return false;
    CHECK_EQ(reinterpret_cast<uintptr_t>(view->data) % 16, 0u);
  }
  return true;
}

}  // namespace

void linear(const LinearArgs& a, Stream& stream) {
  const int64_t T = a.x_TK[0], K = a.x_TK[1], N = a.w_NK[0];
  if (T == 0 || N == 0) return;
  if (suits_blas(a.w_NK, a.x_TK, a.residual_TN, a.y_TN)) {
    blas_of(stream).multiply({Product::forward, N, T, K, a.w_NK, a.x_TK, a.residual_TN, a.y_TN},
                             native_stream(stream));
    return;
  }
  plain_product({.rows = T,
                 .columns = N,
                 .depth = K,
                 .a = {a.x_TK, a.x_TK.row_stride, 1},
                 .b = {a.w_NK, 1, a.w_NK.row_stride},
                 .residual = a.residual_TN,
                 .out = a.y_TN},
                stream);
}

void add_bias(const AddBiasArgs& a, Stream& stream) {
  if (a.y_TN.elements() == 0) return;
  a.y_TN.dtype == DType::bf16 ? launch_add_bias<__nv_bfloat16>(a, stream)
                              : launch_add_bias<float>(a, stream);
}

void linear_dgrad(const LinearDgradArgs& a, Stream& stream) {
  const int64_t T = a.d_y_TN[0], N = a.d_y_TN[1], K = a.w_NK[1];
  if (T == 0 || K == 0) return;
  if (suits_blas(a.w_NK, a.d_y_TN, a.residual_TK, a.d_x_TK)) {
    blas_of(stream).multiply({Product::dgrad, K, T, N, a.w_NK, a.d_y_TN, a.residual_TK, a.d_x_TK},
                             native_stream(stream));
    return;
  }
  plain_product({.rows = T,
                 .columns = K,
                 .depth = N,
                 .a = {a.d_y_TN, a.d_y_TN.row_stride, 1},
                 .b = {a.w_NK, a.w_NK.row_stride, 1},
                 .residual = a.residual_TK,
                 .out = a.d_x_TK},
                stream);
}

void linear_wgrad(const LinearWgradArgs& a, Stream& stream) {
  const int64_t T = a.d_y_TN[0], N = a.d_y_TN[1], K = a.x_TK[1];
  RawView d_w = a.d_w_SNK;  // slot 0 as a matrix
  d_w.shape = Shape(N, K);
  d_w.row_stride = K;
  if (a.target.mode != GradMode::nodes && T > 0 && suits_blas(a.x_TK, a.d_y_TN, d_w, d_w)) {
    const RawView added = a.target.mode == GradMode::store ? RawView{} : d_w;
    blas_of(stream).multiply({Product::wgrad, K, N, T, a.x_TK, a.d_y_TN, added, d_w},
                             native_stream(stream));
    return;
  }
  wgrad_nodes({.d_y_RN = a.d_y_TN,
               .x_RK = a.x_TK,
               .rows = T,
               .first_block = a.first_block,
               .block_tokens = a.block_tokens,
               .slots = a.d_w_SNK.pointer(),
               .slot_stride = a.d_w_SNK.row_stride,
               .group_stride = N * K,
               .present = a.present_S.pointer(),
               .present_stride = a.present_S.row_stride,
               .target = a.target},
              stream);
}

}  // namespace cambium::cuda
