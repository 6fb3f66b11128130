#include "src/checkpoint/strict_json.h"

#include <set>
#include <vector>

#include "nlohmann/json.hpp"
#include "src/base/error.h"

namespace cambium {

nlohmann::json parse_strict_json(std::string_view text, const std::string& where) {
  using nlohmann::json;
  std::vector<std::set<std::string>> keys;  // one set per object that is open
  const auto inspect = [&](int depth, json::parse_event_t event, json& parsed) {
    if (depth > kMostJsonDepth) {
      fail(ExitCode::corrupt_file, "'{}': JSON nested deeper than {}", where, kMostJsonDepth);
    }
    if (event == json::parse_event_t::object_start) {
      keys.emplace_back();
    } else if (event == json::parse_event_t::object_end) {
      keys.pop_back();
    } else if (event == json::parse_event_t::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!keys.back().insert(key).second) {
        fail(ExitCode::corrupt_file, "'{}': key '{}' appears twice in one JSON object", where, key);
      }
    }
    return true;
  };
  try {
    return json::parse(text.begin(), text.end(), inspect);
  } catch (const json::exception& error) {
    // The library's message quotes the input, which may hold anything; keep the position.
    const std::string message = error.what();
    const size_t at = message.find("at line");
    const size_t colon = message.find(':', at);
    fail(ExitCode::corrupt_file, "'{}': broken JSON {}", where,
         at == std::string::npos ? "" : message.substr(at, colon - at));
  }
}

}  // namespace cambium
