// Routings that the tests of the routing ops share.
#pragma once

#include <numeric>

#include "tests/ops/op_test.h"

namespace cambium::test {

// How tokens choose experts: at random; all their first choices on one expert; only the lower half
// (the others stay empty).
enum class Spread { random, one, lower };

struct RoutingCase {
  int64_t T, E, K;
  Spread spread;
};

// K distinct experts for each token.
inline TestTensor make_routing(const RoutingCase& c, uint64_t seed) {
  TestTensor index_TK(Shape(c.T, c.K), DType::i32);
  TestRandom random(seed);
  for (int64_t t = 0; t < c.T; ++t) {
    const int64_t reach = c.spread == Spread::lower ? std::max(c.K, c.E / 2) : c.E;
    std::vector<int64_t> experts(static_cast<size_t>(reach));
    std::iota(experts.begin(), experts.end(), 0);
    for (int64_t k = 0; k < c.K; ++k) {
      const bool is_fixed = c.spread == Spread::one && k == 0;
      std::swap(experts[k], experts[is_fixed ? reach - 1 : random.integer(k, reach - 1)]);
      index_TK.set(t * c.K + k, static_cast<double>(experts[k]));
    }
  }
  return index_TK;
}

// The same with about every third choice on another rank (-1).
inline TestTensor make_local_routing(const RoutingCase& c, uint64_t seed) {
  TestTensor index_TK = make_routing(c, seed);
  TestRandom random(seed + 1);
  for (int64_t i = 0; i < index_TK.elements(); ++i) {
    if (random.integer(0, 2) == 0) index_TK.set(i, -1);
  }
  return index_TK;
}

// An integer output whose elements start with a value that no op stores (poison is -1, which is an
// answer of the routing ops).
inline TestTensor make_index_output(Shape shape) {
  TestTensor tensor(shape, DType::i32);
  tensor.fill(-77);
  return tensor;
}

inline std::vector<double> to_doubles(const std::vector<int64_t>& values) {
  return {values.begin(), values.end()};
}

}  // namespace cambium::test
