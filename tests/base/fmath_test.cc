// fmath against long double libm: largest error in ulp over dense samples, and the special values.
#include "src/base/fmath.h"

#include <cmath>
#include <vector>

#include "gtest/gtest.h"

namespace cambium {
namespace {

constexpr float kInfinityF = std::numeric_limits<float>::infinity();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// |value - exact| in units of the last place of `exact` rounded to Float.
template <class Float>
double error_in_ulp(Float value, long double exact) {
  const Float rounded = std::abs(static_cast<Float>(exact));
  const Float next = std::nextafter(rounded, std::numeric_limits<Float>::infinity());
  return static_cast<double>(std::fabs(static_cast<long double>(value) - exact) /
                             (static_cast<long double>(next) - rounded));
}

TEST(Fmath, ExpFloatIsWithinOneUlpOnTheWholeRange) {
  double worst = 0.0, worst_subnormal = 0.0;
  for (uint32_t bits = 0; bits < 0x42b20000u; bits += 97) {  // up to 89
    for (uint32_t sign : {0u, 0x80000000u}) {
      const float x = std::bit_cast<float>(bits | sign);
      const long double exact = std::exp(static_cast<long double>(x));
      if (exact > std::numeric_limits<float>::max()) continue;
      const double error = error_in_ulp(fmath::exp(x), exact);
      double& target = exact < std::numeric_limits<float>::min() ? worst_subnormal : worst;
      target = std::max(target, error);
    }
  }
  EXPECT_LE(worst, 1.01);
  EXPECT_GE(worst, 0.5);  // the sample reaches hard cases
  EXPECT_LE(worst_subnormal, 1.0);
  RecordProperty("worst_ulp", std::to_string(worst));
}

TEST(Fmath, ExpFloatSpecialValues) {
  EXPECT_EQ(fmath::exp(0.0f), 1.0f);
  EXPECT_EQ(fmath::exp(-0.0f), 1.0f);
  EXPECT_EQ(fmath::exp(-kInfinityF), 0.0f);
  EXPECT_EQ(fmath::exp(kInfinityF), kInfinityF);
  EXPECT_EQ(fmath::exp(88.73f), kInfinityF);
  EXPECT_EQ(fmath::exp(-104.0f), 0.0f);
  EXPECT_TRUE(std::isnan(fmath::exp(std::nanf(""))));
}

TEST(Fmath, LogFloatIsNearlyCorrectlyRounded) {
  double worst = 0.0;
  for (uint32_t bits = 1; bits < 0x7f800000u; bits += 151) {
    const float x = std::bit_cast<float>(bits);
    worst = std::max(worst, error_in_ulp(fmath::log(x), std::log(static_cast<long double>(x))));
  }
  EXPECT_LE(worst, 0.51);
  EXPECT_EQ(fmath::log(1.0f), 0.0f);
  EXPECT_EQ(fmath::log(0.0f), -kInfinityF);
  EXPECT_EQ(fmath::log(kInfinityF), kInfinityF);
  EXPECT_TRUE(std::isnan(fmath::log(-1.0f)));
  EXPECT_TRUE(std::isnan(fmath::log(std::nanf(""))));
}

// Deterministic sample points: x_i = low + (high - low) * frac(i * golden ratio).
std::vector<double> sample(double low, double high, int count) {
  std::vector<double> points;
  for (int i = 1; i <= count; ++i) {
    const double t = i * 0.6180339887498949;
    points.push_back(low + (high - low) * (t - std::floor(t)));
  }
  return points;
}

TEST(Fmath, ExpDouble) {
  double worst = 0.0;
  for (double x : sample(-708.0, 709.7, 200000)) {
    worst = std::max(worst, error_in_ulp(fmath::exp(x), std::exp(static_cast<long double>(x))));
  }
  for (double x : sample(-1.0, 1.0, 200000)) {
    worst = std::max(worst, error_in_ulp(fmath::exp(x), std::exp(static_cast<long double>(x))));
  }
  EXPECT_LE(worst, 1.0);
  EXPECT_EQ(fmath::exp(0.0), 1.0);
  EXPECT_EQ(fmath::exp(-kInfinity), 0.0);
  EXPECT_EQ(fmath::exp(kInfinity), kInfinity);
  EXPECT_EQ(fmath::exp(-745.2), 0.0);
  EXPECT_EQ(fmath::exp(-745.0), std::numeric_limits<double>::denorm_min());
  EXPECT_TRUE(std::isnan(fmath::exp(std::nan(""))));
}

TEST(Fmath, LogDouble) {
  double worst = 0.0;
  for (double x : sample(-700.0, 700.0, 200000)) {
    const double y = std::exp(x);
    worst = std::max(worst, error_in_ulp(fmath::log(y), std::log(static_cast<long double>(y))));
  }
  for (double x : sample(0.5, 2.0, 200000)) {
    worst = std::max(worst, error_in_ulp(fmath::log(x), std::log(static_cast<long double>(x))));
  }
  EXPECT_LE(worst, 0.6);
  EXPECT_EQ(fmath::log(1.0), 0.0);
  EXPECT_EQ(fmath::log(0.0), -kInfinity);
  EXPECT_EQ(fmath::log(kInfinity), kInfinity);
  EXPECT_TRUE(std::isnan(fmath::log(-1.0)));
  EXPECT_LE(error_in_ulp(fmath::log(0x1p-1070), std::log(0x1p-1070L)), 1.0);
}

TEST(Fmath, SinAndCosDouble) {
  double worst = 0.0;
  for (double range : {1.0, 10.0, 4096.0, 1048576.0, 1073741824.0}) {
    for (double x : sample(-range, range, 100000)) {
      const long double wide = x;
      // Near a zero of the function x87's own reduction of pi limits the comparison.
      if (std::fabs(std::sin(wide)) > 1e-4) {
        worst = std::max(worst, error_in_ulp(fmath::sin(x), std::sin(wide)));
      }
      if (std::fabs(std::cos(wide)) > 1e-4) {
        worst = std::max(worst, error_in_ulp(fmath::cos(x), std::cos(wide)));
      }
    }
  }
  EXPECT_LE(worst, 1.0);
  EXPECT_EQ(fmath::sin(0.0), 0.0);
  EXPECT_EQ(fmath::cos(0.0), 1.0);
  EXPECT_TRUE(std::isnan(fmath::sin(kInfinity)));
  EXPECT_TRUE(std::isnan(fmath::cos(0x1p31)));
}

TEST(Fmath, PowDouble) {
  double worst = 0.0, worst_far = 0.0;
  for (double base : {0.9, 0.95, 0.999, 2.0, 10000.0, 150000.0, 1e6}) {
    for (double y : sample(-60.0, 60.0, 20000)) {
      const long double exact = std::pow(static_cast<long double>(base), y);
      if (exact > std::numeric_limits<double>::max()) continue;
      if (exact < std::numeric_limits<double>::min()) continue;
      double& target = std::fabs(y * std::log(base)) <= 32.0 ? worst : worst_far;
      target = std::max(target, error_in_ulp(fmath::pow(base, y), exact));
    }
  }
  EXPECT_LE(worst, 1.5);
  EXPECT_LE(worst_far, 8.0);
  EXPECT_EQ(fmath::pow(0.0, 2.0), 0.0);
  EXPECT_EQ(fmath::pow(5.0, 0.0), 1.0);
  EXPECT_EQ(fmath::pow(1.0, 12345.0), 1.0);
  EXPECT_EQ(fmath::pow(2.0, -3.0), 0.125);
  EXPECT_EQ(fmath::pow(0.95, 1e6), 0.0);
  EXPECT_EQ(fmath::pow(0.0, -1.0), kInfinity);
  EXPECT_TRUE(std::isnan(fmath::pow(-2.0, 2.0)));
}

// D1: the bits themselves, so that a compiler or flag that changes them is noticed.
TEST(Fmath, BitsArePinned) {
  uint64_t hash = 0xcbf29ce484222325u;
  auto mix = [&](uint64_t bits) { hash = (hash ^ bits) * 0x100000001b3u; };
  for (double x : sample(-80.0, 80.0, 5000)) {
    mix(std::bit_cast<uint32_t>(fmath::exp(static_cast<float>(x))));
    mix(std::bit_cast<uint32_t>(fmath::log(static_cast<float>(x * x) + 0.001f)));
    mix(std::bit_cast<uint64_t>(fmath::exp(x)));
    mix(std::bit_cast<uint64_t>(fmath::log(x * x + 0.001)));
    mix(std::bit_cast<uint64_t>(fmath::sin(x)));
    mix(std::bit_cast<uint64_t>(fmath::cos(x)));
    mix(std::bit_cast<uint64_t>(fmath::pow(x * x + 0.001, 0.37)));
  }
  EXPECT_EQ(hash, 7987194802595132686u);
}

}  // namespace
}  // namespace cambium
