// What every .cu shares: the native stream, error checks, launches, 16-byte accesses to `Real`
// tensors, reductions in a fixed order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <type_traits>
#include <utility>

#include "kernels/cuda_stream.h"

namespace cambium::cuda {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  const auto code =
      status == cudaErrorMemoryAllocation ? ExitCode::out_of_memory : ExitCode::internal;
  fail(code, "{}: CUDA error {}: {}", what, cudaGetErrorName(status), cudaGetErrorString(status));
}

inline cudaStream_t native_stream(const Stream& stream) {
  CHECK(stream.native() != nullptr);
  return static_cast<cudaStream_t>(stream.native());
}

constexpr int kWarpLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

inline int multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
             "cudaDeviceGetAttribute");
  return count;
}

constexpr int64_t blocks_for(int64_t items, int64_t items_per_block) {
  return (items + items_per_block - 1) / items_per_block;
}

struct LaunchShape {
  int64_t blocks = 0;  // 0: nothing is launched
  int threads = 0;
  int64_t shared_bytes = 0;  // dynamic
  int cluster = 1;
};

// The runtime's form of a shape; the kernel is allowed its shared memory.
class LaunchConfig {
 public:
  template <class... Params>
  LaunchConfig(const char* op, void (*kernel)(Params...), const LaunchShape& shape,
               Stream& stream) {
    CHECK_LE(shape.blocks, int64_t{INT_MAX});
    // NOTE: the limit of 48 KiB counts static shared memory too, of which no kernel has more
    // than 16.
    if (shape.shared_bytes > 32 << 10) {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shape.shared_bytes)),
                 op);
    }
    config_.gridDim = dim3(static_cast<unsigned>(shape.blocks));
    config_.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config_.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
    config_.stream = native_stream(stream);
    cluster_.id = cudaLaunchAttributeClusterDimension;
    cluster_.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    config_.attrs = &cluster_;
    config_.numAttrs = shape.cluster > 1 ? 1 : 0;
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;
  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchConfig_t config_ = {};
  cudaLaunchAttribute cluster_ = {};
};

// Launches kernel(args...) and reports a refused launch under the op's name.
template <class... Params, class... Args>
void launch(const char* op, void (*kernel)(Params...), const LaunchShape& shape, Stream& stream,
            Args&&... args) {
  if (shape.blocks == 0) return;
  const LaunchConfig config(op, kernel, shape, stream);
  check_cuda(cudaLaunchKernelEx(config.get(), kernel, std::forward<Args>(args)...), op);
}

// Zeros where a weight gradient's first contribution has nothing: `groups` matrices of `elements`
// elements, `stride` apart.
inline void zero_matrices(float* data, int64_t groups, int64_t elements, int64_t stride,
                          Stream& stream) {
  const auto bytes = [](int64_t count) { return static_cast<size_t>(4 * count); };
  const cudaStream_t native = native_stream(stream);
  if (groups == 1 || elements == stride) {
    check_cuda(cudaMemsetAsync(data, 0, bytes(groups * elements), native), "zero fill");
    return;
  }
  check_cuda(cudaMemset2DAsync(data, bytes(stride), 0, bytes(elements), static_cast<size_t>(groups),
                               native),
             "zero fill");
}

// Device memory that kernels of one op use between them, in stream order.
class StreamScratch {
 public:
  StreamScratch(int64_t bytes, Stream& stream) : stream_(native_stream(stream)) {
    check_cuda(cudaMallocAsync(&data_, static_cast<size_t>(bytes > 0 ? bytes : 1), stream_),
               "scratch");
  }
  ~StreamScratch() { cudaFreeAsync(data_, stream_); }
  StreamScratch(const StreamScratch&) = delete;
  StreamScratch& operator=(const StreamScratch&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  cudaStream_t stream_;
  void* data_ = nullptr;
};

// A value that a kernel cannot go on with (an index beyond its tensor): the launch fails, and the
// next synchronisation reports it with exit code 70.
__device__ __forceinline__ void device_check(bool is_true) {  // tidy: allow bool-parameter: a check
  if (!is_true) __trap();
}

// kVec elements of T in registers as they are stored: 16 bytes (8 for a bf16 tensor beside fp32
// ones), or one element where rows are not aligned for that.
template <class T, int kVec>
struct Packed {
  static_assert(kVec * sizeof(T) == 16 || kVec * sizeof(T) == 8 || kVec == 1);
  using Word = std::conditional_t<kVec * sizeof(T) == 16, uint4, uint2>;
  alignas(kVec * sizeof(T)) T element[kVec];
};
template <class T>
inline constexpr int kVectorOf = 16 / static_cast<int>(sizeof(T));

template <class T, int kVec>
__device__ __forceinline__ Packed<T, kVec> load_packed(const T* from) {
  Packed<T, kVec> packed;
  if constexpr (kVec == 1) {
    packed.element[0] = *from;
  } else {
    using Word = typename Packed<T, kVec>::Word;
    *reinterpret_cast<Word*>(&packed) = *reinterpret_cast<const Word*>(from);
  }
  return packed;
}
template <class T, int kVec>
__device__ __forceinline__ void store_packed(T* to, const Packed<T, kVec>& packed) {
  if constexpr (kVec == 1) {
    *to = packed.element[0];
  } else {
    using Word = typename Packed<T, kVec>::Word;
    *reinterpret_cast<Word*>(to) = *reinterpret_cast<const Word*>(&packed);
  }
}

__device__ __forceinline__ float to_f32(float value) { return value; }
__device__ __forceinline__ float to_f32(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T, int kVec>
__device__ __forceinline__ void unpack(const Packed<T, kVec>& packed, float (&values)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) values[i] = to_f32(packed.element[i]);
}

// Rounds to nearest-even where T is bf16.
template <class T, int kVec>
__device__ __forceinline__ Packed<T, kVec> pack(const float (&values)[kVec]) {
  Packed<T, kVec> packed;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) packed.element[i] = values[i];
  } else if constexpr (kVec == 1) {
    packed.element[0] = __float2bfloat16_rn(values[0]);
  } else {
    auto* pairs = reinterpret_cast<__nv_bfloat162*>(&packed);
#pragma unroll
    for (int i = 0; i < kVec / 2; ++i) {
      pairs[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
    }
  }
  return packed;
}

