// Hugging Face config.json <-> ModelConfig for Qwen3-MoE, Mixtral and OLMoE.
//
// Both generations of keys are read: num_experts or num_local_experts, rope_theta or
// rope_parameters, head_dim given, null or absent. A value that asks for something that is not
// implemented exits 2 and names the key; a broken file exits 30.
#pragma once

#include <string>

#include "src/base/io.h"
#include "src/config/config.h"

namespace cambium {

// The model that `directory`/config.json describes; `path` is set to `directory`.
ModelConfig load_hf_config(FileSystem& files, const std::string& directory);
ModelConfig load_hf_config(const std::string& directory);

// The same from text; `where` names the file in messages.
ModelConfig parse_hf_config(const std::string& text, const std::string& where);

enum class HfStorage { f32, bf16 };

// config.json for `model` as transformers 4 and 5 read it.
std::string hf_config_json(const ModelConfig& model, HfStorage storage);
void save_hf_config(FileSystem& files, const ModelConfig& model, HfStorage storage,
                    const std::string& directory);

}  // namespace cambium
