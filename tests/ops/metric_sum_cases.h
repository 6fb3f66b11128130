// Cases of metric_sum: blocks and values per block.
#pragma once

#include <cstdint>
#include <vector>

namespace cambium::test {

struct MetricSumCase {
  int64_t blocks, per_block;
};
inline std::vector<MetricSumCase> metric_sum_cases() {
  return {{1, 1}, {1, 32}, {3, 1}, {4, 31}, {7, 32}, {64, 33}};
}

}  // namespace cambium::test
