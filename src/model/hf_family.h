// What one model family calls its parts in Hugging Face files, as data: all that a family adds.
//
// The mathematics of the families differs only by ModelConfig fields (qk_norm, normalize_top_k);
// their config keys and tensor names differ by this table. Each family is one small file.
#pragma once

#include <span>

#include "src/config/config.h"

namespace cambium {

// A config.json key that must be absent, null, or equal to `value` (JSON text): another value
// changes the model in a way that is not implemented, and is refused.
struct HfRequirement {
  const char* key;
  const char* value;
  const char* meaning;
};

enum class HfTopKRule {
  always_normalized,  // no key; the published router renormalises
  norm_topk_prob,     // by the key, default false
};

// Where a family's sliding window, if any, is switched on.
enum class HfWindowRule {
  none,                // no such key
  sliding_window,      // a non-null window is used
  use_sliding_window,  // the window counts only when this key is true
};

// Biases of attention in config.json.
enum class HfBiasRule {
  none,            // no such key
  attention_bias,  // of all four projections, default false
  qkv_bias,        // of q, k and v, default true
};

struct HfFamily {
  ModelFamily family;
  const char* model_type;         // config.json
  const char* architecture;       // config.json, the one entry of `architectures`
  const char* experts_key;        // written; the other spelling is read as well
  const char* expert_hidden_key;  // expert hidden width F
  HfTopKRule top_k_rule;
  HfWindowRule window_rule;
  QkNorm qk_norm;
  // Tensor names: model.layers.L.<moe_block>.experts.X.<gate|up|down>.weight
  const char* moe_block;
  const char* gate;
  const char* up;
  const char* down;
  bool dense_layers;  // keys mlp_only_layers, decoder_sparse_step, intermediate_size
  HfBiasRule bias_rule;
  bool shared_expert;  // key shared_expert_intermediate_size; always with a gate
  std::span<const HfRequirement> requirements;
};

extern const HfFamily kQwen3MoeFamily;  // qwen3_moe_names.cc
extern const HfFamily kQwen2MoeFamily;  // qwen2_moe.cc
extern const HfFamily kMixtralFamily;   // mixtral.cc
extern const HfFamily kOlmoeFamily;     // olmoe.cc

inline const HfFamily& hf_family(ModelFamily family) {
  switch (family) {
    case ModelFamily::qwen3_moe:
      return kQwen3MoeFamily;
    case ModelFamily::qwen2_moe:
      return kQwen2MoeFamily;
    case ModelFamily::mixtral:
      return kMixtralFamily;
    case ModelFamily::olmoe:
      return kOlmoeFamily;
  }
  return kQwen3MoeFamily;
}

}  // namespace cambium
