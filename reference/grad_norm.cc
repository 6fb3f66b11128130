#include "kernels/grad_norm.h"

#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "reference/chunks.h"
#include "reference/lane_math.h"

namespace cambium::reference {

namespace {

constexpr int64_t kBlocksPerChunk = 2;  // 32 KiB: an expert has several

// Fixed binary tree over [0, count): split at the largest power of two below the count.
double tree_sum(const double* values, int64_t count) {
  if (count == 0) return 0;
  if (count == 1) return values[0];
  const auto half = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(count - 1)));
  return tree_sum(values, half) + tree_sum(values + half, count - half);
}

}  // namespace

void square_sum(const SquareSumArgs& a, Workers& workers) {
  const int64_t N = a.grad_N[0], B = a.table.block_BC[0];
  for_ranges(workers, B, kBlocksPerChunk, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int32_t* block = a.table.block_BC.pointer() + b * kBlockColumns;
      const int64_t elements = block[kBlockElements], first = b * kNormBlockElements;
      if (elements == 0) continue;
      CHECK(elements <= kNormBlockElements && first + elements <= N);
      CHECK(block[kBlockCanonical] >= 0 && block[kBlockCanonical] < a.partial_M[0]);
      const float* grad = a.grad_N.pointer() + first;
      a.partial_M.pointer()[block[kBlockCanonical]] = dot(grad, grad, elements);
    }
  });
}

void clip_scale(const ClipScaleArgs& a, Workers&) {
  const int64_t tensors = a.tensor_first_block_n1[0] - 1;
  const int32_t* first_block = a.tensor_first_block_n1.pointer();
  CHECK_EQ(first_block[0], 0);
  CHECK_EQ(int64_t{first_block[tensors]}, a.partial_B[0]);
  const std::vector<double> partial_B(a.partial_B.pointer(),
                                      a.partial_B.pointer() + a.partial_B[0]);
  std::vector<double> tensor_sum(static_cast<size_t>(tensors));
  int64_t first_bad = -1;
  for (int64_t n = 0; n < tensors; ++n) {
    CHECK_LE(first_block[n], first_block[n + 1]);
    tensor_sum[n] =
        tree_sum(partial_B.data() + first_block[n], first_block[n + 1] - first_block[n]);
    if (first_bad == -1 && !std::isfinite(tensor_sum[n])) first_bad = n;
  }
  // Squares are fp32, so a finite fp64 sum of them cannot overflow.
  const double norm = std::sqrt(tree_sum(tensor_sum.data(), tensors)) * a.inverse_tokens;
  const double factor = a.clip > 0 ? std::min(1.0, a.clip / (norm + 1e-6)) : 1.0;
  float* result = a.result_4.pointer();
  result[kClipNorm] = static_cast<float>(norm);
  result[kClipScale] = first_bad == -1 ? static_cast<float>(a.inverse_tokens * factor)
                                       : std::numeric_limits<float>::quiet_NaN();
  result[kClipNonFinite] = first_bad == -1 ? 0.0f : 1.0f;
  result[kClipFirstTensor] = static_cast<float>(first_bad);
}

}  // namespace cambium::reference
