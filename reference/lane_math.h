// Eight fp32 lanes (one AVX2 register): the unit of explicit vector code and of fixed-order sums.
//
// The compiler may not reorder a sum, so reductions name their partial sums: element i goes to
// lane i % 32 in turn, lanes are combined in one fixed order. The result depends on the values and
// their count alone.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>
#include <cstring>

#include "src/base/fmath.h"

namespace cambium::reference {

using Lanes = float __attribute__((vector_size(32)));
using LaneBits = int32_t __attribute__((vector_size(32)));
constexpr int64_t kLanes = 8;

inline Lanes load_lanes(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}
inline void store_lanes(float* to, Lanes lanes) { std::memcpy(to, &lanes, sizeof(lanes)); }
// For short rows: a call of memmove costs more than the copy.
inline void copy_row(const float* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_lanes(to + i, load_lanes(from + i));
  for (; i < count; ++i) to[i] = from[i];
}
inline Lanes broadcast(float value) { return _mm256_set1_ps(value); }
inline Lanes fma_lanes(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
// To nearest-even bf16, as f32_to_bf16 rounds numbers.
inline Lanes bf16_lanes(Lanes x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_srli_epi32(sum, 16), 16));
}
inline Lanes max_lanes(Lanes a, Lanes b) { return _mm256_max_ps(a, b); }

struct LaneOps {
  static Lanes fused(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
  static Lanes fused(Lanes a, float b, float c) { return fused(a, broadcast(b), broadcast(c)); }
  static Lanes fused(Lanes a, float b, Lanes c) { return fused(a, broadcast(b), c); }
  static Lanes fused(Lanes a, Lanes b, float c) { return fused(a, b, broadcast(c)); }
  // The operand order keeps NaN, as the scalar form does.
  static Lanes clamp(Lanes x, float low, float high) {
    return _mm256_min_ps(broadcast(high), _mm256_max_ps(broadcast(low), x));
  }
  static LaneBits to_bits(Lanes x) { return std::bit_cast<LaneBits>(x); }
  static Lanes from_bits(LaneBits bits) { return std::bit_cast<Lanes>(bits); }
};

// fmath::exp of every lane, bit for bit.
inline Lanes exp_lanes(Lanes x) { return fmath::detail::exp_steps<LaneOps>(x); }

inline float sum_of_lanes(Lanes v) {
  return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

// Sum of a[i] b[i] in fp32.
inline float dot(const float* a, const float* b, int64_t count) {
  Lanes sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int part = 0; part < 4; ++part) {
      const int64_t at = i + part * kLanes;
      sum[part] = fma_lanes(load_lanes(a + at), load_lanes(b + at), sum[part]);
    }
  }
  for (; i + kLanes <= count; i += kLanes) {
    sum[0] = fma_lanes(load_lanes(a + i), load_lanes(b + i), sum[0]);
  }
  float total = sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < count; ++i) total = __builtin_fmaf(a[i], b[i], total);
  return total;
}

// Sum of a[i] b[i] c[i] in fp32.
inline float dot3(const float* a, const float* b, const float* c, int64_t count) {
  Lanes sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int part = 0; part < 4; ++part) {
      const int64_t at = i + part * kLanes;
      sum[part] = fma_lanes(load_lanes(a + at) * load_lanes(b + at), load_lanes(c + at), sum[part]);
    }
  }
  for (; i + kLanes <= count; i += kLanes) {
    sum[0] = fma_lanes(load_lanes(a + i) * load_lanes(b + i), load_lanes(c + i), sum[0]);
  }
  float total = sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < count; ++i) total = __builtin_fmaf(a[i] * b[i], c[i], total);
  return total;
}

// Sum of a[i] in fp32.
inline float sum(const float* a, int64_t count) {
  Lanes sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int part = 0; part < 4; ++part) sum[part] += load_lanes(a + i + part * kLanes);
  }
  for (; i + kLanes <= count; i += kLanes) sum[0] += load_lanes(a + i);
  float total = sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < count; ++i) total += a[i];
  return total;
}

// The largest of a[0..count), count >= 1. A NaN may be passed over.
inline float max_of(const float* a, int64_t count) {
  Lanes best[4] = {broadcast(a[0]), broadcast(a[0]), broadcast(a[0]), broadcast(a[0])};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int part = 0; part < 4; ++part) {
      best[part] = max_lanes(best[part], load_lanes(a + i + part * kLanes));
    }
  }
  const Lanes top = max_lanes(max_lanes(best[0], best[1]), max_lanes(best[2], best[3]));
  float largest = top[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = top[lane] > largest ? top[lane] : largest;
  for (; i < count; ++i) largest = a[i] > largest ? a[i] : largest;
  return largest;
}

// Rows per chunk of a parallel_for over rows: about 16K elements a chunk, so that a chunk is worth
// its overhead, and at most `kMostChunks` chunks. A function of the shape alone.
inline int64_t rows_per_chunk(int64_t rows, int64_t row_elements) {
  constexpr int64_t kChunkElements = 16384, kMostChunks = 64;
  const int64_t by_size = kChunkElements / (row_elements > 0 ? row_elements : 1);
  const int64_t by_count = (rows + kMostChunks - 1) / kMostChunks;
  const int64_t chosen = by_size > by_count ? by_size : by_count;
  return chosen < 1 ? 1 : chosen;
}

}  // namespace cambium::reference
