// Canonical tensors: every trained tensor of a model, in one order, named without any layout.
//
// Parameter stores, optimizers, digests, checkpoints and Hugging Face import and export all walk
// this list, so a tensor exists once here or nowhere. `id` is the position in the list; digests and
// initialisation are seeded by tensor_id(name) (digest.h), which does not depend on it. Linear
// weights are [out, in] row-major. Experts are one tensor each, so any expert layout loads any
// other.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "src/base/view.h"
#include "src/config/config.h"

namespace cambium {

// What a tensor is for. D width, V vocabulary, H heads, G kv heads, Q head dim, E experts, F expert
// hidden width.
enum class TensorRole {
  embed,           // [V,D]
  attn_norm,       // [D]
  qkv,             // [(H+2G)Q,D]: q rows, k rows, v rows
  q_norm,          // [Q] per head, [HQ] full width
  k_norm,          // [Q] per head, [GQ] full width
  attn_out,        // [D,HQ]
  qkv_bias,        // [(H+2G)Q]; with attention_bias
  attn_out_bias,   // [D]
  mlp_norm,        // [D]
  router,          // [E,D]
  expert_gate_up,  // [2F,D]: gate rows, up rows
  expert_down,     // [D,F]
  mlp_gate_up,     // [2F,D] of a dense layer, F its width: gate rows, up rows
  mlp_down,        // [D,F] of a dense layer
  shared_gate_up,  // [2F,D] of the shared expert, F its width: gate rows, up rows
  shared_down,     // [D,F]
  shared_gate,     // [1,D]; with shared_expert_gate
  final_norm,      // [D]
  lm_head,         // [V,D]; absent when the embedding is tied
};

// Which tensors DecayRule::matrices decays: everything but norm weights and biases.
enum class DecayKind { matrix, vector };

struct CanonicalTensor {
  std::string name;  // "layers.3.experts.7.gate_up"
  Shape shape;
  int64_t id = 0;
  TensorRole role = TensorRole::embed;
  int64_t layer = -1;   // -1: not in a layer
  int64_t expert = -1;  // global expert index; -1: not an expert's

  bool is_expert() const { return expert >= 0; }
  bool is_bias() const { return role == TensorRole::qkv_bias || role == TensorRole::attn_out_bias; }
  int64_t elements() const { return shape.elements(); }
  DecayKind decay_kind() const { return shape.rank == 1 ? DecayKind::vector : DecayKind::matrix; }
};

// All tensors of `model`, ids 0, 1, 2, ...: embed, then layer by layer, then final_norm, lm_head.
// The dimensions of `model` are positive (derive() or load_hf_config checked them).
std::vector<CanonicalTensor> canonical_tensors(const ModelConfig& model);
// Stands for the vocabulary head's use of a tied embedding: not trained, so not in the list.
CanonicalTensor tied_head_tensor(const ModelConfig& model);

}  // namespace cambium
