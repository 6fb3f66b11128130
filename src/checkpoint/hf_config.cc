#include "src/checkpoint/hf_config.h"

#include <cmath>
#include <optional>
#include <set>

#include "nlohmann/json.hpp"
#include "src/base/check.h"
#include "src/checkpoint/strict_json.h"
#include "src/config/derive.h"
#include "src/model/hf_family.h"

namespace cambium {
namespace {

using nlohmann::json;

// Far above any model; they keep every product of extents below 2^63 and lists below 1 GB.
constexpr int64_t kMostExtent = int64_t{1} << 24;
constexpr int64_t kMostLayers = 4096;
constexpr int64_t kMostExperts = 4096;
constexpr const char* kExpertKeys[] = {"num_experts", "num_local_experts"};

constexpr HfRequirement kCommonRequirements[] = {
    {"hidden_act", "\"silu\"", "another activation"},
    {"attention_dropout", "0", "dropout"},
    {"quantization_config", "null", "quantised weights"},
    {"partial_rotary_factor", "1", "rotary embedding of a part of the head"},
};

// config.json with typed reads whose errors name file and key.
class ConfigKeys {
 public:
  ConfigKeys(const json& root, const std::string& where) : root_(root), where_(where) {}

  bool has(const char* key) const { return root_.contains(key) && !root_.at(key).is_null(); }
  const json& value(const char* key) const { return root_.at(key); }

  template <class... Values>
  [[noreturn]] void refuse(const char* key, fmt::format_string<Values...> format,
                           Values&&... values) const {
    fail(ExitCode::usage, "'{}': {}: {}", where_, key,
         fmt::format(format, std::forward<Values>(values)...));
  }

  int64_t integer(const char* key, int64_t most = kMostExtent) const {
    if (!has(key)) refuse(key, "the key is missing");
    const json& found = value(key);
    if (!found.is_number_integer() || found < 1 || found > most) {
      refuse(key, "{} is not a whole number from 1 to {}", found.dump(), most);
    }
    return found.get<int64_t>();
  }

  double positive(const json& object, const char* key) const {
    const json& found = object.at(key);
    if (!found.is_number() || !(found.get<double>() > 0)) {
      refuse(key, "{} is not a positive number", found.dump());
    }
    return found.get<double>();
  }
  double positive(const char* key) const {
    if (!has(key)) refuse(key, "the key is missing");
    return positive(root_, key);
  }

  // A key that is missing or null is false, as in the three families' defaults.
  bool flag(const char* key) const {
    if (!has(key)) return false;
    if (!value(key).is_boolean()) refuse(key, "{} is not true or false", value(key).dump());
    return value(key).get<bool>();
  }

  void require(std::span<const HfRequirement> requirements) const {
    for (const HfRequirement& requirement : requirements) {
      if (has(requirement.key) && value(requirement.key) != json::parse(requirement.value)) {
        refuse(requirement.key, "{} asks for {}, which is not implemented; only {} is",
               value(requirement.key).dump(), requirement.meaning, requirement.value);
      }
    }
  }

