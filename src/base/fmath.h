// fmath: exp, log, sin, cos and pow of the numeric path, bit-identical on every x86-64-v3 machine.
//
// Numeric code uses no libm (design.md, D1): its results differ between versions and CPUs. Here
// every rounding is written out: fused multiply-adds are explicit, the rest is plain IEEE
// arithmetic under -ffp-contract=off. exp(float) and log(float) are branch-free, so loops over them
// vectorise: exp 8 lanes at a time, log 4 (it computes in double).
//
// Largest errors, measured against long double by tests/base/fmath_test.cc (ulp of the result):
//   exp(float) 1.01, log(float) 0.51,
//   exp(double) 1, log(double) 0.6, sin and cos 1 for |x| <= 2^30 (NaN beyond), pow 1.5 within
//   |y log x| <= 32 and 8 everywhere.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

namespace cambium::fmath {

namespace detail {

inline constexpr double kLn2High = 0x1.62e42fefa39efp-1;
inline constexpr double kLn2Low = 0x1.abc9e3b39803fp-56;
inline constexpr double kRoundToInteger = 0x1.8p52;  // adding it leaves the integer in the low bits
inline constexpr float kRoundToIntegerF = 0x1.8p23f;

inline double power_of_two(int32_t exponent) {
  return std::bit_cast<double>(static_cast<uint64_t>(exponent + 1023) << 52);
}

// exp(x + x_low) for a small correction x_low (|x_low| <= ulp(x)).
inline double exp_sum(double x, double x_low) {
  double bounded = x < -746.0 ? -746.0 : x;
  bounded = bounded > 710.0 ? 710.0 : bounded;
  const double shifted = __builtin_fma(bounded, 0x1.71547652b82fep+0, kRoundToInteger);
  const double n = shifted - kRoundToInteger;
  const int32_t exponent = static_cast<int32_t>(std::bit_cast<uint64_t>(shifted));
  double r = __builtin_fma(-n, kLn2High, bounded);
  r = __builtin_fma(-n, kLn2Low, r) + x_low;
  // Taylor series: |r| <= 0.347, the first term left out is below 2^-57.
  double p = 1.0 / 6227020800.0;
  p = __builtin_fma(p, r, 1.0 / 479001600.0);
  p = __builtin_fma(p, r, 1.0 / 39916800.0);
  p = __builtin_fma(p, r, 1.0 / 3628800.0);
  p = __builtin_fma(p, r, 1.0 / 362880.0);
  p = __builtin_fma(p, r, 1.0 / 40320.0);
  p = __builtin_fma(p, r, 1.0 / 5040.0);
  p = __builtin_fma(p, r, 1.0 / 720.0);
  p = __builtin_fma(p, r, 1.0 / 120.0);
  p = __builtin_fma(p, r, 1.0 / 24.0);
  p = __builtin_fma(p, r, 1.0 / 6.0);
  p = __builtin_fma(p, r, 0.5);
  const double y = 1.0 + __builtin_fma(r * r, p, r);
  // Two factors, so that results below DBL_MIN and above DBL_MAX come out right.
  const int32_t half = exponent >> 1;
  return y * power_of_two(half) * power_of_two(exponent - half);
}

struct DoubleSum {
  double high = 0.0;
  double low = 0.0;
};

// log(x) as high + low, relative error about 2^-58, for finite x > 0.
//   x = 2^k m, m in [sqrt(1/2), sqrt(2)), s = (m-1)/(m+1), log m = 2 s + 2 s^3/3 + 2 s^5/5 + ...
inline DoubleSum log_sum(double x) {
  const bool is_subnormal = x < std::numeric_limits<double>::min();
  const uint64_t bits = std::bit_cast<uint64_t>(is_subnormal ? x * 0x1p54 : x);
  const int64_t k = static_cast<int64_t>(bits - 0x3fe6a09e667f3bcdu) >> 52;
  const double m = std::bit_cast<double>(bits - (static_cast<uint64_t>(k) << 52));
  const double exponent = static_cast<double>(is_subnormal ? k - 54 : k);
  const double f = m - 1.0;
  const double d = m + 1.0;
  const double d_low = m - (d - 1.0);
  const double s = f / d;
  const double s_low = (__builtin_fma(-s, d, f) - s * d_low) / d;
  const double z = s * s;
  double p = 2.0 / 23.0;
  p = __builtin_fma(p, z, 2.0 / 21.0);
  p = __builtin_fma(p, z, 2.0 / 19.0);
  p = __builtin_fma(p, z, 2.0 / 17.0);
  p = __builtin_fma(p, z, 2.0 / 15.0);
  p = __builtin_fma(p, z, 2.0 / 13.0);
  p = __builtin_fma(p, z, 2.0 / 11.0);
  p = __builtin_fma(p, z, 2.0 / 9.0);
  p = __builtin_fma(p, z, 2.0 / 7.0);
  p = __builtin_fma(p, z, 2.0 / 5.0);
  p = __builtin_fma(p, z, 2.0 / 3.0);
  // exponent * ln 2 + 2 s, the large parts with their rounding errors kept.
  const double scaled = exponent * kLn2High;
  const double scaled_low = __builtin_fma(exponent, kLn2High, -scaled) + exponent * kLn2Low;
  const double two_s = 2.0 * s;
  const double sum = scaled + two_s;
  const double sum_low = exponent == 0.0 ? 0.0 : two_s - (sum - scaled);
  const double small = __builtin_fma(s * z, p, 2.0 * s_low) + (scaled_low + sum_low);
  const double high = sum + small;
  return {high, small - (high - sum)};
}

// x reduced by the nearest multiple of pi/2: x = quadrant * pi/2 + high + low.
struct ReducedAngle {
  double high = 0.0;
  double low = 0.0;
  int32_t quadrant = 0;
};

inline ReducedAngle reduce_angle(double x) {
  constexpr double kHalfPi1 = 0x1.921fb54442d18p+0;
  constexpr double kHalfPi2 = 0x1.1a62633145c07p-54;
  constexpr double kHalfPi3 = -0x1.f1976b7ed8fbcp-110;
  const double shifted = __builtin_fma(x, 0x1.45f306dc9c883p-1, kRoundToInteger);
  const double n = shifted - kRoundToInteger;
  const double r = __builtin_fma(-n, kHalfPi1, x);
  const double high = __builtin_fma(-n, kHalfPi2, r);
  const double low = __builtin_fma(-n, kHalfPi2, r - high) - n * kHalfPi3;
  return {high, low, static_cast<int32_t>(std::bit_cast<uint64_t>(shifted) & 3)};
}

inline double sin_reduced(const ReducedAngle& angle) {
  const double r = angle.high;
  const double z = r * r;
  double p = 1.0 / 355687428096000.0;
  p = __builtin_fma(p, z, -1.0 / 1307674368000.0);
  p = __builtin_fma(p, z, 1.0 / 6227020800.0);
  p = __builtin_fma(p, z, -1.0 / 39916800.0);
  p = __builtin_fma(p, z, 1.0 / 362880.0);
  p = __builtin_fma(p, z, -1.0 / 5040.0);
  p = __builtin_fma(p, z, 1.0 / 120.0);
  p = __builtin_fma(p, z, -1.0 / 6.0);
  // The low part enters as low * cos(r).
  return r + __builtin_fma(r * z, p, angle.low * __builtin_fma(-0.5, z, 1.0));
}

inline double cos_reduced(const ReducedAngle& angle) {
  const double r = angle.high;
  const double z = r * r;
  double p = 1.0 / 20922789888000.0;
  p = __builtin_fma(p, z, -1.0 / 87178291200.0);
  p = __builtin_fma(p, z, 1.0 / 479001600.0);
  p = __builtin_fma(p, z, -1.0 / 3628800.0);
  p = __builtin_fma(p, z, 1.0 / 40320.0);
  p = __builtin_fma(p, z, -1.0 / 720.0);
  p = __builtin_fma(p, z, 1.0 / 24.0);
  const double half_z = 0.5 * z;
  const double top = 1.0 - half_z;
  return top + (((1.0 - top) - half_z) + __builtin_fma(z * z, p, -r * angle.low));
}

inline constexpr double kLargestAngle = 0x1p30;

}  // namespace detail

inline double exp(double x) { return detail::exp_sum(x, 0.0); }

namespace detail {

// The steps of exp(float), written once for a float and for vectors of floats (reference/
// lane_math.h), whose operations `Ops` names: fused multiply-add, clamp, and bits. Same bits.
template <class Ops, class Float>
inline Float exp_steps(Float x) {
  const Float bounded = Ops::clamp(x, -104.0f, 89.0f);
  const Float shifted = Ops::fused(bounded, 0x1.715476p+0f, kRoundToIntegerF);
  const Float n = shifted - kRoundToIntegerF;
  const auto exponent = Ops::to_bits(shifted) - std::bit_cast<int32_t>(kRoundToIntegerF);
  Float r = Ops::fused(n, -0x1.62e43p-1f, bounded);
  r = Ops::fused(n, 0x1.05c61p-29f, r);
  // Minimax for (exp(r) - 1 - r) / r^2 on |r| <= ln(2)/2, relative error 3.1e-9 of exp(r).
  Float p = Ops::fused(r, 0x1.6a23dep-10f, 0x1.123a2p-7f);
  p = Ops::fused(p, r, 0x1.5558f2p-5f);
  p = Ops::fused(p, r, 0x1.555492p-3f);
  p = Ops::fused(p, r, 0x1.fffffcp-2f);
  const Float y = 1.0f + Ops::fused(r * r, p, r);
  // Two factors, so that results below FLT_MIN and above FLT_MAX come out right.
  const auto half = exponent >> 1;
  return y * Ops::from_bits((half + 127) << 23) * Ops::from_bits((exponent - half + 127) << 23);
}

struct ScalarOps {
  static float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  // NaN stays NaN.
  static float clamp(float x, float low, float high) {
    const float bounded = x < low ? low : x;
    return bounded > high ? high : bounded;
  }
  static int32_t to_bits(float x) { return std::bit_cast<int32_t>(x); }
  static float from_bits(int32_t bits) { return std::bit_cast<float>(bits); }
};

}  // namespace detail

inline float exp(float x) { return detail::exp_steps<detail::ScalarOps>(x); }

inline double log(double x) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const double finite = detail::log_sum(x).high;
  const double special = x == 0.0 ? -kInfinity : std::numeric_limits<double>::quiet_NaN();
  return x > 0.0 ? (x < kInfinity ? finite : x) : special;
}

