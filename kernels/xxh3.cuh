// XXH3-128 (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md) as the GPU needs it:
// the mixing functions, inputs of up to 240 bytes whole, and the end of a long input's hash. The
// long loop is the kernel's (kernels/param_digest.cu). Bytes are little-endian; lengths are
// multiples of 4.
#pragma once

#include <cstdint>

#include "kernels/cuda_launch.cuh"
#include "src/base/digest.h"

namespace cambium::cuda::xxh3 {

inline constexpr uint64_t kPrime32_1 = 0x9e3779b1, kPrime32_2 = 0x85ebca77, kPrime32_3 = 0xc2b2ae3d;
inline constexpr uint64_t kPrime64_1 = 0x9e3779b185ebca87, kPrime64_2 = 0xc2b2ae3d27d4eb4f,
                          kPrime64_3 = 0x165667b19e3779f9, kPrime64_4 = 0x85ebca77c2b2ae63,
                          kPrime64_5 = 0x27d4eb2f165667c5;
inline constexpr uint64_t kMix1 = 0x165667919e3779f9, kMix2 = 0x9fb21c651e98df25;
inline constexpr int kSecretBytes = 192;
inline constexpr int kStripeBytes = 64;
inline constexpr int kChunkBytes = 1024;  // stripes between two scrambles: (192 - 64) / 8
inline constexpr int kLastStripeKey = kSecretBytes - kStripeBytes - 7;
inline constexpr int kLongestShort = 240;

// The default secret as words. Constant memory: an array in a function would be copied to each
// thread's stack.
__constant__ const uint64_t kSecretWords[kSecretBytes / 8] = {
    0xbe4ba423396cfeb8, 0x1cad21f72c81017c, 0xdb979083e96dd4de, 0x1f67b3b7a4a44072,
    0x78e5c0cc4ee679cb, 0x2172ffcc7dd05a82, 0x8e2443f7744608b8, 0x4c263a81e69035e0,
    0xcb00c391bb52283c, 0xa32e531b8b65d088, 0x4ef90da297486471, 0xd8acdea946ef1938,
    0x3f349ce33f76faa8, 0x1d4f0bc7c7bbdcf9, 0x3159b4cd4be0518a, 0x647378d9c97e9fc8,
    0xc3ebd33483acc5ea, 0xeb6313faffa081c5, 0x49daf0b751dd0d17, 0x9e68d429265516d3,
    0xfca1477d58be162b, 0xce31d07ad1b8f88f, 0x280416958f3acb45, 0x7e404bbbcafbd7af};
__constant__ const uint64_t kInitialAccumulators[8] = {
    kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3, kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};

// The secret made from a seed: words alternately plus and minus the seed. Seed 0: the default.
__device__ __forceinline__ uint64_t seeded_word(int index, uint64_t seed) {
  return kSecretWords[index] + (index % 2 == 0 ? seed : 0 - seed);
}
// Eight bytes of it from any byte offset.
__device__ __forceinline__ uint64_t seeded_bytes(int offset, uint64_t seed) {
  const int word = offset / 8, shift = offset % 8 * 8;
  const uint64_t low = seeded_word(word, seed);
  return shift == 0 ? low : low >> shift | seeded_word(word + 1, seed) << (64 - shift);
}
__device__ __forceinline__ uint64_t secret_bytes(int offset) { return seeded_bytes(offset, 0); }

// An input of 4-byte words at any alignment of 4.
__device__ __forceinline__ uint64_t read_bytes(const uint32_t* data, int offset) {
  return data[offset / 4] | uint64_t{data[offset / 4 + 1]} << 32;
}

__device__ __forceinline__ Digest128 multiply(uint64_t a, uint64_t b) {
  return {a * b, __umul64hi(a, b)};
}
__device__ __forceinline__ uint64_t multiply_fold(uint64_t a, uint64_t b) {
  return a * b ^ __umul64hi(a, b);
}
__device__ __forceinline__ uint32_t swap_bytes(uint32_t x) {
  return x << 24 | (x & 0xff00) << 8 | (x >> 8 & 0xff00) | x >> 24;
}
__device__ __forceinline__ uint64_t swap_bytes(uint64_t x) {
  return uint64_t{swap_bytes(static_cast<uint32_t>(x))} << 32 |
         swap_bytes(static_cast<uint32_t>(x >> 32));
}
__device__ __forceinline__ uint64_t avalanche(uint64_t h) {
  h = (h ^ h >> 37) * kMix1;
  return h ^ h >> 32;
}

// XXH3-64 of two words, seed 0: the seed of a digest block.
__device__ __forceinline__ uint64_t hash_words(uint64_t first, uint64_t second) {
  const uint64_t low = first ^ secret_bytes(24) ^ secret_bytes(32);
  const uint64_t high = second ^ secret_bytes(40) ^ secret_bytes(48);
  return avalanche(16 + swap_bytes(low) + high + multiply_fold(low, high));
}

// What one stripe adds to accumulators i and i ^ 1 for its word i.
__device__ __forceinline__ uint64_t keyed_product(uint64_t data, uint64_t key) {
  const uint64_t keyed = data ^ key;
  return (keyed & 0xffffffff) * (keyed >> 32);
}
__device__ __forceinline__ uint64_t scramble(uint64_t acc, uint64_t key) {
  return (acc ^ acc >> 47 ^ key) * kPrime32_1;
}
__device__ __forceinline__ uint64_t merge(const uint64_t (&acc)[8], int key_offset, uint64_t seed,
                                          uint64_t start) {
  for (int i = 0; i < 4; ++i) {
    start += multiply_fold(acc[2 * i] ^ seeded_bytes(key_offset + 16 * i, seed),
                           acc[2 * i + 1] ^ seeded_bytes(key_offset + 16 * i + 8, seed));
  }
  return avalanche(start);
}
// The hash of a long input from its accumulators after the last stripe.
__device__ __forceinline__ Digest128 finish_long(const uint64_t (&acc)[8], uint64_t byte_count,
                                                 uint64_t seed) {
  return {merge(acc, 11, seed, byte_count * kPrime64_1),
          merge(acc, kSecretBytes - kStripeBytes - 11, seed, ~(byte_count * kPrime64_2))};
}

__device__ __forceinline__ Digest128 hash_4_to_8(const uint32_t* data, int bytes, uint64_t seed) {
  seed ^= uint64_t{swap_bytes(static_cast<uint32_t>(seed))} << 32;
  const uint64_t input = data[0] | uint64_t{data[bytes / 4 - 1]} << 32;
  const uint64_t keyed = input ^ ((secret_bytes(16) ^ secret_bytes(24)) + seed);
  Digest128 m = multiply(keyed, kPrime64_1 + (static_cast<uint64_t>(bytes) << 2));
  m.high += m.low << 1;
  m.low ^= m.high >> 3;
  m.low = (m.low ^ m.low >> 35) * kMix2;
  return {m.low ^ m.low >> 28, avalanche(m.high)};
}

__device__ __forceinline__ Digest128 hash_9_to_16(const uint32_t* data, int bytes, uint64_t seed) {
  const uint64_t flip_low = (secret_bytes(32) ^ secret_bytes(40)) - seed;
  const uint64_t flip_high = (secret_bytes(48) ^ secret_bytes(56)) + seed;
  const uint64_t low = read_bytes(data, 0);
  uint64_t high = read_bytes(data, bytes - 8);
  Digest128 m = multiply(low ^ high ^ flip_low, kPrime64_1);
  m.low += static_cast<uint64_t>(bytes - 1) << 54;
  high ^= flip_high;
  m.high += high + (high & 0xffffffff) * (kPrime32_2 - 1);
  m.low ^= swap_bytes(m.high);
  Digest128 h = multiply(m.low, kPrime64_2);
  h.high += m.high * kPrime64_2;
  return {avalanche(h.low), avalanche(h.high)};
}

// Two accumulators over pairs of 16 bytes.
struct Mix32 {
  const uint32_t* data;
  uint64_t low, high = 0;

