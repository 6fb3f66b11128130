// The harness that every op's parity test shares.
//
//   TestTensor        guarded storage, NaN-poisoned until filled; padding between rows is a guard
//   too TestRandom        counter-based generator; integers (exact families) and normals run_op one
//   op through ImmediateHost and Stream, as a trainer without peers runs it compare, within   the
//   one error metric: relative L2, and largest error over largest value bits_equal        bitwise
//   equality with the first difference named expect_thread_independent, expect_rows_independent,
//   finite_difference_error
// Two families of inputs: small integers, whose products and sums are exact in fp32, must give the
// oracle's bits; normals must agree within tolerance(c, K) = c * eps * sqrt(K).
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>
#include <span>
#include <vector>

#include "kernels/block_table.h"
#include "reference/rounding.h"

namespace cambium::test {

// Counter-based: value `index` of stream `seed` is a pure function of both (splitmix64 finaliser).
class TestRandom {
 public:
  explicit TestRandom(uint64_t seed) : seed_(seed) {}
  uint64_t bits(uint64_t index) const {
    uint64_t x = (index + 1) * 0x9e3779b97f4a7c15ull ^ seed_ * 0xd1342543de82ef95ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
  }
  uint64_t next() { return bits(counter_++); }
  // Uniform in [0, 1).
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  // Uniform in {low, ..., high}.
  int64_t integer(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1));
  }
  double normal() {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
    return radius * std::cos(2.0 * std::numbers::pi * uniform());
  }

 private:
  uint64_t seed_;
  uint64_t counter_ = 0;
};

enum class InputFamily { integers, normals };

// A tensor with guard bands of kGuardElements before and after. Everything is poisoned (NaN, or
// 0xff bytes for integers) at construction; `guards_intact` tells whether only elements inside the
// shape were written since. Copyable: a copy is an independent tensor.
class TestTensor {
 public:
  static constexpr int64_t kGuardElements = 64;  // a multiple of any vector width

  explicit TestTensor(Shape shape, DType dtype = DType::f32, int64_t row_stride = -1)
      : shape_(shape),
        dtype_(dtype),
        row_stride_(row_stride < 0 ? shape.row_elements() : row_stride),
        bytes_(static_cast<size_t>((2 * kGuardElements + shape.extent[0] * row_stride_) *
                                   dtype_bytes(dtype)),
               kPoisonByte) {}

  const Shape& shape() const { return shape_; }
  int64_t elements() const { return shape_.elements(); }
  DType dtype() const { return dtype_; }

  void* data() { return bytes_.data() + kGuardElements * dtype_bytes(dtype_); }
  const void* data() const { return bytes_.data() + kGuardElements * dtype_bytes(dtype_); }
  template <class T>
  View<T, Access::read> in() {
    return view<T, Access::read>();
  }
  template <class T>
  View<T, Access::write> out() {
    return view<T, Access::write>();
  }
  template <class T>
  View<T, Access::read_write> inout() {
    return view<T, Access::read_write>();
  }

  void poison() { std::fill(bytes_.begin(), bytes_.end(), kPoisonByte); }

  // Element `index` in row-major order over the shape, whatever the row stride.
  double at(int64_t index) const {
    const std::byte* address = element(index);
    switch (dtype_) {
      case DType::f32:
        return load<float>(address);
      case DType::bf16:
        return reference::bf16_to_f32(load<uint16_t>(address));
      case DType::i32:
        return load<int32_t>(address);
      case DType::i64:
        return static_cast<double>(load<int64_t>(address));
      case DType::u8:
        return load<uint8_t>(address);
    }
    return 0;
  }
  // Stores a value rounded to the tensor's dtype.
  void set(int64_t index, double value) {
    std::byte* address = const_cast<std::byte*>(element(index));
    switch (dtype_) {
      case DType::f32:
        return store(address, static_cast<float>(value));
      case DType::bf16:
        return store(address, reference::f32_to_bf16(static_cast<float>(value)));
      case DType::i32:
        return store(address, static_cast<int32_t>(value));
      case DType::i64:
        return store(address, static_cast<int64_t>(value));
      case DType::u8:
        return store(address, static_cast<uint8_t>(value));
    }
  }
  template <class Values>
  void assign(const Values& values) {
    CHECK_EQ(static_cast<int64_t>(std::size(values)), elements());
    int64_t index = 0;
    for (const auto value : values) set(index++, static_cast<double>(value));
  }
  void fill(double value) {
    for (int64_t i = 0; i < elements(); ++i) set(i, value);
  }
  void fill_integers(TestRandom& random, int64_t low, int64_t high) {
    for (int64_t i = 0; i < elements(); ++i) set(i, static_cast<double>(random.integer(low, high)));
  }
  void fill_normal(TestRandom& random, double scale = 1.0) {
    for (int64_t i = 0; i < elements(); ++i) set(i, scale * random.normal());
  }
  // Integers in [-4, 4]: sums of up to 2^20 products of two are exact in fp32. Or normals.
  void fill_family(TestRandom& random, InputFamily family, double scale = 1.0) {
    if (family == InputFamily::integers) {
      fill_integers(random, -4, 4);
    } else {
      fill_normal(random, scale);
    }
  }

