// Reductions of one row over eight explicit lanes (lane = index mod 8), folded by halves:
// vectorised without reassociation by the compiler, and bits that depend on the row alone (D1, D2).
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace cambium::reference {

using Float8 [[gnu::vector_size(32)]] = float;

inline Float8 load8(const float* x) {
  Float8 value;
  std::memcpy(&value, x, sizeof(value));
  return value;
}

// The first `count` < 8 elements; the other lanes hold `fill`.
inline Float8 load8_partial(const float* x, int64_t count, float fill) {
  Float8 value;
  for (int64_t i = 0; i < 8; ++i) value[i] = i < count ? x[i] : fill;
  return value;
}

inline float fold_sum(Float8 v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

inline float row_sum(const float* x, int64_t count) {
  Float8 sum{};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) sum += load8(x + i);
  if (i < count) sum += load8_partial(x + i, count - i, 0.0f);
  return fold_sum(sum);
}

inline float row_dot(const float* x, const float* y, int64_t count) {
  Float8 sum{};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) sum += load8(x + i) * load8(y + i);
  if (i < count) {
    sum += load8_partial(x + i, count - i, 0.0f) * load8_partial(y + i, count - i, 0.0f);
  }
  return fold_sum(sum);
}

// The largest element; NaN elements are passed over.
inline float row_max(const float* x, int64_t count) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  Float8 most = load8_partial(x, 0, kLowest);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const Float8 value = load8(x + i);
    most = value > most ? value : most;
  }
  if (i < count) {
    const Float8 value = load8_partial(x + i, count - i, kLowest);
    most = value > most ? value : most;
  }
  float result = most[0];
  for (int lane = 1; lane < 8; ++lane) result = most[lane] > result ? most[lane] : result;
  return result;
}

}  // namespace cambium::reference