  __device__ __forceinline__ uint64_t mix_16(int offset, int key_offset, uint64_t seed) const {
    return multiply_fold(read_bytes(data, offset) ^ (secret_bytes(key_offset) + seed),
                         read_bytes(data, offset + 8) ^ (secret_bytes(key_offset + 8) - seed));
  }
  __device__ __forceinline__ void add(int first, int second, int key_offset, uint64_t seed) {
    low += mix_16(first, key_offset, seed);
    low ^= read_bytes(data, second) + read_bytes(data, second + 8);
    high += mix_16(second, key_offset + 16, seed);
    high ^= read_bytes(data, first) + read_bytes(data, first + 8);
  }
  __device__ __forceinline__ Digest128 finish(uint64_t bytes, uint64_t seed) const {
    return {avalanche(low + high),
            0 - avalanche(low * kPrime64_1 + high * kPrime64_4 + (bytes - seed) * kPrime64_2)};
  }
};

__device__ __forceinline__ Digest128 hash_17_to_240(const uint32_t* data, int bytes,
                                                    uint64_t seed) {
  Mix32 mix{data, bytes * kPrime64_1};
  if (bytes <= 128) {
    for (int i = (bytes - 1) / 32; i >= 0; --i) {
      mix.add(16 * i, bytes - 16 * (i + 1), 32 * i, seed);
    }
    return mix.finish(bytes, seed);
  }
  for (int i = 0; i < 128; i += 32) mix.add(i, i + 16, i, seed);
  mix.low = avalanche(mix.low), mix.high = avalanche(mix.high);
  for (int i = 128; i + 32 <= bytes; i += 32) mix.add(i, i + 16, 3 + i - 128, seed);
  mix.add(bytes - 16, bytes - 32, 103, 0 - seed);
  return mix.finish(bytes, seed);
}

// XXH3-128 of 4 to 240 bytes.
__device__ __forceinline__ Digest128 hash_short(const uint32_t* data, int bytes, uint64_t seed) {
  if (bytes <= 8) return hash_4_to_8(data, bytes, seed);
  if (bytes <= 16) return hash_9_to_16(data, bytes, seed);
  return hash_17_to_240(data, bytes, seed);
}

}  // namespace cambium::cuda::xxh3