  std::vector<double> values() const {
    std::vector<double> result(static_cast<size_t>(elements()));
    for (int64_t i = 0; i < elements(); ++i) result[i] = at(i);
    return result;
  }
  // The elements' bytes in row-major order, without guards and padding: what bitwise tests compare.
  std::vector<std::byte> bits() const {
    std::vector<std::byte> result;
    const int64_t width = dtype_bytes(dtype_);
    result.reserve(static_cast<size_t>(elements() * width));
    for (int64_t row = 0; row < shape_[0]; ++row) {
      const std::byte* begin = static_cast<const std::byte*>(data()) + row * row_stride_ * width;
      result.insert(result.end(), begin, begin + shape_.row_elements() * width);
    }
    return result;
  }
  // Guards and padding included.
  bool same_bytes(const TestTensor& other) const { return bytes_ == other.bytes_; }
  bool guards_intact() const {
    TestTensor wiped = *this;
    const int64_t width = dtype_bytes(dtype_);
    for (int64_t row = 0; row < shape_[0]; ++row) {
      std::byte* begin = static_cast<std::byte*>(wiped.data()) + row * row_stride_ * width;
      std::fill_n(begin, shape_.row_elements() * width, kPoisonByte);
    }
    return std::all_of(wiped.bytes_.begin(), wiped.bytes_.end(),
                       [](std::byte byte) { return byte == kPoisonByte; });
  }

 private:
  static constexpr std::byte kPoisonByte{0xff};  // an f32 or bf16 of all ones is a NaN

  template <class T>
  static T load(const std::byte* address) {
    T value;
    std::memcpy(&value, address, sizeof(T));
    return value;
  }
  template <class T>
  static void store(std::byte* address, T value) {
    std::memcpy(address, &value, sizeof(T));
  }
  const std::byte* element(int64_t index) const {
    const int64_t row = index / shape_.row_elements(), column = index % shape_.row_elements();
    return static_cast<const std::byte*>(data()) +
           (row * row_stride_ + column) * dtype_bytes(dtype_);
  }
  template <class T, Access kAccess>
  View<T, kAccess> view() {
    if constexpr (std::is_same_v<T, Real>) {
      CHECK(dtype_ == DType::f32 || dtype_ == DType::bf16);
      return View<T, kAccess>(data(), dtype_, shape_, row_stride_);
    } else {
      CHECK_EQ(dtype_, static_dtype<T>());
      return View<T, kAccess>(static_cast<T*>(data()), shape_, row_stride_);
    }
  }

  Shape shape_;
  DType dtype_;
  int64_t row_stride_;
  std::vector<std::byte> bytes_;
};

// A tensor of `shape` filled with the family's values.
inline TestTensor make_tensor(Shape shape, TestRandom& random, InputFamily family,
                              DType dtype = DType::f32) {
  TestTensor tensor(shape, dtype);
  tensor.fill_family(random, family);
  return tensor;
}

// The block table of one tensor that fills a flat buffer (kernels/block_table.h): blocks
// [first, ...) of the canonical ones.
inline TestTensor whole_tensor_blocks(int64_t elements, int64_t first = 0, int decays = 1) {
  const int64_t blocks = (elements + kTableBlockElements - 1) / kTableBlockElements;
  TestTensor table(Shape(blocks, int64_t{kBlockColumns}), DType::i32);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t rest = elements - b * kTableBlockElements;
    table.set(b * kBlockColumns + kBlockElements,
              static_cast<double>(std::min(kTableBlockElements, rest)));
    table.set(b * kBlockColumns + kBlockCanonical, static_cast<double>(first + b));
    table.set(b * kBlockColumns + kBlockDecays, decays);
  }
  return table;
}

