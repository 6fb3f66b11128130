#include "src/checkpoint/hf_config.h"

#include <cmath>
#include <optional>

#include "nlohmann/json.hpp"
#include "src/base/check.h"
#include "src/checkpoint/strict_json.h"
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
  for (const HfFamily* family : {&kQwen3MoeFamily, &kMixtralFamily, &kOlmoeFamily}) {
    if (keys.value("model_type") == family->model_type) return *family;
  }
  keys.refuse("model_type", "{} is not one of qwen3_moe, mixtral, olmoe",
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

// A rope object must be the plain rotary embedding.
void require_plain_rope(const ConfigKeys& keys, const char* key) {
  const json& rope = keys.value(key);
  if (!rope.is_object()) keys.refuse(key, "it is not an object");
  for (const char* type_key : {"rope_type", "type"}) {
    if (rope.contains(type_key) && rope.at(type_key) != "default") {
      keys.refuse(key,
                  "{} {} asks for scaled rotary embedding, which is not implemented; only "
                  "\"default\" is",
                  type_key, rope.at(type_key).dump());
    }
  }
  for (const auto& [name, value] : rope.items()) {
    const bool plain = name == "rope_type" || name == "type" || name == "rope_theta" ||
                       (name == "partial_rotary_factor" && value == 1);
    if (!plain && !value.is_null()) {
      keys.refuse(key, "{} = {} is not implemented", name, value.dump());
    }
  }
}

double read_rope_theta(const ConfigKeys& keys) {
  std::optional<double> theta;
  if (keys.has("rope_scaling")) require_plain_rope(keys, "rope_scaling");
  if (keys.has("rope_parameters")) {
    require_plain_rope(keys, "rope_parameters");
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

void check_window(const ConfigKeys& keys, const HfFamily& family, int64_t max_positions) {
  const bool used =
      family.window_rule == HfWindowRule::sliding_window ||
      (family.window_rule == HfWindowRule::use_sliding_window && keys.flag("use_sliding_window"));
  if (!used || !keys.has("sliding_window")) return;
  const int64_t window = keys.integer("sliding_window");
  if (window < max_positions) {
    keys.refuse("sliding_window",
                "{} is smaller than max_position_embeddings {}: attention within a window is not "
                "implemented; lower max_position_embeddings to {} for shorter texts",
                window, max_positions, window);
  }
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
  model.vocab = keys.integer("vocab_size");
  model.max_positions = keys.integer("max_position_embeddings");
  model.rope_theta = read_rope_theta(keys);
  model.norm_epsilon = keys.positive("rms_norm_eps");
  if (keys.has("initializer_range")) model.init_std = keys.positive("initializer_range");
  model.normalize_top_k =
      family.top_k_rule == HfTopKRule::always_normalized || keys.flag("norm_topk_prob");
  model.tie_embeddings = keys.flag("tie_word_embeddings");
  check_window(keys, family, model.max_positions);
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

std::string hf_config_json(const ModelConfig& model, HfStorage storage) {
  const HfFamily& family = hf_family(model.family);
  CHECK(model.qk_norm == family.qk_norm);
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
      {"rope_parameters", {{"rope_theta", model.rope_theta}, {"rope_type", "default"}}},
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
    root["intermediate_size"] = model.expert_hidden;  // width of dense layers; there are none
  }
  root[family.expert_hidden_key] = model.expert_hidden;
  if (family.top_k_rule == HfTopKRule::norm_topk_prob) {
    root["norm_topk_prob"] = model.normalize_top_k;
  } else if (!model.normalize_top_k) {
    fail(ExitCode::usage,
         "model.normalize_top_k = false cannot be written as {}: that family "
         "renormalises always; choose model.family = \"olmoe\" or \"qwen3_moe\"",
         family.model_type);
  }
  if (family.window_rule != HfWindowRule::none) root["sliding_window"] = nullptr;
  return root.dump(2) + "\n";
}

void save_hf_config(FileSystem& files, const ModelConfig& model, HfStorage storage,
                    const std::string& directory) {
  files.write_file_atomic(directory + "/config.json", hf_config_json(model, storage));
}

}  // namespace cambium
