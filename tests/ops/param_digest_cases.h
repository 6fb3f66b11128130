// Cases and oracle of the parameter digest.
#pragma once

#include "kernels/param_digest.h"
#include "tests/ops/op_test.h"

namespace cambium::test {

inline const std::vector<int64_t> kParamDigestCases = {
    1, 4095, 4096, 4097, 8 * 4096, 8 * 4096 + 1, 100003, 64 * 4096 + 5};

// Block by block, on one thread, each block digested alone.
inline Digest128 param_digest_oracle(const TestTensor& data, uint64_t tensor, int64_t first_block) {
  Digest128 sum;
  for (int64_t start = 0; start < data.elements(); start += kDigestBlockElements) {
    std::vector<float> block;
    for (int64_t i = start; i < std::min(data.elements(), start + kDigestBlockElements); ++i) {
      block.push_back(static_cast<float>(data.at(i)));
    }
    sum += digest_blocks(block.data(), static_cast<int64_t>(block.size()), tensor,
                         first_block + start / kDigestBlockElements);
  }
  return sum;
}

inline Digest128 run_param_digest(In<float> data_N, uint64_t tensor, int64_t first_block,
                                  int threads = 2) {
  int64_t sum[2] = {-1, -1};
  run_op(param_digest,
         {.data_N = data_N,
          .tensor_id = tensor,
          .first_block = first_block,
          .sum_2 = Out<int64_t>(sum, Shape(2))},
         threads);
  return {static_cast<uint64_t>(sum[0]), static_cast<uint64_t>(sum[1])};
}

}  // namespace cambium::test
