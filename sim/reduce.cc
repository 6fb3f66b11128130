#include "sim/reduce.h"

#include <algorithm>
#include <bit>
#include <type_traits>

namespace cambium::sim {

namespace {

constexpr int64_t kBlock = 2048;         // elements: accumulators stay in the first-level cache
constexpr int64_t kBlocksPerChunk = 16;  // of work handed to a thread at a time

struct Bf16 {
  uint16_t bits;
};

// An element as it is accumulated: fp32 for floats, unsigned for sums of integers (they wrap).
float widen(float value) { return value; }
float widen(Bf16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }
template <class T>
T widen(T value) {
  return value;
}

template <class T, class Wide>
T narrow(Wide value) {
  if constexpr (std::is_same_v<T, Bf16>) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
  } else {
    return static_cast<T>(value);
  }
}

template <ReduceOp kReduce, class Wide>
Wide combine(Wide left, Wide right) {
  if constexpr (kReduce == ReduceOp::max) {
    return left != left || left > right ? left : right;
  } else if constexpr (std::is_integral_v<Wide>) {
    using Unsigned = std::make_unsigned_t<Wide>;
    return static_cast<Wide>(static_cast<Unsigned>(left) + static_cast<Unsigned>(right));
  } else {
    return left + right;
  }
}

template <class T, ReduceOp kReduce>
void reduce_block(const ReduceSegment& segment, int64_t begin, int64_t count) {
  using Wide = decltype(widen(T{}));
  Wide sum[kBlock];
  const auto ranks = std::ssize(segment.sources);
  for (int64_t i = 0; i < ranks; ++i) {
    const auto rank = static_cast<size_t>((segment.start + i) % ranks);
    const T* source = static_cast<const T*>(segment.sources[rank]) + segment.first + begin;
    if (i == 0) {
      for (int64_t j = 0; j < count; ++j) sum[j] = widen(source[j]);
    } else if (segment.order == ReductionOrder::ring) {
      for (int64_t j = 0; j < count; ++j) {
        sum[j] = widen(narrow<T>(combine<kReduce>(sum[j], widen(source[j]))));
      }
    } else {
      for (int64_t j = 0; j < count; ++j) sum[j] = combine<kReduce>(sum[j], widen(source[j]));
    }
  }
  T* out = static_cast<T*>(segment.out) + begin;
  for (int64_t j = 0; j < count; ++j) out[j] = narrow<T>(sum[j]);
}

template <class T, ReduceOp kReduce>
void reduce_all(const ReduceSegment& segment, Workers& workers) {
  const int64_t per_chunk = kBlock * kBlocksPerChunk;
  const int64_t chunks = (segment.count + per_chunk - 1) / per_chunk;
  workers.parallel_for(chunks, [&](int64_t chunk, Scratch&) {
    const int64_t end = std::min(segment.count, (chunk + 1) * per_chunk);
    for (int64_t begin = chunk * per_chunk; begin < end; begin += kBlock) {
      reduce_block<T, kReduce>(segment, begin, std::min(kBlock, end - begin));
    }
  });
}

template <class T>
void reduce_typed(const ReduceSegment& segment, Workers& workers) {
  switch (segment.reduce) {
    case ReduceOp::sum:
      return reduce_all<T, ReduceOp::sum>(segment, workers);
    case ReduceOp::max:
      return reduce_all<T, ReduceOp::max>(segment, workers);
  }
}

}  // namespace

void reduce_segment(const ReduceSegment& segment, Workers& workers) {
  switch (segment.dtype) {
    case DType::f32:
      return reduce_typed<float>(segment, workers);
    case DType::bf16:
      return reduce_typed<Bf16>(segment, workers);
    case DType::i32:
      return reduce_typed<int32_t>(segment, workers);
    case DType::i64:
      return reduce_typed<int64_t>(segment, workers);
    case DType::u8:
      return reduce_typed<uint8_t>(segment, workers);
  }
}

}  // namespace cambium::sim
