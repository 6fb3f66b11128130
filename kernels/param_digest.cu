// Parameter digest on the GPU: a warp hashes one block of 4,096 elements at a time.
//
// Within 1,024 bytes XXH3 adds products of 64-byte stripes to eight accumulators, in any order:
// lane l takes bytes 16 l of both halves, which are the words of accumulators 2 (l mod 4) and the
// next, and three shuffles add the lanes up. Only the scramble between chunks is a chain. Digests
// are integers, so sums by atomics give the same bits in any order.
#include "kernels/param_digest.h"

#include "kernels/xxh3.cuh"

namespace cambium::cuda {

namespace {

constexpr int kWarpsPerBlock = 8;
constexpr int kMaxBlocks = 1056;  // eight for each of 132 multiprocessors
constexpr int kChunksInFlight = 4;
constexpr int kFullBytes = kDigestBlockElements * 4;
constexpr int kFullChunks = kFullBytes / xxh3::kChunkBytes;
static_assert(kFullChunks % kChunksInFlight == 0);

// Two neighbouring accumulators, the same in every lane with this lane's (lane mod 4).
struct Accumulators {
  uint64_t even, odd;

  __device__ __forceinline__ void add(uint64_t data_even, uint64_t data_odd, uint64_t key_even,
                                      uint64_t key_odd) {
    even += data_odd + xxh3::keyed_product(data_even, key_even);
    odd += data_even + xxh3::keyed_product(data_odd, key_odd);
  }
  __device__ __forceinline__ void sum_lanes() {
#pragma unroll
    for (int step = 4; step < kWarpLanes; step *= 2) {
      even += __shfl_xor_sync(kAllLanes, even, step);
      odd += __shfl_xor_sync(kAllLanes, odd, step);
    }
  }
};

// This lane's keys: its words of stripe lane / 4 and of the one eight later, and of a scramble.
struct LaneKeys {
  uint64_t even[2], odd[2], scramble_even, scramble_odd;

  __device__ __forceinline__ LaneKeys(int lane, uint64_t seed) {
    const int word = lane / 4 + lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      even[half] = xxh3::seeded_word(word + 8 * half, seed);
      odd[half] = xxh3::seeded_word(word + 8 * half + 1, seed);
    }
    scramble_even = xxh3::seeded_word(16 + lane % 4 * 2, seed);
    scramble_odd = xxh3::seeded_word(17 + lane % 4 * 2, seed);
  }
};

__device__ __forceinline__ Accumulators initial_accumulators(int lane) {
  return {xxh3::kInitialAccumulators[lane % 4 * 2], xxh3::kInitialAccumulators[lane % 4 * 2 + 1]};
}

__device__ __forceinline__ Digest128 finish(const Accumulators& own, int64_t bytes, uint64_t seed) {
  uint64_t acc[8];
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    acc[2 * pair] = __shfl_sync(kAllLanes, own.even, pair);
    acc[2 * pair + 1] = __shfl_sync(kAllLanes, own.odd, pair);
  }
  return xxh3::finish_long(acc, static_cast<uint64_t>(bytes), seed);
}

// 16 bytes of the data as the words of an even and an odd accumulator.
template <bool kAligned>
__device__ __forceinline__ uint4 load_words(const uint32_t* data) {
  if constexpr (kAligned) return *reinterpret_cast<const uint4*>(data);
  return {data[0], data[1], data[2], data[3]};
}
__device__ __forceinline__ void add_words(Accumulators& sum, const uint4& words, uint64_t key_even,
                                          uint64_t key_odd) {
  sum.add(words.x | uint64_t{words.y} << 32, words.z | uint64_t{words.w} << 32, key_even, key_odd);
}

__device__ __forceinline__ void scramble(Accumulators& acc, const LaneKeys& keys) {
  acc = {xxh3::scramble(acc.even, keys.scramble_even), xxh3::scramble(acc.odd, keys.scramble_odd)};
}

// A whole block. The last stripe of an input has a key of its own.
template <bool kAligned>
__device__ __forceinline__ Digest128 hash_full(const uint32_t* data, uint64_t seed) {
  const int lane = threadIdx.x % kWarpLanes;
  const LaneKeys keys(lane, seed);
  const bool has_last = lane >= kWarpLanes - 4;
  const int last_key = xxh3::kLastStripeKey + lane % 4 * 16;
  const uint64_t last_even = has_last ? xxh3::seeded_bytes(last_key, seed) : keys.even[1];
  const uint64_t last_odd = has_last ? xxh3::seeded_bytes(last_key + 8, seed) : keys.odd[1];
  Accumulators acc = initial_accumulators(lane);
  for (int chunk = 0; chunk < kFullChunks; chunk += kChunksInFlight) {
    uint4 words[kChunksInFlight][2];
#pragma unroll
    for (int c = 0; c < kChunksInFlight; ++c) {
      const uint32_t* from = data + (chunk + c) * (xxh3::kChunkBytes / 4) + 4 * lane;
      words[c][0] = load_words<kAligned>(from);
      words[c][1] = load_words<kAligned>(from + xxh3::kChunkBytes / 8);
    }
#pragma unroll
    for (int c = 0; c < kChunksInFlight; ++c) {
      const bool is_last = chunk + c == kFullChunks - 1;
      Accumulators sum{0, 0};
      add_words(sum, words[c][0], keys.even[0], keys.odd[0]);
      add_words(sum, words[c][1], is_last ? last_even : keys.even[1],
                is_last ? last_odd : keys.odd[1]);
      sum.sum_lanes();
      acc = {acc.even + sum.even, acc.odd + sum.odd};
      if (!is_last) scramble(acc, keys);
    }
  }
  return finish(acc, kFullBytes, seed);
}