// Runs `op(args, context)` on `threads` workers and returns when its stream is idle.
template <class Args>
void run_op(void (*op)(const Args&, OpCall), const Args& args, int threads = 2) {
  Workers workers(threads);
  Stream stream("test");
  ImmediateHost host(workers);
  host.add(stream);
  OpContext context;
  context.stream = &stream;
  op(args, context);
  host.wait(stream.record(), std::source_location::current());
}

// The repository's error metric. A non-finite actual value makes both infinite.
struct OpError {
  double relative_l2 = 0;  // |actual - expected| / |expected|
  double max_scaled = 0;   // max |actual - expected| / max |expected|
};

inline OpError compare(std::span<const double> actual, std::span<const double> expected) {
  CHECK_EQ(actual.size(), expected.size());
  constexpr double kTiny = std::numeric_limits<float>::min();
  double difference = 0, norm = 0, largest_difference = 0, largest = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    if (!std::isfinite(actual[i])) return {INFINITY, INFINITY};
    const double d = std::abs(actual[i] - expected[i]);
    difference += d * d;
    norm += expected[i] * expected[i];
    largest_difference = std::max(largest_difference, d);
    largest = std::max(largest, std::abs(expected[i]));
  }
  return {std::sqrt(difference) / std::max(std::sqrt(norm), kTiny),
          largest_difference / std::max(largest, kTiny)};
}
inline OpError compare(const TestTensor& actual, std::span<const double> expected) {
  return compare(actual.values(), expected);
}

// c * eps * sqrt(K): the growth of rounding errors of a sum of K terms with random signs.
inline double tolerance(double c, int64_t terms) {
  return c * std::numeric_limits<float>::epsilon() * std::sqrt(static_cast<double>(terms));
}
// The same where the stored result is rounded to bf16 (8 bits of precision).
inline double bf16_tolerance(double c, int64_t terms) { return 0x1p-8 + tolerance(c, terms); }

// EXPECT_TRUE(within(y, oracle, tolerance(4, K))): the guards are checked too.
inline testing::AssertionResult within(const TestTensor& actual, std::span<const double> expected,
                                       double bound) {
  if (!actual.guards_intact()) return testing::AssertionFailure() << "guard overwritten";
  const OpError error = compare(actual, expected);
  // NOTE: the largest error of many elements exceeds the mean by a few standard deviations.
  if (error.relative_l2 <= bound && error.max_scaled <= 4 * bound) {
    return testing::AssertionSuccess();
  }
  return testing::AssertionFailure() << "relative L2 " << error.relative_l2 << ", max scaled "
                                     << error.max_scaled << ", bound " << bound;
}

inline testing::AssertionResult bits_equal(std::span<const std::byte> actual,
                                           std::span<const std::byte> expected) {
  if (actual.size() != expected.size()) {
    return testing::AssertionFailure() << actual.size() << " bytes, expected " << expected.size();
  }
  const auto [left, right] = std::mismatch(actual.begin(), actual.end(), expected.begin());
  if (left == actual.end()) return testing::AssertionSuccess();
  return testing::AssertionFailure()
         << "first different byte " << left - actual.begin() << " of " << actual.size();
}
// Tensor against oracle values: equal as stored in the tensor's dtype, guards intact.
inline testing::AssertionResult bits_equal(const TestTensor& actual,
                                           std::span<const double> expected) {
  if (!actual.guards_intact()) return testing::AssertionFailure() << "guard overwritten";
  TestTensor want(actual.shape(), actual.dtype());
  want.assign(expected);
  for (int64_t i = 0; i < actual.elements(); ++i) {
    // NOTE: -0 == 0 here; a sum of exact terms may reach zero from either side.
    if (!(actual.at(i) == want.at(i))) {
      return testing::AssertionFailure()
             << "element " << i << " is " << actual.at(i) << ", expected " << want.at(i);
    }
  }
  return testing::AssertionSuccess();
}
inline testing::AssertionResult bits_equal(const TestTensor& actual, const TestTensor& expected) {
  if (!actual.guards_intact()) return testing::AssertionFailure() << "guard overwritten";
  return bits_equal(actual.bits(), expected.bits());
}

