// Cross entropy on the CPU: passes over a row that stays in cache, one exp per logit.
#include "kernels/cross_entropy.h"

#include <algorithm>

#include "reference/lane_group.h"
#include "reference/rounding.h"
#include "src/base/fmath.h"

namespace cambium::reference {
namespace {

// out = exp(x - shift) and its sum in 32 partial sums; `out` may be `x`.
float exp_row(const float* x, float shift, float* out, int64_t count) {
  LaneFloats sums = {};
  int64_t i = 0;
  for (; i + kGroupLanes <= count; i += kGroupLanes) {
    const LaneFloats e = exp_lanes(load_group(x + i) - shift);
    store_group(out + i, e);
    sums = sums + e;
  }
  const Lanes* sum = sums.part;
  float total = sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < count; ++i) {
    out[i] = fmath::exp(x[i] - shift);
    total += out[i];
  }
  return total;
}

void scale_in_place(float* x, float factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] *= factor;
}

}  // namespace

void cross_entropy(const CrossEntropyArgs& args, Workers& workers) {
  const int64_t T = args.logits_TV[0], V = args.logits_TV[1];
  const ReadF32 logits(args.logits_TV);
  const WriteF32 d_logits(args.d_logits_TV);
  float* loss = args.loss_T.pointer();
  const int64_t rows = rows_per_chunk(T, V);
  workers.parallel_for((T + rows - 1) / rows, [&](int64_t chunk, Scratch& scratch) {
    for (int64_t t = chunk * rows; t < std::min(T, (chunk + 1) * rows); ++t) {
      const int32_t target = args.target_T.pointer()[t];
      const bool wants_gradient = d_logits.data != nullptr;
      if (target == kIgnoredTarget) {
        loss[t] = 0.0f;
        if (wants_gradient) std::fill_n(d_logits.row(t), V, 0.0f);
        continue;
      }
      CHECK(target >= 0 && target < V);
      const float* x = logits.row(t);
      const float at_target = x[target], largest = max_of(x, V);
      float* probs = wants_gradient ? d_logits.row(t) : scratch.floats(0, V);
      const float total = exp_row(x, largest, probs, V);
      loss[t] = fmath::log(total) + (largest - at_target);
      if (!wants_gradient) continue;
      scale_in_place(probs, 1.0f / total, V);
      probs[target] -= 1.0f;
    }
  });
}

}  // namespace cambium::reference