inline float log(float x) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const bool is_subnormal = x < std::numeric_limits<float>::min();
  const uint32_t bits = std::bit_cast<uint32_t>(is_subnormal ? x * 0x1p23f : x);
  const int32_t k = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  const double m = std::bit_cast<float>(bits - (static_cast<uint32_t>(k) << 23));
  const double exponent = is_subnormal ? k - 23 : k;
  const double s = (m - 1.0) / (m + 1.0);
  const double z = s * s;
  double p = 2.0 / 15.0;
  p = __builtin_fma(p, z, 2.0 / 13.0);
  p = __builtin_fma(p, z, 2.0 / 11.0);
  p = __builtin_fma(p, z, 2.0 / 9.0);
  p = __builtin_fma(p, z, 2.0 / 7.0);
  p = __builtin_fma(p, z, 2.0 / 5.0);
  p = __builtin_fma(p, z, 2.0 / 3.0);
  const double value = __builtin_fma(exponent, detail::kLn2High, __builtin_fma(s * z, p, 2.0 * s));
  const float finite = static_cast<float>(value);
  const float special = x == 0.0f ? -kInfinity : std::numeric_limits<float>::quiet_NaN();
  return x > 0.0f ? (x < kInfinity ? finite : x) : special;
}

inline double sin(double x) {
  if (!(x <= detail::kLargestAngle && x >= -detail::kLargestAngle)) {
    return std::numeric_limits<double>::quiet_NaN();
  }
  const detail::ReducedAngle angle = detail::reduce_angle(x);
  const double value =
      (angle.quadrant & 1) == 0 ? detail::sin_reduced(angle) : detail::cos_reduced(angle);
  return (angle.quadrant & 2) == 0 ? value : -value;
}

inline double cos(double x) {
  if (!(x <= detail::kLargestAngle && x >= -detail::kLargestAngle)) {
    return std::numeric_limits<double>::quiet_NaN();
  }
  const detail::ReducedAngle angle = detail::reduce_angle(x);
  const double value =
      (angle.quadrant & 1) == 0 ? detail::cos_reduced(angle) : detail::sin_reduced(angle);
  return ((angle.quadrant + 1) & 2) == 0 ? value : -value;
}

// x^y for x >= 0 and finite y; NaN for x < 0 or infinite x.
inline double pow(double x, double y) {
  if (y == 0.0) return 1.0;
  if (x == 0.0) return y > 0.0 ? 0.0 : std::numeric_limits<double>::infinity();
  if (!(x > 0.0 && x < std::numeric_limits<double>::infinity())) {
    return std::numeric_limits<double>::quiet_NaN();
  }
  const detail::DoubleSum log_x = detail::log_sum(x);
  const double product = y * log_x.high;
  const double product_low = __builtin_fma(y, log_x.high, -product) + y * log_x.low;
  if (product > 1000.0 || product < -1000.0) return detail::exp_sum(product, 0.0);
  return detail::exp_sum(product, product_low);
}

}  // namespace cambium::fmath
