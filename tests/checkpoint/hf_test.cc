// Hugging Face directories: config mapping, refusals, slices, import, export round trip.
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>

#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "src/base/io.h"
#include "src/checkpoint/hf_config.h"
#include "src/checkpoint/hf_weights.h"
#include "src/checkpoint/safetensors.h"
#include "tests/checkpoint/checkpoint_testing.h"
#include "tests/checkpoint/hf_samples.h"
#include "tests/tree.h"

namespace cambium {
namespace {

using nlohmann::json;

// Exit code and message of parsing `config`; code 0 when it is accepted.
Outcome parse(const json& config) {
  return outcome_of([&] { parse_hf_config(config.dump(), "config.json"); });
}

TEST(HfConfig, BothGenerationsOfKeysMeanTheSame) {
  const json old_keys = qwen3_config();
  json new_keys = old_keys;
  new_keys.erase("num_experts");
  new_keys["num_local_experts"] = 4;
  new_keys.erase("rope_theta");
  new_keys["rope_parameters"] = {{"rope_theta", 10000.0}, {"rope_type", "default"}};
  for (const json& config : {old_keys, new_keys}) {
    const ModelConfig model = parse_hf_config(config.dump(), "config.json");
    EXPECT_EQ(model.experts, 4);
    EXPECT_EQ(model.rope_theta, 10000.0);
    EXPECT_EQ(model.qk_norm, QkNorm::per_head);
    EXPECT_TRUE(model.normalize_top_k);
    EXPECT_FALSE(model.tie_embeddings);
  }
}

TEST(HfConfig, HeadDimMayBeNull) {
  json config = family_config(ModelFamily::mixtral);
  config["head_dim"] = nullptr;
  EXPECT_EQ(parse_hf_config(config.dump(), "config.json").head_dim, 4);
  config["num_key_value_heads"] = nullptr;
  EXPECT_EQ(parse_hf_config(config.dump(), "config.json").kv_heads, 4);
}

TEST(HfConfig, FamiliesDecideTheirNorms) {
  const ModelConfig mixtral =
      parse_hf_config(family_config(ModelFamily::mixtral).dump(), "config.json");
  EXPECT_EQ(mixtral.qk_norm, QkNorm::none);
  EXPECT_TRUE(mixtral.normalize_top_k);
  json config = family_config(ModelFamily::olmoe);
  config["norm_topk_prob"] = false;
  const ModelConfig olmoe = parse_hf_config(config.dump(), "config.json");
  EXPECT_EQ(olmoe.qk_norm, QkNorm::full_width);
  EXPECT_FALSE(olmoe.normalize_top_k);
}

TEST(HfConfig, Qwen2MoeHasAGatedSharedExpertAndBiasesOfQkv) {
  json config = family_config(ModelFamily::qwen2_moe);
  ModelConfig model = parse_hf_config(config.dump(), "config.json");
  EXPECT_EQ(model.shared_expert_hidden, 10);
  EXPECT_TRUE(model.shared_expert_gate);
  EXPECT_TRUE(model.attention_bias);
  EXPECT_FALSE(model.attention_out_bias);
  EXPECT_EQ(model.qk_norm, QkNorm::none);
  const auto why_not = [](const ModelConfig& refused) {
    const Outcome outcome = outcome_of([&] { hf_config_json(refused, HfStorage::f32); });
    EXPECT_EQ(outcome.code, 2);
    return outcome.message;
  };
  model.shared_expert_gate = false;
  EXPECT_NE(why_not(model).find("model.shared_expert_gate"), std::string::npos);
  model.shared_expert_hidden = 0;
  EXPECT_NE(why_not(model).find("no shared expert"), std::string::npos);
  ModelConfig qwen3 = parse_hf_config(family_config(ModelFamily::qwen3_moe).dump(), "config.json");
  qwen3.shared_expert_hidden = 8;
  EXPECT_NE(why_not(qwen3).find("qwen2_moe"), std::string::npos);
  config["qkv_bias"] = false;
  EXPECT_FALSE(parse_hf_config(config.dump(), "config.json").attention_bias);
}

// What asks for another model exits 2 and names its key.
TEST(HfConfig, RefusesWhatIsNotImplemented) {
  struct Row {
    ModelFamily family;
    const char* key;
    json value;
  };
  const Row rows[] = {
      {ModelFamily::qwen3_moe, "attention_bias", 1},
      {ModelFamily::qwen3_moe, "decoder_sparse_step", 0},
      {ModelFamily::qwen3_moe, "mlp_only_layers", {-1}},
      {ModelFamily::qwen3_moe, "mlp_only_layers", {0.5}},
      {ModelFamily::mixtral, "attention_bias", true},
      {ModelFamily::qwen3_moe, "hidden_act", "gelu"},
      {ModelFamily::qwen3_moe, "attention_dropout", 0.1},
      {ModelFamily::qwen3_moe, "model_type", "llama"},
      {ModelFamily::qwen3_moe, "rope_scaling", {{"type", "yarn"}, {"factor", 4.0}}},
      {ModelFamily::qwen3_moe, "rope_scaling", {{"type", "linear"}, {"factor", 0.5}}},
      {ModelFamily::qwen3_moe, "rope_scaling", {{"type", "linear"}, {"beta_fast", 32}}},
      {ModelFamily::qwen3_moe, "rope_parameters", {{"rope_type", "llama3"}, {"rope_theta", 1e4}}},
      {ModelFamily::qwen3_moe, "rope_parameters", {{"rope_theta", 5.0}}},
      {ModelFamily::qwen3_moe, "quantization_config", {{"bits", 4}}},
      {ModelFamily::qwen3_moe, "num_local_experts", 5},
      {ModelFamily::qwen3_moe, "num_experts_per_tok", 5},
      {ModelFamily::qwen3_moe, "num_key_value_heads", 3},
      {ModelFamily::qwen3_moe, "head_dim", 7},
      {ModelFamily::qwen3_moe, "hidden_size", "16"},
      {ModelFamily::qwen3_moe, "hidden_size", -16},
      {ModelFamily::qwen3_moe, "hidden_size", 16.0},
      {ModelFamily::qwen3_moe, "vocab_size", int64_t{1} << 60},
      {ModelFamily::qwen3_moe, "num_hidden_layers", 1000000},
      {ModelFamily::qwen3_moe, "rms_norm_eps", 0},
      {ModelFamily::mixtral, "sliding_window", 0},
      {ModelFamily::mixtral, "router_jitter_noise", 0.01},
      {ModelFamily::qwen2_moe, "use_sliding_window", true},
      {ModelFamily::qwen2_moe, "shared_expert_intermediate_size", 0},
      {ModelFamily::olmoe, "clip_qkv", 8.0},
      {ModelFamily::olmoe, "norm_topk_prob", "yes"},
  };
  for (const Row& row : rows) {
    json config = family_config(row.family);
    ASSERT_EQ(parse(config).code, 0);
    config[row.key] = row.value;
    const Outcome outcome = parse(config);
    EXPECT_EQ(outcome.code, 2) << config.dump();
    const std::string key =
        row.value.is_object() && row.value == json{{"rope_theta", 5.0}} ? "rope_theta" : row.key;
    EXPECT_NE(outcome.message.find(key), std::string::npos) << outcome.message;
  }
  const json complete = qwen3_config();
  for (const auto& [key, value] : complete.items()) {
    const bool optional = key == "norm_topk_prob" || key == "decoder_sparse_step" ||
                          key == "mlp_only_layers" || key == "hidden_act" || key == "head_dim" ||
                          key == "num_key_value_heads";
    json config = qwen3_config();
    config.erase(key);
    const Outcome outcome = parse(config);
    EXPECT_EQ(outcome.code, optional ? 0 : 2) << key;
    if (optional) continue;
    EXPECT_NE(outcome.message.find(key), std::string::npos) << outcome.message;
  }
}

TEST(HfConfig, AWindowCountsWhereItIsSwitchedOnAndHidesPositions) {
  const auto window = [](const json& config) {
    return parse_hf_config(config.dump(), "config.json").sliding_window;
  };
  json config = qwen3_config();
  config["sliding_window"] = 8;
  config["use_sliding_window"] = false;
  EXPECT_EQ(window(config), 0);
  config["use_sliding_window"] = true;
  EXPECT_EQ(window(config), 8);
  config["sliding_window"] = 64;  // covers all positions
  EXPECT_EQ(window(config), 0);
}

TEST(HfConfig, OptionsOfQwen3MoeAreReadAndWrittenBack) {
  json config = qwen3_config();
  config["num_hidden_layers"] = 6;
  config["decoder_sparse_step"] = 2;
  config["mlp_only_layers"] = {3};
  config["attention_bias"] = true;
  EXPECT_EQ(parse(config).code, 2);  // the dense layers' width is missing
  config["intermediate_size"] = 20;
  config["use_sliding_window"] = true;
  config["sliding_window"] = 9;
  config["rope_scaling"] = {
      {"type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 16}};
  const ModelConfig read = parse_hf_config(config.dump(), "config.json");
  const ModelConfig again =
      parse_hf_config(hf_config_json(read, HfStorage::f32), "written config.json");
  for (const ModelConfig& model : {read, again}) {
    EXPECT_EQ(model.dense_layers, (std::vector<int64_t>{0, 2, 3, 4}));
    EXPECT_EQ(model.dense_hidden, 20);
    EXPECT_TRUE(model.attention_bias);
    EXPECT_EQ(model.sliding_window, 9);
    EXPECT_EQ(model.rope_kind, RopeKind::yarn);
    EXPECT_EQ(model.rope_factor, 4.0);
    EXPECT_EQ(model.rope_original_positions, 16);
  }
  ModelConfig mixtral = read;
  mixtral.family = ModelFamily::mixtral;
  mixtral.qk_norm = QkNorm::none;
  EXPECT_EQ(outcome_of([&] { hf_config_json(mixtral, HfStorage::f32); }).code, 2);
}

TEST(HfConfig, BrokenFilesExit30) {
  for (const char* text : {"", "{", "[]", "{\"a\":1,\"a\":2}", "{\"a\":1e999}", "\xff"}) {
    EXPECT_EQ(outcome_of([&] { parse_hf_config(text, "config.json"); }).code, 30) << text;
  }
  const std::string deep = std::string(100000, '[');
  EXPECT_EQ(outcome_of([&] { parse_hf_config(deep, "config.json"); }).code, 30);
}

TEST(HfConfig, WrittenConfigReadsBackTheSame) {
  for (const ModelFamily family : kFamilies) {
    const ModelConfig model = parse_hf_config(family_config(family).dump(), "config.json");
    const ModelConfig again = parse_hf_config(hf_config_json(model, HfStorage::f32), "again");
    EXPECT_EQ(hf_config_json(model, HfStorage::f32), hf_config_json(again, HfStorage::f32));
    EXPECT_EQ(model.family, again.family);
    EXPECT_EQ(model.head_dim, again.head_dim);
    EXPECT_EQ(model.normalize_top_k, again.normalize_top_k);
  }
}

// The slices of each spelling cover every canonical element once.
TEST(HfTensors, SlicesTileEveryCanonicalTensor) {
  for (const ModelFamily family : kFamilies) {
    const ModelConfig model = parse_hf_config(family_config(family).dump(), "config.json");
    for (const HfSpelling spelling : {HfSpelling::per_expert, HfSpelling::fused}) {
      std::map<std::string, int64_t> covered;
      for (const HfTensor& slice : hf_tensors(model, spelling)) {
        EXPECT_EQ(slice.first_element, covered[slice.canonical_name]);
        covered[slice.canonical_name] += slice.elements;
      }
      for (const CanonicalTensor& tensor : canonical_tensors(model)) {
        EXPECT_EQ(covered[tensor.name], tensor.elements()) << tensor.name;
      }
    }
  }
}

TEST(HfWeights, ExportThenImportGivesTheSameBits) {
  for (const ModelFamily family : kFamilies) {
    const TemporaryDirectory directory;
    FileSystem files;
    FormulaSource source;
    const ModelConfig model = parse_hf_config(family_config(family).dump(), "config.json");
    export_hf(files, model, source, HfStorage::f32, directory.path() + "/hf");
    const ModelConfig loaded = load_hf_config(files, directory.path() + "/hf");
    HfWeights weights(files, directory.path() + "/hf", loaded);
    for (const CanonicalTensor& tensor : canonical_tensors(loaded)) {
      std::vector<float> values(static_cast<size_t>(tensor.elements()));
      weights.read(tensor.name, 0, values);
      for (int64_t i = 0; i < tensor.elements(); ++i) {
        ASSERT_EQ(values[static_cast<size_t>(i)], FormulaSource::value(tensor.name, i))
            << tensor.name << " " << i;
      }
      // A part from the middle, across q, k and v or gate and up.
      const int64_t first = tensor.elements() / 3;
      std::vector<float> part(static_cast<size_t>(tensor.elements() / 2));
      weights.read(tensor.name, first, part);
      EXPECT_EQ(part.back(), values[static_cast<size_t>(first) + part.size() - 1]) << tensor.name;
    }
  }
}

TEST(HfWeights, MissingExtraAndMisshapenTensorsAreRefused) {
  FileSystem files;
  FormulaSource source;
  json config = qwen3_config();
  const TemporaryDirectory directory;
  const std::string path = directory.path() + "/hf";
  export_hf(files, parse_hf_config(config.dump(), "config.json"), source, HfStorage::f32, path);
  const auto open_as = [&](const char* key, const json& value) {
    json changed = config;
    changed[key] = value;
    const ModelConfig model = parse_hf_config(changed.dump(), "config.json");
    return outcome_of([&] { HfWeights weights(files, path, model); });
  };
  EXPECT_EQ(open_as("vocab_size", 32).code, 0);
  EXPECT_EQ(open_as("vocab_size", 33).code, 30);            // another shape
  EXPECT_EQ(open_as("num_hidden_layers", 3).code, 30);      // missing tensors
  EXPECT_EQ(open_as("num_hidden_layers", 1).code, 2);       // a layer would be dropped
  EXPECT_EQ(open_as("tie_word_embeddings", true).code, 0);  // a repeated lm_head is harmless
}

// The golden directories lie in shared/ beside the checkout, where there is one.
std::string shared_golden(const std::string& name) {
  const std::string root = source_directory();
  for (const char* base : {"/../shared", "/../../shared"}) {
    const std::string path = root + base + "/golden/" + name;
    if (std::filesystem::exists(path + "/config.json")) return path;
  }
  return "";
}

// Files that transformers wrote: weights in per-expert names, gradients in fused names.
TEST(HfWeights, ReadsTheGoldenDirectories) {
  FileSystem files;
  int read = 0;
  for (const char* name : {"qwen3_moe", "mixtral", "olmoe"}) {
    const std::string path = shared_golden(name);
    if (path.empty()) continue;
    const ModelConfig model = load_hf_config(files, path);
    HfWeights weights(files, path, model);
    HfWeights gradients(SafetensorsReader::open_file(files, path + "/golden.safetensors"), model,
                        "grad/");
    for (const CanonicalTensor& tensor : canonical_tensors(model)) {
      std::vector<float> values(static_cast<size_t>(tensor.elements()));
      weights.read(tensor.name, 0, values);
      gradients.read(tensor.name, 0, values);
      for (const float value : values) ASSERT_TRUE(std::isfinite(value));
    }
    std::vector<int64_t> ids(2 * 33);
    gradients.file().read_i64("input_ids", 0, ids);
    for (const int64_t id : ids) EXPECT_TRUE(id >= 0 && id < model.vocab);
    ++read;
  }
  if (read == 0) GTEST_SKIP() << "skipped: no golden directories beside the repository";
}

}  // namespace
}  // namespace cambium
