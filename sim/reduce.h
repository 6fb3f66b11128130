// Reductions over ranks in a fixed order.
#pragma once

#include <cstdint>
#include <span>

#include "sim/cluster.h"

namespace cambium::sim {

// `out` = reduction over all `sources` of elements [first, first + count), each source being one
// rank's whole buffer. `start` is the rank that the order begins with: rank order (start 0) adds in
// fp32 and rounds once, ring order rounds to `dtype` after every rank. Integers wrap; a NaN wins a
// maximum. `out` may be the same elements of a source.
struct ReduceSegment {
  DType dtype = DType::f32;
  ReduceOp reduce = ReduceOp::sum;
  ReductionOrder order = ReductionOrder::rank;
  int start = 0;
  std::span<const void* const> sources;
  int64_t first = 0;
  int64_t count = 0;
  void* out = nullptr;
};
void reduce_segment(const ReduceSegment& segment, Workers& workers);

}  // namespace cambium::sim
