cat >kernels/smoothed_cross_entropy.h <<'H'
// Cross entropy with label smoothing (Szegedy et al., arXiv 1512.00567, section 7).
//
//   q_v = (1 - epsilon) onehot(target)_v + epsilon / V
//   loss_T = -sum_v q_v log softmax(logits)_v,  d_logits_TV = softmax(logits)_v - q_v
// A row whose target is -1 is ignored: loss 0, gradient row zero. The gradient may be written over
// the logits. Napkin: 4 T V bytes read and written, about 7 T V FLOPs.
#pragma once

#include "kernels/op.h"

namespace cambium {

struct SmoothedCrossEntropyArgs {
  In<float> logits_TV;
  In<int32_t> target_T;
  Out<float> loss_T;
  Out<float> d_logits_TV;
  float epsilon = 0;
};

inline void check_args(const SmoothedCrossEntropyArgs& a) {
  const int64_t T = a.logits_TV[0], V = a.logits_TV[1];
  check_shape("smoothed_cross_entropy", "target_T", a.target_T, Shape(T));
  check_shape("smoothed_cross_entropy", "loss_T", a.loss_T, Shape(T));
  check_shape("smoothed_cross_entropy", "d_logits_TV", a.d_logits_TV, Shape(T, V));
}

inline Cost cost(const SmoothedCrossEntropyArgs& a) {
  const int64_t T = a.logits_TV[0], V = a.logits_TV[1];
  return {"smoothed_cross_entropy", {T, V}, 7 * T * V, 8 * T * V + 8 * T, 0};
}

template <class Visitor>
void visit_views(const SmoothedCrossEntropyArgs& a, Visitor&& visit) {
  visit("logits_TV", a.logits_TV);
  visit("target_T", a.target_T);
  visit("loss_T", a.loss_T);
  visit("d_logits_TV", a.d_logits_TV);
}

namespace reference {
void smoothed_cross_entropy(const SmoothedCrossEntropyArgs& args, Workers& workers);
}

inline void smoothed_cross_entropy(const SmoothedCrossEntropyArgs& args, OpContext& context) {
  execute(args, context, reference::smoothed_cross_entropy, kCpuOnly);
}

}  // namespace cambium
H
cat >reference/smoothed_cross_entropy.cc <<'H'
#include "kernels/smoothed_cross_entropy.h"

#include <algorithm>

#include "reference/chunks.h"
#include "src/base/fmath.h"

namespace cambium::reference {

void smoothed_cross_entropy(const SmoothedCrossEntropyArgs& a, Workers& workers) {
  check_args(a);
  const int64_t T = a.logits_TV[0], V = a.logits_TV[1];
  const float spread = a.epsilon / static_cast<float>(V);
  for_ranges(workers, T, items_per_chunk(V), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* logits = a.logits_TV.pointer() + t * a.logits_TV.row_stride;
      float* gradient = a.d_logits_TV.pointer() + t * a.d_logits_TV.row_stride;
      const int32_t target = a.target_T.pointer()[t];
      if (target < 0) {
        a.loss_T.pointer()[t] = 0;
        std::fill(gradient, gradient + V, 0.0f);
        continue;
      }
      const float most = *std::max_element(logits, logits + V), at_target = logits[target] - most;
      float total = 0, shifted_sum = 0;
      for (int64_t v = 0; v < V; ++v) {
        const float shifted = logits[v] - most;
        gradient[v] = fmath::exp(shifted);
        total += gradient[v];
        shifted_sum += shifted;
      }
      a.loss_T.pointer()[t] =
          fmath::log(total) - (1.0f - a.epsilon) * at_target - spread * shifted_sum;
      for (int64_t v = 0; v < V; ++v) gradient[v] = gradient[v] / total - spread;
      gradient[target] -= 1.0f - a.epsilon;
    }
  });
}

}  // namespace cambium::reference
H
python3 - <<'P'
def edit(path, old, new):
    text = open(path).read()
    assert text.count(old) == 1, (path, old)
    open(path, "w").write(text.replace(old, new))

edit("CMakeLists.txt", "cambium_sources(reference_helpers reference/shared_*.cc)",
     "cambium_sources(reference_helpers reference/shared_*.cc reference/smoothed_cross_entropy.cc)")
edit("src/config/config.h", "  int64_t sequence_length = 128;\n",
     "  int64_t sequence_length = 128;\n  double label_smoothing = 0.0;  // of the training loss\n")
edit("src/config/schema.cc", """    {"train", "eval_every_steps",""",
     """    {"train", "label_smoothing", in_section<kTrain, &Train::label_smoothing>, kFraction, kNoChoices,
     kSame, nullptr, "share of a training target that is spread over the vocabulary"},
    {"train", "eval_every_steps",""")
edit("src/config/derive.cc", """void check_balance(const Config& config) {
""", """void check_balance(const Config& config) {
  if (config.train.label_smoothing > 0 && config.numerics.compute == ComputeType::bf16) {
    fail(ExitCode::usage, "train.label_smoothing = {} needs numerics.compute = fp32",
         config.train.label_smoothing);
  }
""")
edit("src/model/head.cc", '#include "kernels/rms_norm.h"\n',
     '#include "kernels/rms_norm.h"\n#include "kernels/smoothed_cross_entropy.h"\n')
edit("src/model/head.cc", """    cross_entropy({.logits_TV = {logits.data(), dtype(), Shape(rows, V)},
                   .target_T = {batch.target_T.as<int32_t>() + first, Shape(rows)},
                   .loss_T = {loss.f32() + first, Shape(rows)},
                   .d_logits_TV = {logits.data(), dtype(), Shape(rows, V)}},
                  ops);
""", """    const float smoothing = static_cast<float>(rank_.config.train.label_smoothing);
    if (smoothing > 0) {
      smoothed_cross_entropy({.logits_TV = {logits.f32(), Shape(rows, V)},
                              .target_T = {batch.target_T.as<int32_t>() + first, Shape(rows)},
                              .loss_T = {loss.f32() + first, Shape(rows)},
                              .d_logits_TV = {logits.f32(), Shape(rows, V)},
                              .epsilon = smoothing},
                             ops);
    } else {
      cross_entropy({.logits_TV = {logits.data(), dtype(), Shape(rows, V)},
                     .target_T = {batch.target_T.as<int32_t>() + first, Shape(rows)},
                     .loss_T = {loss.f32() + first, Shape(rows)},
                     .d_logits_TV = {logits.data(), dtype(), Shape(rows, V)}},
                    ops);
    }
""")
P
