// The resolved file, the schema in both forms, and the comparison on resume: walks over the table.
#include "fmt/format.h"
#include "nlohmann/json.hpp"
#include "src/config/schema.h"

namespace cambium {

namespace {

// NOTE: spec.field wants a mutable Config; the walks below only read through it.
KeyField field_in(const KeySpec& spec, const Config& config, size_t element) {
  return spec.field(const_cast<Config&>(config), element);
}

// An empty model.preset means "none", which is no choice of the table: the line is left out.
bool is_written(const KeySpec& spec, const KeyField& field) {
  const auto* text = std::get_if<std::string*>(&field);
  return text == nullptr || spec.choices.empty() || !(*text)->empty();
}

std::string default_text(const KeySpec& spec) {
  if (spec.default_note != nullptr) return spec.default_note;
  Config config;
  config.faults.emplace_back();
  return value_toml(spec, spec.field(config, 0));
}

}  // namespace

std::string resolved_toml(const Config& config) {
  std::string text;
  for (const SectionSpec& section : section_specs()) {
    const bool is_list = std::string_view(section.name) == "faults";
    const size_t elements = is_list ? config.faults.size() : 1;
    for (size_t element = 0; element < elements; ++element) {
      text += fmt::format("{}{}{}{}\n", text.empty() ? "" : "\n", is_list ? "[[" : "[",
                          section.name, is_list ? "]]" : "]");
      for (const KeySpec& spec : key_specs()) {
        if (std::string_view(spec.section) != section.name) continue;
        const KeyField field = field_in(spec, config, element);
        if (is_written(spec, field)) {
          text += fmt::format("{} = {}\n", spec.name, value_toml(spec, field));
        }
      }
    }
  }
  return text;
}

std::string schema_text() {
  std::string text;
  for (const SectionSpec& section : section_specs()) {
    text += fmt::format("{}[{}]  {}\n", text.empty() ? "" : "\n", section.name, section.meaning);
    for (const KeySpec& spec : key_specs()) {
      if (std::string_view(spec.section) != section.name) continue;
      const std::string range = range_text(spec);
      text += fmt::format("  {:<32} {}{}{}; default {}\n", spec.key(), type_name(spec),
                          range.empty() ? "" : " ", range, default_text(spec));
      text += fmt::format("  {:<32}   {}\n", "", spec.meaning);
    }
  }
  return text;
}

std::string schema_json() {
  nlohmann::ordered_json keys = nlohmann::ordered_json::array();
  for (const KeySpec& spec : key_specs()) {
    nlohmann::ordered_json row;
    row["key"] = spec.key();
    row["type"] = type_name(spec);
    row["default"] = default_text(spec);
    if (!spec.choices.empty()) {
      row["choices"] = std::vector<std::string>(spec.choices.begin(), spec.choices.end());
    } else if (const std::string range = range_text(spec); !range.empty()) {
      row["minimum"] = spec.range.minimum;
      row["maximum"] = spec.range.maximum;
      row["range"] = range;
    }
    row["may_differ_on_resume"] = spec.resume == ResumeRule::may_differ;
    row["meaning"] = spec.meaning;
    keys.push_back(std::move(row));
  }
  nlohmann::ordered_json schema;
  schema["keys"] = std::move(keys);
  return schema.dump(1);
}

std::vector<std::string> resume_differences(const Config& saved, const Config& given) {
  std::vector<std::string> differences;
  for (const KeySpec& spec : key_specs()) {
    if (spec.resume == ResumeRule::may_differ) continue;
    const std::string before = value_toml(spec, field_in(spec, saved, 0));
    const std::string now = value_toml(spec, field_in(spec, given, 0));
    if (before != now) {
      differences.push_back(fmt::format("{} = {}, now {}", spec.key(), before, now));
    }
  }
  return differences;
}

}  // namespace cambium
