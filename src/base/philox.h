// Philox4x32-10: counter-based random numbers (Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011). A draw is a pure function of (root seed, stream, entity, element), so adding
// a draw to one stream never shifts another, and shards generate their own part of a tensor.
//
//   key     = mix(root seed, stream)                        (64 bits)
//   counter = [element / 4 or element, 64 bits | entity, 64 bits]
//
// A call costs 20 multiplications of 32 bits and yields 128 bits.
#pragma once

#include <array>
#include <cstdint>

namespace cambium {

// Named streams of the root seed. NOTE: the values are part of every run's bits; never renumber.
enum class RandomStream : uint32_t {
  init = 0,
  data = 1,
  routing_noise = 2,
  schedule = 3,
  latency = 4,
  faults = 5,
};

using PhiloxCounter = std::array<uint32_t, 4>;
using PhiloxKey = std::array<uint32_t, 2>;

// Ten rounds of the bijection; the reference vectors of Random123 are in tests/base/philox.cc.
constexpr PhiloxCounter philox4x32(PhiloxCounter counter, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * counter[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key[0],
               static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key[1],
               static_cast<uint32_t>(product0)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

// The finaliser of SplitMix64: a bijection of 64 bits with full avalanche.
constexpr uint64_t mix_u64(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EB;
  return value ^ (value >> 31);
}

constexpr PhiloxKey philox_key(uint64_t seed, RandomStream stream) {
  const uint64_t mixed = mix_u64(seed + 0x9E3779B97F4A7C15 * (static_cast<uint64_t>(stream) + 1));
  return {static_cast<uint32_t>(mixed), static_cast<uint32_t>(mixed >> 32)};
}

// One sequence of draws: `entity` names who draws (a tensor id, a rank, an epoch, a message).
struct RandomSequence {
  uint64_t seed = 0;
  RandomStream stream = RandomStream::init;
  uint64_t entity = 0;
};

// 128 bits for draw number `element` of a sequence.
constexpr PhiloxCounter random_bits(const RandomSequence& sequence, uint64_t element) {
  return philox4x32(
      {static_cast<uint32_t>(element), static_cast<uint32_t>(element >> 32),
       static_cast<uint32_t>(sequence.entity), static_cast<uint32_t>(sequence.entity >> 32)},
      philox_key(sequence.seed, sequence.stream));
}

constexpr uint64_t random_u64(const RandomSequence& sequence, uint64_t element) {
  const PhiloxCounter bits = random_bits(sequence, element);
  return uint64_t{bits[1]} << 32 | bits[0];
}

// Uniform in [0, 1), a multiple of 2^-53.
constexpr double random_uniform(const RandomSequence& sequence, uint64_t element) {
  return static_cast<double>(random_u64(sequence, element) >> 11) * 0x1p-53;
}

// Uniform in [0, bound), bound >= 1; the bias is below bound * 2^-64.
constexpr uint64_t random_below(uint64_t bound, const RandomSequence& sequence, uint64_t element) {
  return static_cast<uint64_t>(
      (static_cast<unsigned __int128>(random_u64(sequence, element)) * bound) >> 64);
}

// Standard normal of draw number `element` (Box-Muller through src/base/fmath.h). Four elements
// share a counter, so an entity draws either normals or bits, never both.
float random_normal(const RandomSequence& sequence, uint64_t element);

// out[i] = std * normal(first_element + i) of the init stream: a value depends on (seed, tensor_id)
// and the element's canonical index alone. `tensor_id` comes from src/base/digest.h.
void fill_normal(float* out, uint64_t first_element, int64_t count, float std, uint64_t seed,
                 uint64_t tensor_id);

// The image of `index` under a pseudo-random permutation of [0, n) that is a pure function of
// (seed, epoch): a Feistel network over the next power of two, walked until it lands below n.
uint64_t permute_index(uint64_t index, uint64_t n, uint64_t seed, uint64_t epoch);

}  // namespace cambium
