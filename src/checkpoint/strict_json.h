// JSON from files: size, depth and duplicate keys are checked, numbers stay finite.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "nlohmann/json_fwd.hpp"

namespace cambium {

constexpr int64_t kMostJsonBytes = int64_t{16} << 20;
constexpr int kMostJsonDepth = 64;

// Parses `text`. Broken syntax, invalid UTF-8, deeper than 64, a key twice in one object, or a
// number beyond double exits 30; `where` names the file in the message.
nlohmann::json parse_strict_json(std::string_view text, const std::string& where);

}  // namespace cambium
