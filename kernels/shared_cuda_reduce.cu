// Reductions over virtual ranks in a fixed order: the roundings of sim/reduce.cc, bit for bit.
// Napkin: (ranks + 1) elements of traffic per element; memory bound.
#include <algorithm>
#include <type_traits>

#include "kernels/cuda_launch.cuh"

namespace cambium::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 132 * 8;

struct Bf16 {
  uint16_t bits;
};

struct Sources {
  const void* data[kMostReducedRanks];
};

template <class T>
__device__ __forceinline__ auto widen(T value) {
  if constexpr (std::is_same_v<T, Bf16>) {
    return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
  } else {
    return value;
  }
}

template <class T, class Wide>
__device__ __forceinline__ T narrow(Wide value) {
  if constexpr (std::is_same_v<T, Bf16>) {
    const unsigned bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
  } else {
    return static_cast<T>(value);
  }
}

template <RankCombine kCombine, class Wide>
__device__ __forceinline__ Wide combine(Wide left, Wide right) {
  if constexpr (kCombine == RankCombine::max) {
    return left != left || left > right ? left : right;
  } else if constexpr (std::is_integral_v<Wide>) {
    using Unsigned = std::make_unsigned_t<Wide>;
    return static_cast<Wide>(static_cast<Unsigned>(left) + static_cast<Unsigned>(right));
  } else {
    return __fadd_rn(left, right);
  }
}

template <class T, RankCombine kCombine>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const __grid_constant__ Sources sources, int ranks, int start,
                  RankRounding rounding, int64_t first, int64_t count, T* out) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < count;
       i += step) {
    auto sum = widen(static_cast<const T*>(sources.data[start])[first + i]);
    for (int r = 1; r < ranks; ++r) {
      const int rank = start + r < ranks ? start + r : start + r - ranks;
      sum = combine<kCombine>(sum, widen(static_cast<const T*>(sources.data[rank])[first + i]));
      if (rounding == RankRounding::every_rank) sum = widen(narrow<T>(sum));
    }
    out[i] = narrow<T>(sum);
  }
}

template <class T>
void reduce_typed(const RankReduction& r, Stream& stream) {
  Sources sources;
  std::copy(r.sources.begin(), r.sources.end(), sources.data);
  const int64_t blocks = std::min(kMostBlocks, (r.count + kThreads - 1) / kThreads);
  const auto kernel = r.combine == RankCombine::sum ? reduce_kernel<T, RankCombine::sum>
                                                    : reduce_kernel<T, RankCombine::max>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, native_stream(stream)>>>(
      sources, static_cast<int>(r.sources.size()), r.start, r.rounding, r.first, r.count,
      static_cast<T*>(r.out));
  check_cuda(cudaGetLastError(), "reduce over ranks");
}

}  // namespace

void reduce_ranks(const RankReduction& r, Stream& stream) {
  if (r.count == 0) return;
  if (std::ssize(r.sources) > kMostReducedRanks) {
    fail(ExitCode::usage, "{} virtual ranks on one GPU; next: a layout of at most {} ranks",
         r.sources.size(), kMostReducedRanks);
  }
  switch (r.dtype) {
    case DType::f32:
      return reduce_typed<float>(r, stream);
    case DType::bf16:
      return reduce_typed<Bf16>(r, stream);
    case DType::i32:
      return reduce_typed<int32_t>(r, stream);
    case DType::i64:
      return reduce_typed<int64_t>(r, stream);
    case DType::u8:
      return reduce_typed<uint8_t>(r, stream);
  }
}

}  // namespace cambium::cuda
