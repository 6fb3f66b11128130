// Small Hugging Face models for the tests: config.json of each family, weights from a formula.
#pragma once

#include <functional>
#include <span>
#include <string>

#include "nlohmann/json.hpp"
#include "src/checkpoint/tensor_source.h"
#include "src/config/config.h"

namespace cambium {

inline nlohmann::json qwen3_config() {
  return {{"model_type", "qwen3_moe"},
          {"num_hidden_layers", 2},
          {"hidden_size", 16},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"head_dim", 8},
          {"num_experts", 4},
          {"num_experts_per_tok", 2},
          {"moe_intermediate_size", 6},
          {"vocab_size", 32},
          {"max_position_embeddings", 64},
          {"rope_theta", 10000.0},
          {"rms_norm_eps", 1e-6},
          {"hidden_act", "silu"},
          {"norm_topk_prob", true},
          {"decoder_sparse_step", 1},
          {"mlp_only_layers", nlohmann::json::array()}};
}

constexpr ModelFamily kFamilies[] = {ModelFamily::qwen3_moe, ModelFamily::qwen2_moe,
                                     ModelFamily::mixtral, ModelFamily::olmoe};

inline nlohmann::json family_config(ModelFamily family) {
  nlohmann::json config = qwen3_config();
  if (family == ModelFamily::qwen2_moe) {
    config["model_type"] = "qwen2_moe";
    config["shared_expert_intermediate_size"] = 10;
  } else if (family != ModelFamily::qwen3_moe) {
    config["model_type"] = family == ModelFamily::mixtral ? "mixtral" : "olmoe";
    config["intermediate_size"] = config["moe_intermediate_size"];
    config.erase("moe_intermediate_size");
  }
  return config;
}

// Canonical tensors from a formula, so that any slice is known.
class FormulaSource : public TensorSource {
 public:
  static float value(const std::string& name, int64_t i) {
    return static_cast<float>(std::hash<std::string>()(name) % 997) +
           static_cast<float>(i % 4096) / 4096;
  }
  void read(const std::string& name, int64_t first, std::span<float> values) override {
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = value(name, first + static_cast<int64_t>(i));
    }
  }
};

}  // namespace cambium
