#include "src/base/philox.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "src/base/check.h"
#include "src/base/fmath.h"

namespace cambium {

namespace {

// Eight rounds of an unbalanced Feistel network: far above the four that make it pseudo-random.
constexpr int kFeistelRounds = 8;
// Small sets walk inside at least this domain, where halves are wide enough to mix.
constexpr int kMinFeistelBits = 6;

constexpr uint64_t low_mask(int bits) { return (uint64_t{1} << bits) - 1; }

struct FeistelKey {
  PhiloxKey key;
  uint64_t epoch;
};

uint64_t feistel_round(uint64_t half, int round, const FeistelKey& key) {
  // NOTE: the round sits in the top byte of the half's upper word; halves stay below 2^33.
  const PhiloxCounter bits =
      philox4x32({static_cast<uint32_t>(half),
                  static_cast<uint32_t>(half >> 32) | static_cast<uint32_t>(round) << 24,
                  static_cast<uint32_t>(key.epoch), static_cast<uint32_t>(key.epoch >> 32)},
                 key.key);
  return uint64_t{bits[1]} << 32 | bits[0];
}

// A bijection of [0, 2^bits): the two parts swap roles each round, so any width works.
uint64_t feistel(uint64_t value, int bits, const FeistelKey& key) {
  int left_bits = bits / 2, right_bits = bits - left_bits;
  uint64_t left = value >> right_bits, right = value & low_mask(right_bits);
  for (int round = 0; round < kFeistelRounds; ++round) {
    const uint64_t mixed = (left ^ feistel_round(right, round, key)) & low_mask(left_bits);
    left = right;
    right = mixed;
    std::swap(left_bits, right_bits);
  }
  return left << right_bits | right;
}

// The four normals of one counter: elements 4 * quad .. 4 * quad + 3 of a tensor. Box-Muller in
// fp64, rounded once; a radius of at most 6.8 comes from 32 random bits.
std::array<float, 4> normal_quad(const RandomSequence& sequence, uint64_t quad) {
  constexpr double kTwoPi = 0x1.921fb54442d18p+2;
  const PhiloxCounter bits = random_bits(sequence, quad);
  std::array<float, 4> normals{};
  for (int pair = 0; pair < 2; ++pair) {
    const double open_uniform = (static_cast<double>(bits[2 * pair]) + 0.5) * 0x1p-32;
    const double angle = kTwoPi * (static_cast<double>(bits[2 * pair + 1]) * 0x1p-32);
    const double radius = __builtin_sqrt(-2.0 * fmath::log(open_uniform));
    normals[2 * pair] = static_cast<float>(radius * fmath::cos(angle));
    normals[2 * pair + 1] = static_cast<float>(radius * fmath::sin(angle));
  }
  return normals;
}

}  // namespace

float random_normal(const RandomSequence& sequence, uint64_t element) {
  return normal_quad(sequence, element / 4)[element % 4];
}

void fill_normal(float* out, uint64_t first_element, int64_t count, float std, uint64_t seed,
                 uint64_t tensor_id) {
  const RandomSequence sequence{seed, RandomStream::init, tensor_id};
  const uint64_t end = first_element + static_cast<uint64_t>(count);
  for (uint64_t element = first_element; element < end;) {
    const std::array<float, 4> normals = normal_quad(sequence, element / 4);
    do {
      *out++ = std * normals[element % 4];
    } while (++element % 4 != 0 && element < end);
  }
}

uint64_t permute_index(uint64_t index, uint64_t n, uint64_t seed, uint64_t epoch) {
  CHECK_LT(index, n);
  CHECK_LE(n, uint64_t{1} << 62);
  const int bits = std::max<int>(kMinFeistelBits, std::bit_width(n - 1));
  const FeistelKey key{philox_key(seed, RandomStream::data), epoch};
  // Cycle walking: below two steps on average, because n is above half of the domain (or tiny).
  do {
    index = feistel(index, bits, key);
  } while (index >= n);
  return index;
}

}  // namespace cambium