// The short block at a tensor's end, longer than xxh3::kLongestShort.
__device__ __forceinline__ Digest128 hash_partial(const uint32_t* data, int bytes, uint64_t seed) {
  const int lane = threadIdx.x % kWarpLanes;
  const LaneKeys keys(lane, seed);
  Accumulators acc = initial_accumulators(lane);
  const int stripes = (bytes - 1) / xxh3::kStripeBytes;  // the last one apart
  for (int first = 0; first <= stripes; first += 16) {
    Accumulators sum{0, 0};
    for (int half = 0; half < 2; ++half) {
      const int stripe = first + lane / 4 + 8 * half;
      if (stripe >= stripes) continue;
      const uint32_t* from = data + stripe * (xxh3::kStripeBytes / 4) + lane % 4 * 4;
      add_words(sum, load_words<false>(from), keys.even[half], keys.odd[half]);
    }
    if (first + 16 > stripes && lane < 4) {
      const int key = xxh3::kLastStripeKey + lane * 16;
      add_words(sum, load_words<false>(data + (bytes - xxh3::kStripeBytes) / 4 + lane * 4),
                xxh3::seeded_bytes(key, seed), xxh3::seeded_bytes(key + 8, seed));
    }
    sum.sum_lanes();
    acc = {acc.even + sum.even, acc.odd + sum.odd};
    if (first + 16 <= stripes) scramble(acc, keys);
  }
  return finish(acc, bytes, seed);
}

__device__ __forceinline__ void add_digest(unsigned long long* sum_2, const Digest128& digest) {
  const auto before = atomicAdd(sum_2, digest.low);  // tidy: allow float-atomics: integers
  const uint64_t high = digest.high + (before + digest.low < before ? 1 : 0);
  atomicAdd(sum_2 + 1, high);  // tidy: allow float-atomics: integers
}

template <bool kAligned>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpLanes)
    param_digest_kernel(const uint32_t* data_N, int64_t N, uint64_t tensor, int64_t first_block,
                        unsigned long long* sum_2) {
  __shared__ unsigned long long block_sum_2[2];
  if (threadIdx.x < 2) block_sum_2[threadIdx.x] = 0;
  __syncthreads();
  const int64_t warp = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / kWarpLanes;
  const int64_t blocks = (N + kDigestBlockElements - 1) / kDigestBlockElements;
  for (int64_t b = warp; b < blocks; b += int64_t{gridDim.x} * kWarpsPerBlock) {
    const uint32_t* data = data_N + b * kDigestBlockElements;
    const int64_t bytes = 4 * min(kDigestBlockElements, N - b * kDigestBlockElements);
    const uint64_t seed = xxh3::hash_words(tensor, static_cast<uint64_t>(first_block + b));
    Digest128 digest;
    if (bytes == kFullBytes) {
      digest = hash_full<kAligned>(data, seed);
    } else if (bytes > xxh3::kLongestShort) {
      digest = hash_partial(data, static_cast<int>(bytes), seed);
    } else {
      digest = xxh3::hash_short(data, static_cast<int>(bytes), seed);
    }
    if (threadIdx.x % kWarpLanes == 0) add_digest(block_sum_2, digest);
  }
  __syncthreads();
  if (threadIdx.x == 0) add_digest(sum_2, {block_sum_2[0], block_sum_2[1]});
}

}  // namespace

void param_digest(const ParamDigestArgs& args, Stream& stream) {
  const int64_t N = args.data_N[0];
  auto* sum_2 = reinterpret_cast<unsigned long long*>(args.sum_2.pointer());
  check_cuda(cudaMemsetAsync(sum_2, 0, sizeof(Digest128), native_stream(stream)), "param_digest");
  const bool is_aligned = reinterpret_cast<uintptr_t>(args.data_N.data) % 16 == 0;
  const int64_t wanted = blocks_for(N, kWarpsPerBlock * kDigestBlockElements);
  launch("param_digest", is_aligned ? param_digest_kernel<true> : param_digest_kernel<false>,
         {.blocks = std::min<int64_t>(kMaxBlocks, wanted), .threads = kWarpsPerBlock * kWarpLanes},
         stream, reinterpret_cast<const uint32_t*>(args.data_N.pointer()), N, args.tensor_id,
         args.first_block, sum_2);
}

}  // namespace cambium::cuda