 private:
  const json& root_;
  const std::string& where_;
};

const HfFamily& hf_family_of(const ConfigKeys& keys) {
  if (!keys.has("model_type")) keys.refuse("model_type", "the key is missing");
  for (const HfFamily* family :
       {&kQwen3MoeFamily, &kQwen2MoeFamily, &kMixtralFamily, &kOlmoeFamily}) {
    if (keys.value("model_type") == family->model_type) return *family;
  }
  keys.refuse("model_type", "{} is not one of qwen3_moe, qwen2_moe, mixtral, olmoe",
              keys.value("model_type").dump());
}

int64_t read_experts(const ConfigKeys& keys, const HfFamily& family) {
  std::optional<int64_t> experts;
  for (const char* key : kExpertKeys) {
    if (!keys.has(key)) continue;
    const int64_t found = keys.integer(key, kMostExperts);
    if (experts.value_or(found) != found) {
      keys.refuse(key, "{} contradicts {}", found, *experts);
    }
    experts = found;
  }
  if (!experts) keys.refuse(family.experts_key, "the key is missing");
  return *experts;
}

RopeKind read_rope_kind(const ConfigKeys& keys, const char* key, const json& rope) {
  for (const char* type_key : {"rope_type", "type"}) {
    if (!rope.contains(type_key)) continue;
    for (const RopeKind kind : {RopeKind::plain, RopeKind::linear, RopeKind::yarn}) {
      if (rope.at(type_key) == choice_name(kind)) return kind;
    }
    keys.refuse(key, "{} {} is not implemented; \"default\", \"linear\" and \"yarn\" are", type_key,
                rope.at(type_key).dump());
  }
  return RopeKind::plain;
}

// rope_parameters, or the older rope_scaling: plain, linear or YaRN, with every key understood.
void read_rope(const ConfigKeys& keys, const char* key, ModelConfig& model) {
  const json& rope = keys.value(key);
  if (!rope.is_object()) keys.refuse(key, "it is not an object");
  model.rope_kind = read_rope_kind(keys, key, rope);
  const bool scaled = model.rope_kind != RopeKind::plain;
  const bool yarn = model.rope_kind == RopeKind::yarn;
  const auto number = [&](const char* name, double* value) {
    if (!rope.contains(name) || rope.at(name).is_null()) return false;
    *value = keys.positive(rope, name);
    return true;
  };
  for (const auto& [name, value] : rope.items()) {
    const bool known =
        name == "rope_type" || name == "type" || name == "rope_theta" ||
        (name == "partial_rotary_factor" && value == 1) || (name == "truncate" && value == true) ||
        (scaled && name == "factor") ||
        (yarn && (name == "original_max_position_embeddings" || name == "beta_fast" ||
                  name == "beta_slow" || name == "attention_factor"));
    if (!known && !value.is_null()) {
      keys.refuse(key, "{} = {} is not implemented", name, value.dump());
    }
  }
  if (!scaled) return;
  if (!number("factor", &model.rope_factor)) keys.refuse(key, "the factor is missing");
  if (model.rope_factor < 1) keys.refuse(key, "factor = {} is below 1", model.rope_factor);
  if (!yarn) return;
  double original = 0;
  if (!number("original_max_position_embeddings", &original)) {
    keys.refuse(key, "original_max_position_embeddings is missing");
  }
  model.rope_original_positions = static_cast<int64_t>(original);
  number("beta_fast", &model.rope_beta_fast);
  number("beta_slow", &model.rope_beta_slow);
  number("attention_factor", &model.rope_attention_factor);
}

double read_rope_theta(const ConfigKeys& keys, ModelConfig& model) {
  std::optional<double> theta;
  if (keys.has("rope_scaling")) read_rope(keys, "rope_scaling", model);
  if (keys.has("rope_parameters")) {
    read_rope(keys, "rope_parameters", model);
    const json& rope = keys.value("rope_parameters");
    if (rope.contains("rope_theta")) theta = keys.positive(rope, "rope_theta");
  }
  if (keys.has("rope_theta")) {
    const double found = keys.positive("rope_theta");
    if (theta.value_or(found) != found) {
      keys.refuse("rope_theta", "{} contradicts rope_parameters.rope_theta {}", found, *theta);
    }
    theta = found;
  }
  if (!theta) keys.refuse("rope_theta", "neither rope_theta nor rope_parameters.rope_theta is set");
  return *theta;
}

// Which layers have a dense MLP: mlp_only_layers, and all but every decoder_sparse_step-th.
void read_dense_layers(const ConfigKeys& keys, ModelConfig& model) {
  const int64_t step =
      keys.has("decoder_sparse_step") ? keys.integer("decoder_sparse_step", kMostLayers) : 1;
  std::set<int64_t> listed;
  if (keys.has("mlp_only_layers")) {
    const json& list = keys.value("mlp_only_layers");
    if (!list.is_array()) keys.refuse("mlp_only_layers", "{} is not a list", list.dump());
    for (const json& layer : list) {
      if (!layer.is_number_integer() || layer < 0) {
        keys.refuse("mlp_only_layers", "{} is not the number of a layer", layer.dump());
      }
      listed.insert(layer.get<int64_t>());
    }
  }
  for (int64_t layer = 0; layer < model.layers; ++layer) {
    if (listed.contains(layer) || (layer + 1) % step != 0) model.dense_layers.push_back(layer);
  }
  if (!model.dense_layers.empty()) model.dense_hidden = keys.integer("intermediate_size");
}

bool reads_bias(const ConfigKeys& keys, const HfFamily& family) {
  switch (family.bias_rule) {
    case HfBiasRule::none:
      return false;
    case HfBiasRule::attention_bias:
      return keys.flag("attention_bias");
    case HfBiasRule::qkv_bias:
      return !keys.has("qkv_bias") || keys.flag("qkv_bias");
  }
  return false;
}

// Tokens that attention reaches back; 0 where a window is off or covers every position.
int64_t read_window(const ConfigKeys& keys, const HfFamily& family, int64_t max_positions) {
  const bool used =
      family.window_rule == HfWindowRule::sliding_window ||
      (family.window_rule == HfWindowRule::use_sliding_window && keys.flag("use_sliding_window"));
  if (!used || !keys.has("sliding_window")) return 0;
  const int64_t window = keys.integer("sliding_window");
  return window < max_positions ? window : 0;
}

void check_dimensions(const ConfigKeys& keys, const ModelConfig& model) {
  if (model.heads % model.kv_heads != 0) {
    keys.refuse("num_key_value_heads", "{} does not divide num_attention_heads {}", model.kv_heads,
                model.heads);
  }
  if (model.heads * model.head_dim > kMostExtent) {
    keys.refuse("num_attention_heads", "{} heads of {} are wider than {}", model.heads,
                model.head_dim, kMostExtent);
  }
  if (model.head_dim % 2 != 0) {
    keys.refuse("head_dim", "{} is odd; rotary embedding needs pairs", model.head_dim);
  }
  if (model.top_k > model.experts) {
    keys.refuse("num_experts_per_tok", "{} is more than the {} experts", model.top_k,
                model.experts);
  }
}

}  // namespace

ModelConfig parse_hf_config(const std::string& text, const std::string& where) {
  const json root = parse_strict_json(text, where);
  if (!root.is_object()) fail(ExitCode::corrupt_file, "'{}' is not a JSON object", where);
  const ConfigKeys keys(root, where);
  const HfFamily& family = hf_family_of(keys);
  keys.require(kCommonRequirements);
  keys.require(family.requirements);

  ModelConfig model;
  model.family = family.family;
  model.qk_norm = family.qk_norm;
  model.layers = keys.integer("num_hidden_layers", kMostLayers);
  model.hidden = keys.integer("hidden_size");
  model.heads = keys.integer("num_attention_heads");
  model.kv_heads =
      keys.has("num_key_value_heads") ? keys.integer("num_key_value_heads") : model.heads;
  if (!keys.has("head_dim") && model.hidden % model.heads != 0) {
    keys.refuse("hidden_size",
                "{} is not a multiple of num_attention_heads {}, and there is no "
                "head_dim",
                model.hidden, model.heads);
  }
  model.head_dim = keys.has("head_dim") ? keys.integer("head_dim") : model.hidden / model.heads;
  model.experts = read_experts(keys, family);
  model.top_k = keys.integer("num_experts_per_tok");
  model.expert_hidden = keys.integer(family.expert_hidden_key);
  if (family.dense_layers) read_dense_layers(keys, model);
  model.attention_bias = reads_bias(keys, family);
  model.attention_out_bias = family.bias_rule != HfBiasRule::qkv_bias;
  if (family.shared_expert) {
    model.shared_expert_hidden = keys.integer("shared_expert_intermediate_size");
    model.shared_expert_gate = true;
  }
  model.vocab = keys.integer("vocab_size");
  model.max_positions = keys.integer("max_position_embeddings");
  model.rope_theta = read_rope_theta(keys, model);
  model.norm_epsilon = keys.positive("rms_norm_eps");
  if (keys.has("initializer_range")) model.init_std = keys.positive("initializer_range");
  model.normalize_top_k =
      family.top_k_rule == HfTopKRule::always_normalized || keys.flag("norm_topk_prob");
  model.tie_embeddings = keys.flag("tie_word_embeddings");
  model.sliding_window = read_window(keys, family, model.max_positions);
  check_dimensions(keys, model);
  return model;
}

ModelConfig load_hf_config(FileSystem& files, const std::string& directory) {
  const std::string path = directory + "/config.json";
  if (files.kind(path) == EntryKind::missing) {
    fail(ExitCode::usage, "'{}' holds no config.json; name a Hugging Face model directory",
         directory);
  }
  ModelConfig model =
      parse_hf_config(files.read_file(path, kMostJsonBytes, Symlinks::follow), path);
  model.path = directory;
  return model;
}

ModelConfig load_hf_config(const std::string& directory) {
  FileSystem files;
  return load_hf_config(files, directory);
}

namespace {

json rope_json(const ModelConfig& model) {
  json rope = {{"rope_theta", model.rope_theta}, {"rope_type", choice_name(model.rope_kind)}};
  if (model.rope_kind == RopeKind::plain) return rope;
  rope["factor"] = model.rope_factor;
  if (model.rope_kind == RopeKind::linear) return rope;
  rope["original_max_position_embeddings"] = rope_original_positions(model);
  rope["beta_fast"] = model.rope_beta_fast;
  rope["beta_slow"] = model.rope_beta_slow;
  if (model.rope_attention_factor > 0) rope["attention_factor"] = model.rope_attention_factor;
  return rope;
}

// Refuses options of the model that the family's config.json has no key for.
void check_writable(const ModelConfig& model, const HfFamily& family) {
  const auto refuse = [&](const char* what) {
    fail(ExitCode::usage, "{} cannot be written as {}; next: model.family = \"qwen3_moe\"", what,
         family.model_type);
  };
  if (!family.dense_layers && !model.dense_layers.empty()) refuse("model.dense_layers");
  if (family.shared_expert != (model.shared_expert_hidden > 0)) {
    fail(ExitCode::usage, "model.shared_expert_hidden = {} cannot be written as {}; next: {}",
         model.shared_expert_hidden, family.model_type,
         family.shared_expert ? "model.family = \"qwen3_moe\" has no shared expert"
                              : "model.family = \"qwen2_moe\" has a shared expert");
  }
  if (family.shared_expert && !model.shared_expert_gate) refuse("model.shared_expert_gate = false");
  if (family.bias_rule == HfBiasRule::none && model.attention_bias) refuse("model.attention_bias");
  if (model.attention_bias &&
      model.attention_out_bias != (family.bias_rule == HfBiasRule::attention_bias)) {
    refuse(model.attention_out_bias ? "model.attention_out_bias = true"
                                    : "model.attention_out_bias = false");
  }
  if (family.window_rule == HfWindowRule::none && model.sliding_window > 0) {
    refuse("model.sliding_window");
  }
}

}  // namespace

std::string hf_config_json(const ModelConfig& model, HfStorage storage) {
  const HfFamily& family = hf_family(model.family);
  CHECK(model.qk_norm == family.qk_norm);
  check_writable(model, family);
  json root = {
      {"architectures", {family.architecture}},
      {"model_type", family.model_type},
      {"hidden_act", "silu"},
      {"attention_dropout", 0.0},
      {"num_hidden_layers", model.layers},
      {"hidden_size", model.hidden},
      {"num_attention_heads", model.heads},
      {"num_key_value_heads", model.kv_heads},
      {"head_dim", model.head_dim},
      {family.experts_key, model.experts},
      {"num_experts_per_tok", model.top_k},
      {"vocab_size", model.vocab},
      {"max_position_embeddings", model.max_positions},
      {"rope_theta", model.rope_theta},
      {"rope_parameters", rope_json(model)},
      {"rms_norm_eps", model.norm_epsilon},
      {"initializer_range", model.init_std},
      {"tie_word_embeddings", model.tie_embeddings},
      {"output_router_logits", false},
      {"use_cache", true},
      {"torch_dtype", storage == HfStorage::bf16 ? "bfloat16" : "float32"},
  };
  for (const HfRequirement& requirement : family.requirements) {
    root[requirement.key] = json::parse(requirement.value);
  }
  if (family.expert_hidden_key != std::string("intermediate_size")) {
    root["intermediate_size"] = model.dense_hidden > 0 ? model.dense_hidden : model.expert_hidden;
  }
  if (family.dense_layers) {
    root["decoder_sparse_step"] = 1;
    root["mlp_only_layers"] = model.dense_layers;
  }
  if (family.bias_rule == HfBiasRule::attention_bias) root["attention_bias"] = model.attention_bias;
  if (family.bias_rule == HfBiasRule::qkv_bias) root["qkv_bias"] = model.attention_bias;
  if (family.shared_expert) root["shared_expert_intermediate_size"] = model.shared_expert_hidden;
  root[family.expert_hidden_key] = model.expert_hidden;
  if (family.top_k_rule == HfTopKRule::norm_topk_prob) {
    root["norm_topk_prob"] = model.normalize_top_k;
  } else if (!model.normalize_top_k) {
    fail(ExitCode::usage,
         "model.normalize_top_k = false cannot be written as {}: that family "
         "renormalises always; choose model.family = \"olmoe\" or \"qwen3_moe\"",
         family.model_type);
  }
  if (family.window_rule != HfWindowRule::none) {
    root["sliding_window"] = model.sliding_window > 0 ? json(model.sliding_window) : json(nullptr);
  }
  if (family.window_rule == HfWindowRule::use_sliding_window) {
    root["use_sliding_window"] = model.sliding_window > 0;
  }
  return root.dump(2) + "\n";
}

void save_hf_config(FileSystem& files, const ModelConfig& model, HfStorage storage,
                    const std::string& directory) {
  files.write_file_atomic(directory + "/config.json", hf_config_json(model, storage));
}

}  // namespace cambium
