// Built-in models: dimensions of published ones, and small ones for demonstrations and tests.
#pragma once

#include <span>
#include <string>

#include "src/config/config.h"

namespace cambium {

// Names of the built-in models, in the order of the table in presets.cc.
std::span<const char* const> preset_names();

// The model of that name, `preset` filled in; the name must be one of preset_names().
ModelConfig preset_model(const std::string& name);

// What a family fixes when nothing else says it: q/k norm, renormalised routing weights, epsilon.
ModelConfig family_model(ModelFamily family);

}  // namespace cambium
