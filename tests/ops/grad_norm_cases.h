// Cases and oracles of the gradient norm and the clip scale.
#pragma once

#include "kernels/grad_norm.h"
#include "tests/ops/op_test.h"

namespace cambium::test {

inline const std::vector<int64_t> kSquareSumCases = {
    1, 31, 32, 33, 4095, 4096, 4097, 3 * 4096 + 17, 40 * 4096};

// Of one tensor that fills `grad`.
struct SquareSumTensors {
  TestTensor grad, blocks, partial_B;
  SquareSumTensors(int64_t N, uint64_t seed, InputFamily family = InputFamily::normals)
      : grad(Shape(N)), blocks(whole_tensor_blocks(N)), partial_B(Shape(norm_block_count(N))) {
    TestRandom random(seed);
    grad.fill_family(random, family);
  }
  SquareSumArgs args() {
    return {grad.in<float>(), {blocks.in<int32_t>(), grad.elements()}, partial_B.inout<float>()};
  }
};

inline std::vector<double> square_sum_oracle(const TestTensor& grad) {
  std::vector<double> partial_B(static_cast<size_t>(norm_block_count(grad.elements())), 0.0);
  for (int64_t i = 0; i < grad.elements(); ++i) {
    partial_B[i / kNormBlockElements] += grad.at(i) * grad.at(i);
  }
  return partial_B;
}

struct ClipExpected {
  double norm, scale;
};

inline ClipExpected clip_oracle(const TestTensor& partial_B, double inverse_tokens, double clip) {
  double sum = 0;
  for (const double value : partial_B.values()) sum += value;
  const double norm = std::sqrt(sum) * inverse_tokens;
  const double factor = clip > 0 && clip < norm + 1e-6 ? clip / (norm + 1e-6) : 1;
  return {norm, inverse_tokens * factor};
}

inline TestTensor run_clip(TestTensor& partial_B, const std::vector<double>& first_block,
                           double inverse_tokens, double clip) {
  TestTensor offsets(Shape(std::ssize(first_block)), DType::i32), result(Shape(4));
  offsets.assign(first_block);
  run_op(clip_scale, {.partial_B = partial_B.in<float>(),
                      .tensor_first_block_n1 = offsets.in<int32_t>(),
                      .inverse_tokens = inverse_tokens,
                      .clip = clip,
                      .result_4 = result.out<float>()});
  return result;
}

}  // namespace cambium::test
