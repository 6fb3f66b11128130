// Four registers of lanes that take every step together: 32 floats.
//
// An exponential is a chain of about 20 dependent operations. Four chains next to each other keep a
// core busy whose window does not reach the next loop iteration. Elements see the same operations
// in the same order as alone, so results are those of the scalar code bit for bit.
#pragma once

#include <type_traits>

#include "reference/lane_math.h"

namespace cambium::reference {

constexpr int kGroupParts = 4;
constexpr int64_t kGroupLanes = kGroupParts * kLanes;

template <class Part>
struct LaneGroup {
  Part part[kGroupParts];

  // make(i) for every part i.
  template <class Make>
  [[gnu::always_inline]] static LaneGroup of(Make&& make) {
    return {{make(0), make(1), make(2), make(3)}};
  }
};
using LaneFloats = LaneGroup<Lanes>;
using LaneInts = LaneGroup<LaneBits>;

[[gnu::always_inline]] inline LaneFloats load_group(const float* from, int64_t stride = kLanes) {
  return LaneFloats::of([&](int i) { return load_lanes(from + i * stride); });
}
[[gnu::always_inline]] inline void store_group(float* to, const LaneFloats& group,
                                               int64_t stride = kLanes) {
  for (int i = 0; i < kGroupParts; ++i) store_lanes(to + i * stride, group.part[i]);
}

// Part i of an operand: a group's own, or the one value that all parts share.
template <class Part>
[[gnu::always_inline]] inline Part part_of(const LaneGroup<Part>& group, int i) {
  return group.part[i];
}
[[gnu::always_inline]] inline float part_of(float value, int) { return value; }
[[gnu::always_inline]] inline int32_t part_of(int32_t value, int) { return value; }
[[gnu::always_inline]] inline Lanes part_of(Lanes value, int) { return value; }

template <class T>
constexpr bool kIsLaneGroup = false;
template <class Part>
constexpr bool kIsLaneGroup<LaneGroup<Part>> = true;

// Applies `op` part by part; at least one operand is a group.
template <class Left, class Right, class Op>
[[gnu::always_inline]] inline auto by_parts(const Left& a, const Right& b, Op&& op) {
  using Group = std::conditional_t<kIsLaneGroup<Left>, Left, Right>;
  return Group::of([&](int i) { return op(part_of(a, i), part_of(b, i)); });
}
template <class Left, class Right>
concept EitherIsLaneGroup = kIsLaneGroup<Left> || kIsLaneGroup<Right>;

template <class Left, class Right>
requires EitherIsLaneGroup<Left, Right>
[[gnu::always_inline]] inline auto operator+(const Left& a, const Right& b) {
  return by_parts(a, b, [](auto x, auto y) { return x + y; });
}
template <class Left, class Right>
requires EitherIsLaneGroup<Left, Right>
[[gnu::always_inline]] inline auto operator-(const Left& a, const Right& b) {
  return by_parts(a, b, [](auto x, auto y) { return x - y; });
}
template <class Left, class Right>
requires EitherIsLaneGroup<Left, Right>
[[gnu::always_inline]] inline auto operator*(const Left& a, const Right& b) {
  return by_parts(a, b, [](auto x, auto y) { return x * y; });
}
template <class Left, class Right>
requires EitherIsLaneGroup<Left, Right>
[[gnu::always_inline]] inline auto operator/(const Left& a, const Right& b) {
  return by_parts(a, b, [](auto x, auto y) { return x / y; });
}
[[gnu::always_inline]] inline LaneFloats operator-(const LaneFloats& a) {
  return LaneFloats::of([&](int i) { return -a.part[i]; });
}
[[gnu::always_inline]] inline LaneInts operator>>(const LaneInts& a, int count) {
  return LaneInts::of([&](int i) { return a.part[i] >> count; });
}
[[gnu::always_inline]] inline LaneInts operator<<(const LaneInts& a, int count) {
  return LaneInts::of([&](int i) { return a.part[i] << count; });
}

[[gnu::always_inline]] inline LaneFloats bf16_lanes(const LaneFloats& x) {
  return LaneFloats::of([&](int i) { return bf16_lanes(x.part[i]); });
}

// The operations of fmath::detail::exp_steps.
struct GroupOps {
  template <class A, class B, class C>
  [[gnu::always_inline]] static LaneFloats fused(const A& a, const B& b, const C& c) {
    return LaneFloats::of([&](int i) __attribute__((always_inline)) {
      return fma_lanes(wide(part_of(a, i)), wide(part_of(b, i)), wide(part_of(c, i)));
    });
  }
  [[gnu::always_inline]] static LaneFloats clamp(const LaneFloats& x, float low, float high) {
    return LaneFloats::of([&](int i) { return LaneOps::clamp(x.part[i], low, high); });
  }
  [[gnu::always_inline]] static LaneInts to_bits(const LaneFloats& x) {
    return LaneInts::of([&](int i) { return LaneOps::to_bits(x.part[i]); });
  }
  [[gnu::always_inline]] static LaneFloats from_bits(const LaneInts& bits) {
    return LaneFloats::of([&](int i) { return LaneOps::from_bits(bits.part[i]); });
  }

 private:
  [[gnu::always_inline]] static Lanes wide(Lanes value) { return value; }
  [[gnu::always_inline]] static Lanes wide(float value) { return broadcast(value); }
};

[[gnu::always_inline]] inline LaneFloats exp_lanes(const LaneFloats& x) {
  return fmath::detail::exp_steps<GroupOps>(x);
}

}  // namespace cambium::reference