template <class T, int kVec>
__device__ __forceinline__ void load_values(const T* from, float (&values)[kVec]) {
  unpack(load_packed<T, kVec>(from), values);
}
template <class T, int kVec>
__device__ __forceinline__ void store_values(T* to, const float (&values)[kVec]) {
  store_packed(to, pack<T, kVec>(values));
}
// The same for fp32 tensors beside bf16 ones: eight elements are two accesses.
template <int kVec>
__device__ __forceinline__ void load_floats(const float* from, float (&values)[kVec]) {
  if constexpr (kVec == 8) {
    const float4 low = *reinterpret_cast<const float4*>(from);
    const float4 high = *reinterpret_cast<const float4*>(from + 4);
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
  } else {
    load_values<float, kVec>(from, values);
  }
}
template <int kVec>
__device__ __forceinline__ void store_floats(float* to, const float (&values)[kVec]) {
  if constexpr (kVec == 8) {
    *reinterpret_cast<float4*>(to) = {values[0], values[1], values[2], values[3]};
    *reinterpret_cast<float4*>(to + 4) = {values[4], values[5], values[6], values[7]};
  } else {
    store_values<float, kVec>(to, values);
  }
}

// Copies of 16 bytes from memory to shared memory that run on while the thread works. A thread that
// reads what it copied itself needs no barrier; groups complete in order.
__device__ __forceinline__ void copy_async(unsigned address, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_async(uint4* to, const void* from) {
  copy_async(static_cast<unsigned>(__cvta_generic_to_shared(to)), from);
}
__device__ __forceinline__ void end_copy_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Returns when at most kGroups of this thread's groups are under way.
template <int kGroups>
__device__ __forceinline__ void wait_copy_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Whether every row of the views (absent ones count as such) is made of whole 16-byte vectors.
template <class... Views>
bool rows_are_vectors(const Views&... views) {
  auto is_vectors = [](const RawView& view) {
    const int64_t width = dtype_bytes(view.dtype);
    const bool is_one_row = view.shape.rank <= 1;
    const int64_t columns = is_one_row ? view.shape[0] : view.shape.row_elements();
    return view.empty() ||
           (reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && columns * width % 16 == 0 &&
            (is_one_row || view.shape[0] <= 1 || view.row_stride * width % 16 == 0));
  };
  return (is_vectors(views) && ...);
}

// body.operator()<T, kVec>() for the storage type and the vector width.
template <class Body>
void with_storage(DType dtype, bool vectors, Body&& body) {  // tidy: allow bool-parameter: shape
  if (dtype == DType::f32) {
    return vectors ? body.template operator()<float, 4>() : body.template operator()<float, 1>();
  }
  CHECK(dtype == DType::bf16);
  return vectors ? body.template operator()<__nv_bfloat16, 8>()
                 : body.template operator()<__nv_bfloat16, 1>();
}

// The rows of one tensor in a kernel.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;
  __device__ __forceinline__ T* row(int64_t index) const { return data + index * stride; }
  __device__ __forceinline__ bool is_absent() const { return data == nullptr; }
};
template <class T>
Rows<T> rows_of(const RawView& view) {
  return {static_cast<T*>(view.data), view.row_stride};
}

// The butterflies leave the same bits in every lane: a + b = b + a at each step.
__device__ __forceinline__ float warp_sum(float value) {
  for (int step = kWarpLanes / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
  for (int step = kWarpLanes / 2; step > 0; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  return value;
}

// Sums `values` over the block's threads; every thread gets the same bits. `shared` holds a warp
// count of kCount floats each and is not used again before the next barrier.
template <int kCount>
__device__ __forceinline__ void block_sum(float (&values)[kCount], float (*shared)[kCount]) {
  const int warp = threadIdx.x / kWarpLanes, warps = (blockDim.x + kWarpLanes - 1) / kWarpLanes;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = warp_sum(values[i]);
    if (threadIdx.x % kWarpLanes == 0) shared[warp][i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = shared[0][i];
    for (int w = 1; w < warps; ++w) values[i] += shared[w][i];
  }
}

}  // namespace cambium::cuda
