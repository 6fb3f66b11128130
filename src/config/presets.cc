// Built-in models. Dimensions of published models are those of their config.json.
#include "src/config/presets.h"

#include <iterator>

#include "src/base/check.h"

namespace cambium {

namespace {

// One row of dimensions; what the family fixes comes from family_model().
struct PresetRow {
  ModelFamily family;
  int64_t layers, hidden, heads, kv_heads, head_dim, experts, top_k, expert_hidden, vocab;
  int64_t max_positions;
  double rope_theta;
};

constexpr const char* kPresetNames[] = {"tiny",          "quickstart",   "small",
                                        "qwen3-30b-a3b", "mixtral-8x7b", "olmoe-1b-7b"};
constexpr PresetRow kPresetRows[] = {
    {ModelFamily::qwen3_moe, 2, 32, 2, 1, 16, 4, 2, 32, 512, 4096, 1e4},
    {ModelFamily::qwen3_moe, 4, 128, 4, 2, 32, 8, 2, 256, 1024, 4096, 1e4},
    {ModelFamily::qwen3_moe, 6, 256, 8, 4, 32, 16, 4, 256, 4096, 4096, 1e4},
    {ModelFamily::qwen3_moe, 48, 2048, 32, 4, 128, 128, 8, 768, 151936, 40960, 1e6},
    {ModelFamily::mixtral, 32, 4096, 32, 8, 128, 8, 2, 14336, 32000, 32768, 1e6},
    {ModelFamily::olmoe, 16, 2048, 16, 16, 128, 64, 8, 1024, 50304, 4096, 1e4},
};
static_assert(std::size(kPresetNames) == std::size(kPresetRows), "a row per name");

}  // namespace

std::span<const char* const> preset_names() { return kPresetNames; }

ModelConfig family_model(ModelFamily family) {
  ModelConfig model;
  model.family = family;
  model.max_positions = 4096;
  switch (family) {
    case ModelFamily::qwen3_moe:
      break;
    case ModelFamily::mixtral:
      model.qk_norm = QkNorm::none;
      model.norm_epsilon = 1e-5;
      break;
    case ModelFamily::olmoe:
      model.qk_norm = QkNorm::full_width;
      model.norm_epsilon = 1e-5;
      model.normalize_top_k = false;
      break;
    case ModelFamily::qwen2_moe:
      model.qk_norm = QkNorm::none;
      model.normalize_top_k = false;
      model.attention_bias = true;
      model.attention_out_bias = false;
      break;
  }
  return model;
}

ModelConfig preset_model(const std::string& name) {
  size_t index = 0;
  while (index < std::size(kPresetNames) && name != kPresetNames[index]) ++index;
  CHECK(index < std::size(kPresetNames));
  const PresetRow& row = kPresetRows[index];
  ModelConfig model = family_model(row.family);
  model.preset = name;
  model.layers = row.layers;
  model.hidden = row.hidden;
  model.heads = row.heads;
  model.kv_heads = row.kv_heads;
  model.head_dim = row.head_dim;
  model.experts = row.experts;
  model.top_k = row.top_k;
  model.expert_hidden = row.expert_hidden;
  model.vocab = row.vocab;
  model.max_positions = row.max_positions;
  model.rope_theta = row.rope_theta;
  return model;
}

}  // namespace cambium