// D1: `run(threads)` computes from fixed inputs and returns the outputs' bits (TestTensor::bits).
template <class Run>
void expect_thread_independent(Run&& run) {
  const std::vector<std::byte> one = run(1);
  for (const int threads : {2, 4}) {
    EXPECT_TRUE(bits_equal(run(threads), one)) << threads << " threads against one";
  }
}

// D2: `run(rows)` computes a batch made of the named rows of a fixed batch of `row_count` and
// returns a vector per row with that row's output bits. The same rows alone, in prefixes, in odd
// counts, reversed and strided must give the bits that they have in the whole batch.
template <class Run>
void expect_rows_independent(int64_t row_count, Run&& run) {
  auto range = [](int64_t begin, int64_t end, int64_t step) {
    std::vector<int64_t> rows;
    for (int64_t row = begin; row < end; row += step) rows.push_back(row);
    return rows;
  };
  const std::vector<std::vector<std::byte>> whole = run(range(0, row_count, 1));
  CHECK_EQ(static_cast<int64_t>(whole.size()), row_count);
  std::vector<std::vector<int64_t>> subsets = {range(0, 1, 1), range(row_count - 1, row_count, 1),
                                               range(0, row_count, 3), range(1, row_count, 2)};
  for (const int64_t count : {2, 3, 5, 7, 15, 16, 17, 31, 33}) {
    if (count < row_count) subsets.push_back(range(row_count - count, row_count, 1));
  }
  subsets.push_back(range(0, row_count, 1));
  std::reverse(subsets.back().begin(), subsets.back().end());
  for (const std::vector<int64_t>& rows : subsets) {
    if (rows.empty()) continue;
    const std::vector<std::vector<std::byte>> part = run(rows);
    CHECK_EQ(part.size(), rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      EXPECT_TRUE(bits_equal(part[i], whole[rows[i]]))
          << "row " << rows[i] << " in a batch of " << rows.size();
    }
  }
}
// Per-row bits of a tensor whose first extent is the row, appended to `bits_of_rows`.
inline void append_row_bits(const TestTensor& tensor,
                            std::vector<std::vector<std::byte>>& bits_of_rows) {
  const std::vector<std::byte> bits = tensor.bits();
  const int64_t rows = tensor.shape()[0];
  if (bits_of_rows.empty()) bits_of_rows.resize(static_cast<size_t>(rows));
  CHECK_EQ(static_cast<int64_t>(bits_of_rows.size()), rows);
  const size_t width = rows == 0 ? 0 : bits.size() / static_cast<size_t>(rows);
  for (size_t row = 0; row < bits_of_rows.size(); ++row) {
    bits_of_rows[row].insert(bits_of_rows[row].end(), bits.begin() + row * width,
                             bits.begin() + (row + 1) * width);
  }
}

// Largest relative error of <gradient, u> against the central difference of `loss` along random
// unit directions u at `x`. `loss(std::vector<double>) -> double` is the op's fp64 oracle followed
// by a fixed weighting of its outputs; `gradient` comes from the op's backward.
template <class Loss>
double finite_difference_error(Loss&& loss, const std::vector<double>& x,
                               std::span<const double> gradient, TestRandom& random,
                               double step = 1e-5, int directions = 4) {
  CHECK_EQ(gradient.size(), x.size());
  double norm = 0, worst = 0;
  for (const double g : gradient) norm += g * g;
  for (int d = 0; d < directions; ++d) {
    std::vector<double> direction(x.size()), plus = x, minus = x;
    double length = 0, along = 0;
    for (double& u : direction) u = random.normal(), length += u * u;
    for (size_t i = 0; i < x.size(); ++i) {
      direction[i] /= std::sqrt(length);
      along += gradient[i] * direction[i];
      plus[i] += step * direction[i];
      minus[i] -= step * direction[i];
    }
    const double difference = (loss(plus) - loss(minus)) / (2 * step);
    // Relative to the size that <gradient, u> typically has, which stays away from zero.
    const double scale = std::sqrt(norm / static_cast<double>(x.size()));
    worst = std::max(worst, std::abs(along - difference) / std::max(scale, 1e-30));
  }
  return worst;
}

}  // namespace cambium::test
