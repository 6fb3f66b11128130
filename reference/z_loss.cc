#include "kernels/z_loss.h"

#include "reference/chunks.h"
#include "reference/lane_math.h"
#include "src/base/fmath.h"

namespace cambium::reference {

void z_loss(const ZLossArgs& a, Workers& workers) {
  const int64_t T = a.logits_TE[0], E = a.logits_TE[1];
  for_ranges(workers, T, items_per_chunk(E), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* logits = a.logits_TE.pointer() + t * a.logits_TE.row_stride;
      float* d_logits = a.d_logits_TE.pointer() + t * a.d_logits_TE.row_stride;
      const float most = max_of(logits, E);
      for (int64_t e = 0; e < E; ++e) d_logits[e] = fmath::exp(logits[e] - most);
      const float total = sum(d_logits, E);
      const float lse = most + fmath::log(total);
      a.loss_T.pointer()[t] = a.loss_scale * (lse * lse);
      const float coefficient = a.gradient_scale * 2.0f * lse / total;
      for (int64_t e = 0; e < E; ++e) d_logits[e] *= coefficient;
    }
  });
}

}  // namespace cambium::reference
