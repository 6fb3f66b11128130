cat >kernels/lion.h <<'H'
// Lion (Chen et al., arXiv 2302.06675, algorithm 2), with decoupled weight decay:
//
//   g = grad * grad_scale
//   p = p - lr * (sign(beta1 m + (1 - beta1) g) + weight_decay p)        sign(0) = 0
//   m = beta2 m + (1 - beta2) g
// Napkin: 12 bytes read and 8 written an element, about 9 FLOPs; memory bound.
#pragma once

#include "kernels/op.h"

namespace cambium {

struct LionArgs {
  InOut<float> param;  // [n]
  InOut<float> momentum;
  In<float> grad;
  float lr = 0, beta1 = 0, beta2 = 0, weight_decay = 0, grad_scale = 1;
};

inline void check_args(const LionArgs& a) {
  check_shape("lion", "momentum", a.momentum, Shape(a.param[0]));
  check_shape("lion", "grad", a.grad, Shape(a.param[0]));
}

inline Cost cost(const LionArgs& a) {
  const int64_t n = a.param[0];
  return {"lion", {n}, 9 * n, 20 * n, 0};
}

template <class Visitor>
void visit_views(const LionArgs& a, Visitor&& visit) {
  visit("param", a.param);
  visit("momentum", a.momentum);
  visit("grad", a.grad);
}

namespace reference {
void lion(const LionArgs& args, Workers& workers);
}

inline void lion(const LionArgs& args, OpCall call) {
  execute(args, call, reference::lion, nullptr);
}

}  // namespace cambium
H
cat >reference/lion.cc <<'H'
#include "kernels/lion.h"

#include "reference/chunks.h"

namespace cambium::reference {

void lion(const LionArgs& a, Workers& workers) {
  check_args(a);
  for_ranges(workers, a.param[0], items_per_chunk(1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float& p = a.param.pointer()[i];
      float& m = a.momentum.pointer()[i];
      const float g = a.grad.pointer()[i] * a.grad_scale;
      const float c = a.beta1 * m + (1.0f - a.beta1) * g;
      const float sign = static_cast<float>((c > 0) - (c < 0));
      p -= a.lr * (sign + a.weight_decay * p);
      m = a.beta2 * m + (1.0f - a.beta2) * g;
    }
  });
}

}  // namespace cambium::reference
H
python3 - <<'P'
import re

def edit(path, pattern, to):
    text, count = re.subn(pattern, to, open(path).read(), count=1)
    assert count == 1, path
    open(path, "w").write(text)

edit("CMakeLists.txt", r"(cambium_sources\(reference_helpers reference/shared_\*\.cc)\)",
     r"\1 reference/lion.cc)")
edit("src/config/schema.cc", r'(kOptimizerNames\[\] = \{"adamw")\}', r'\1, "lion"}')
edit("src/train/train_step.cc", r'(#include "kernels/grad_norm.h"\n)', r'\1#include "kernels/lion.h"\n')
edit("src/train/train_step.cc", r"(void TrainStep::apply_adamw\(int64_t step, double learning_rate\) \{\n)",
     r"""// The scale is read on the host: NaN means that the norm is not finite, and nothing is updated.
void apply_lion(Rank& rank, Model& model, const Buffer& clip_result, double learning_rate) {
  const OptimizerConfig& optimizer = rank.config.optimizer;
  const float scale =
      rank.is_shape_only() ? 1.0f : rank.read<float>(clip_result.f32() + kClipScale, 1).front();
  for (const auto& group : model.groups()) {
    for (const ParamPiece& piece : group->optimized_pieces()) {
      if (!(scale == scale)) break;
      const int64_t at = piece.flat_offset();
      const bool decays = optimizer.decay == DecayRule::all ||
                          piece.tensor->canonical.decay_kind() == DecayKind::matrix;
      const InOut<Real> moment = group->moment(ParamGroup::first_moment, at, piece.elements);
      lion({.param = {group->weights(at), Shape(piece.elements)},
            .momentum = {static_cast<float*>(moment.data), Shape(piece.elements)},
            .grad = {group->gradient(at), Shape(piece.elements)},
            .lr = static_cast<float>(learning_rate),
            .beta1 = static_cast<float>(optimizer.beta1),
            .beta2 = static_cast<float>(optimizer.beta2),
            .weight_decay = decays ? static_cast<float>(optimizer.weight_decay) : 0.0f,
            .grad_scale = scale},
           rank.ops);
    }
    group->gather_weights();
  }
}

\1  if (rank_.config.optimizer.name == "lion") {
    return apply_lion(rank_, model_, clip_result_, learning_rate);
  }
""")
P
