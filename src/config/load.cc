// The parser: a TOML file and `--set` texts to a Config, every value checked alone.
//
// Order: the file's values, then the `--set` values over them, then the model's base (preset, path
// or family), then every given value by its row of the key table. All mistakes of one pass are
// collected and reported together, in the order of the file.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>

#include "fmt/format.h"
#include "src/base/check.h"
#include "src/checkpoint/hf_config.h"
#include "src/config/nearest.h"
#include "src/config/presets.h"
#include "src/config/schema.h"
#include "toml++/toml.h"

namespace cambium {

namespace {

constexpr size_t kMaxFileBytes = 1 << 20;
constexpr size_t kMaxProblems = 20;  // reported at once

// Where a value was written: a place in a file, or a --set text.
struct Origin {
  std::string file;      // path of the configuration file; empty for --set
  std::string set_text;  // the whole "a.b=c"; empty for files
  std::string raw;       // of --set: what follows "="
  std::string at(const toml::source_region& region) const {
    if (file.empty()) return fmt::format("--set {}", set_text);
    return fmt::format("{}:{}:{}", file, region.begin.line, region.begin.column);
  }
};

struct GivenValue {
  const toml::node* node = nullptr;
  const Origin* origin = nullptr;
  std::string where() const { return origin->at(node->source()); }
};

struct Problem {
  toml::source_position position;
  std::string text;
};

using GivenKeys = std::map<std::string, GivenValue, std::less<>>;

std::string type_of(const toml::node& node) {
  switch (node.type()) {
    case toml::node_type::table:
      return "a table";
    case toml::node_type::array:
      return "a list";
    case toml::node_type::string:
      return "a text";
    case toml::node_type::integer:
      return "an integer";
    case toml::node_type::floating_point:
      return "a number";
    case toml::node_type::boolean:
      return "a boolean";
    default:
      return "a date or time";
  }
}

// A value for a message: as written, at most 60 characters of it.
std::string shown(const toml::node& node) {
  std::ostringstream stream;
  node.visit([&](const auto& value) { stream << value; });
  std::string text = stream.str();
  if (text.size() > 60) text = text.substr(0, 57) + "...";
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text;
}

// "; did you mean X?", or the list of what there is.
std::string suggestion(std::string_view word, const std::vector<std::string>& names) {
  const std::string nearest = nearest_name(word, names);
  if (!nearest.empty()) return fmt::format("; did you mean {}?", nearest);
  return fmt::format("; there are: {}", joined_names(names, ", "));
}

std::vector<std::string> section_names() {
  std::vector<std::string> names;
  for (const SectionSpec& section : section_specs()) names.emplace_back(section.name);
  return names;
}

bool is_section(std::string_view name) {
  const auto sections = section_specs();
  return std::any_of(sections.begin(), sections.end(),
                     [&](const SectionSpec& section) { return name == section.name; });
}

// The hint for an unknown key: a near name in this section, the same name in another, or the list.
std::string key_suggestion(std::string_view section, std::string_view name) {
  std::vector<std::string> names;
  std::string elsewhere;
  for (const KeySpec& spec : key_specs()) {
    if (section == spec.section) names.emplace_back(spec.name);
    if (name == spec.name) elsewhere = spec.key();
  }
  const std::string nearest = nearest_name(name, names);
  if (!nearest.empty()) return fmt::format("; did you mean {}.{}?", section, nearest);
  if (!elsewhere.empty()) return fmt::format("; did you mean {}?", elsewhere);
  return fmt::format("; [{}] has: {}", section, joined_names(names, ", "));
}

// Reading of one value into its field; returns what is wrong, or nothing.
class ValueReader {
 public:
  ValueReader(const KeySpec& spec, const GivenValue& given) : spec_(spec), given_(given) {}

  std::string operator()(int64_t* field) const {
    const auto* integer = given_.node->as_integer();
    if (integer == nullptr) return wrong_type("an integer");
    const std::string problem = range_problem(spec_, static_cast<double>(integer->get()));
    if (problem.empty()) *field = integer->get();
    return problem;
  }
  std::string operator()(uint64_t* field) const {
    int64_t value = 0;
    const std::string problem = (*this)(&value);
    if (problem.empty()) *field = static_cast<uint64_t>(value);
    return problem;
  }
  std::string operator()(double* field) const {
    const auto value = given_.node->value<double>();
    const bool is_number = given_.node->is_number();
    if (!is_number || !value.has_value()) return wrong_type("a number");
    const std::string problem = range_problem(spec_, *value);
    if (problem.empty()) *field = *value + 0.0;  // -0 becomes 0
    return problem;
  }
  std::string operator()(bool* field) const {
    const auto* boolean = given_.node->as_boolean();
    if (boolean == nullptr) return wrong_type("true or false");
    *field = boolean->get();
    return "";
  }
  std::string operator()(std::string* field) const {
    std::string text;
    if (!read_text(*given_.node, &text)) return wrong_type("a text");
    if (!spec_.choices.empty() && choice_index(text) < 0) return wrong_choice(text);
    *field = text;
    return "";
  }
  std::string operator()(std::vector<std::string>* field) const {
    std::vector<std::string> texts;
    if (const auto* list = given_.node->as_array()) {
      for (const toml::node& element : *list) {
        if (!element.is_string()) return wrong_type("a list of texts");
        texts.push_back(element.as_string()->get());
      }
    } else {
      texts.emplace_back();
      if (!read_text(*given_.node, &texts.back())) return wrong_type("a text or a list of texts");
    }
    *field = std::move(texts);
    return "";
  }
  // Kept ascending, each once.
  std::string operator()(std::vector<int64_t>* field) const {
    const auto* list = given_.node->as_array();
    if (list == nullptr) return wrong_type("a list of integers");
    std::vector<int64_t> values;
    for (const toml::node& element : *list) {
      if (!element.is_integer()) return wrong_type("a list of integers");
      values.push_back(element.as_integer()->get());
      const std::string problem = range_problem(spec_, static_cast<double>(values.back()));
      if (!problem.empty()) return problem;
    }
    std::sort(values.begin(), values.end());
    values.erase(std::unique(values.begin(), values.end()), values.end());
    *field = std::move(values);
    return "";
  }
  std::string operator()(const ChoiceField& field) const {
    std::string text;
    if (!read_text(*given_.node, &text)) return wrong_type("a text");
    const int index = choice_index(text);
    if (index < 0) return wrong_choice(text);
    field.set(field.target, index);
    return "";
  }

 private:
  // A --set value for a text is a text whatever TOML makes of it: run.out=2024.
  bool read_text(const toml::node& node, std::string* text) const {
    if (const auto* value = node.as_string()) {
      *text = value->get();
      return true;
    }
    if (given_.origin->set_text.empty() || node.is_array() || node.is_table()) return false;
    *text = given_.origin->raw;
    return true;
  }
  std::string wrong_type(const char* wanted) const {
    const std::string range = range_text(spec_);
    const auto* text = given_.node->as_string();
    const bool huge = text != nullptr && !given_.origin->set_text.empty() && !text->get().empty() &&
                      text->get().find_first_not_of("+-0123456789_") == std::string::npos;
    return fmt::format("is {}, not {}{}{}", huge ? "beyond 64 bits" : type_of(*given_.node), wanted,
                       range.empty() ? "" : ": ", range);
  }
  int choice_index(const std::string& text) const {
    for (size_t index = 0; index < spec_.choices.size(); ++index) {
      if (text == spec_.choices[index]) return static_cast<int>(index);
    }
    return -1;
  }
  std::string wrong_choice(const std::string& text) const {
    const std::vector<std::string> names(spec_.choices.begin(), spec_.choices.end());
    const std::string nearest = nearest_name(text, names);
    return fmt::format("is not one of {}{}", joined_names(names, ", "),
                       nearest.empty() ? "" : fmt::format("; did you mean {}?", nearest));
  }
  const KeySpec& spec_;
  const GivenValue& given_;
};

// One pass over all documents: collects, then converts.
class Loader {
 public:
  void add_file(const std::string& text, const std::string& path);
  void add_set(const std::string& set_text);
  Config finish(const std::string& path);

 private:
  void add_section(std::string_view section, const toml::node& node, const Origin& origin,
                   const toml::source_region& region);
  void add_faults(const toml::node& node, const Origin& origin);
  void add_key(GivenKeys* keys, std::string_view section, std::string_view name,
               const toml::source_region& region, GivenValue given);
  void add_model_name(const toml::node& node, const Origin& origin);
  void add_problem(const Origin& origin, const toml::source_region& region, std::string text) {
    problems_.push_back({region.begin, fmt::format("{}: {}", origin.at(region), text)});
  }
  ModelConfig base_model();
  void apply(const KeySpec& spec, const GivenKeys& keys, Config* config, size_t element);
  void complete_model(ModelConfig* model);
  void report() const;
  bool has(std::string_view key) const { return keys_.find(key) != keys_.end(); }

  std::vector<std::unique_ptr<toml::table>> documents_;
  std::vector<std::unique_ptr<Origin>> origins_;
  GivenKeys keys_;                 // "section.name"
  std::vector<GivenKeys> faults_;  // one per [[faults]] entry
  std::vector<Problem> problems_;
};

void Loader::add_file(const std::string& text, const std::string& path) {
  origins_.push_back(std::make_unique<Origin>(Origin{.file = path, .set_text = "", .raw = ""}));
  const Origin& origin = *origins_.back();
  try {
    documents_.push_back(std::make_unique<toml::table>(toml::parse(text)));
  } catch (const toml::parse_error& error) {
    fail(ExitCode::usage, "{}: not TOML: {}", origin.at(error.source()), error.description());
  }
  for (const auto& [key, node] : *documents_.back()) {
    add_section(key.str(), node, origin, key.source());
  }
}

void Loader::add_set(const std::string& set_text) {
  const size_t equals = set_text.find('=');
  if (equals == std::string::npos || equals == 0) {
    fail(ExitCode::usage, "--set {}: write --set section.key=value, such as --set train.steps=20",
         set_text);
  }
  const std::string key = set_text.substr(0, equals);
  const std::string raw = set_text.substr(equals + 1);
  origins_.push_back(
      std::make_unique<Origin>(Origin{.file = "", .set_text = set_text, .raw = raw}));
  const Origin& origin = *origins_.back();
  auto document = std::make_unique<toml::table>();
  try {
    *document = toml::parse("value = " + raw);
  } catch (const toml::parse_error&) {
    document->clear();
  }
  // Text that TOML does not take as one value (or that smuggles in further keys) is a string.
  if (document->size() != 1) *document = toml::table{{"value", raw}};
  documents_.push_back(std::move(document));
  const toml::node& node = *documents_.back()->get("value");
  const size_t dot = key.find('.');
  if (dot == std::string::npos) {
    add_section(key, node, origin, node.source());
    return;
  }
  const std::string section = key.substr(0, dot);
  if (!is_section(section)) {
    add_problem(
        origin, node.source(),
        fmt::format("unknown section [{}]{}", section, suggestion(section, section_names())));
  } else if (section == "faults") {
    add_problem(origin, node.source(),
                "faults is a list: write --set 'faults=[{kind=\"rng_rank\", rank=1}]'");
  } else {
    add_key(&keys_, section, key.substr(dot + 1), node.source(), {&node, &origin});
  }
}

void Loader::add_section(std::string_view section, const toml::node& node, const Origin& origin,
                         const toml::source_region& region) {
  if (!is_section(section)) {
    std::string hint = suggestion(section, section_names());
    for (const KeySpec& spec : key_specs()) {
      if (section == spec.name) hint = fmt::format("; did you mean {}?", spec.key());
    }
    add_problem(origin, region, fmt::format("unknown section [{}]{}", section, hint));
  } else if (section == "faults") {
    add_faults(node, origin);
  } else if (section == "model" && node.is_string()) {
    add_model_name(node, origin);
  } else if (const auto* table = node.as_table()) {
    for (const auto& [key, value] : *table) {
      add_key(&keys_, section, key.str(), key.source(), {&value, &origin});
    }
  } else {
    add_problem(
        origin, region,
        fmt::format("{} is {}, not a section: write [{}]", section, type_of(node), section));
  }
}

// model = "tiny" is short for model.preset; any other text is a directory.
void Loader::add_model_name(const toml::node& node, const Origin& origin) {
  const std::string& text = node.as_string()->get();
  const auto names = preset_names();
  const bool is_preset =
      std::any_of(names.begin(), names.end(), [&](const char* name) { return text == name; });
  const bool is_path = !is_preset && text.find('/') != std::string::npos;
  add_key(&keys_, "model", is_path ? "path" : "preset", node.source(), {&node, &origin});
}

void Loader::add_faults(const toml::node& node, const Origin& origin) {
  faults_.clear();  // a list that is given later replaces the earlier one
  const auto* list = node.as_array();
  const bool of_tables = list != nullptr && std::all_of(list->begin(), list->end(),
                                                        [](const auto& e) { return e.is_table(); });
  if (!of_tables) {
    add_problem(origin, node.source(), "faults is a list of tables: write [[faults]]");
    return;
  }
  for (const toml::node& element : *list) {
    faults_.emplace_back();
    for (const auto& [key, value] : *element.as_table()) {
      add_key(&faults_.back(), "faults", key.str(), key.source(), {&value, &origin});
    }
    if (faults_.back().find("faults.kind") == faults_.back().end()) {
      add_problem(origin, element.source(), "faults.kind is missing");
    }
  }
}

void Loader::add_key(GivenKeys* keys, std::string_view section, std::string_view name,
                     const toml::source_region& region, GivenValue given) {
  if (find_key(section, name) == nullptr) {
    add_problem(*given.origin, region,
                fmt::format("unknown key {}.{}{}", section, name, key_suggestion(section, name)));
    return;
  }
  // Another model by --set replaces the file's [model] whole: its dimensions belong to the old one.
  const bool is_base = section == "model" && (name == "preset" || name == "path");
  if (is_base && !given.origin->set_text.empty()) {
    std::erase_if(*keys, [](const auto& entry) { return entry.first.starts_with("model."); });
  }
  (*keys)[fmt::format("{}.{}", section, name)] = given;
}

// The model of a Hugging Face directory; errors keep their code and gain the place of model.path.
ModelConfig read_model_path(const std::string& directory, const GivenValue& given) {
  try {
    return load_hf_config(directory);
  } catch (const Error& error) {
    fail(error.exit_code(), "{}: model.path: {}", given.where(), error.what());
  }
}

// The model before the keys of [model] change it.
ModelConfig Loader::base_model() {
  const auto path = keys_.find("model.path");
  const auto preset = keys_.find("model.preset");
  const auto text_of = [](const GivenValue& given) {
    const auto* text = given.node->as_string();
    if (text != nullptr) return text->get();
    return given.node->is_value() ? given.origin->raw : std::string();
  };
  if (path != keys_.end() && !text_of(path->second).empty()) {
    if (preset != keys_.end()) {
      add_problem(*path->second.origin, path->second.node->source(),
                  "give model.preset or model.path, not both");
    }
    // A resolved file names every dimension, so that it can be read where the directory is not.
    bool complete = true;
    for (const KeySpec& spec : key_specs()) {
      const bool dimension =
          std::string_view(spec.section) == "model" && spec.resume == ResumeRule::same;
      if (dimension && !has(spec.key())) complete = false;
    }
    if (!complete && problems_.empty()) return read_model_path(text_of(path->second), path->second);
  }
  const auto names = preset_names();
  if (preset != keys_.end()) {
    const std::string name = text_of(preset->second);
    if (std::find(names.begin(), names.end(), name) != names.end()) return preset_model(name);
    return ModelConfig{};  // apply() reports the wrong name
  }
  Config probe;
  const auto family = keys_.find("model.family");
  const KeySpec* spec = find_key("model", "family");
  if (family != keys_.end()) {
    std::visit(ValueReader(*spec, family->second), spec->field(probe, 0));
  }
  return family_model(probe.model.family);
}

void Loader::apply(const KeySpec& spec, const GivenKeys& keys, Config* config, size_t element) {
  const auto given = keys.find(spec.key());
  if (given == keys.end()) return;
  const std::string problem =
      std::visit(ValueReader(spec, given->second), spec.field(*config, element));
  if (problem.empty()) return;
  const toml::node& node = *given->second.node;
  add_problem(*given->second.origin, node.source(),
              fmt::format("{} = {} {}", spec.key(), shown(node), problem));
}

// Fills in what follows from other dimensions, and names the dimensions that nothing gives.
void Loader::complete_model(ModelConfig* model) {
  if (!problems_.empty()) return;
  if (!has("model.kv_heads") && model->kv_heads == 0) model->kv_heads = model->heads;
  if (model->head_dim == 0 && model->heads > 0 && model->hidden % model->heads == 0) {
    model->head_dim = model->hidden / model->heads;
  }
  Config probe;
  probe.model = *model;
  std::vector<std::string> missing;
  for (const KeySpec& spec : key_specs()) {
    if (std::string_view(spec.section) != "model") continue;
    const KeyField field = spec.field(probe, 0);
    const auto* dimension = std::get_if<int64_t*>(&field);
    const bool needed = dimension != nullptr && spec.range.minimum > 0;
    if (needed && **dimension == 0) missing.push_back(spec.key());
  }
  if (missing.empty()) return;
  problems_.push_back(
      {{},
       fmt::format("the model is not given: {} missing; write [model] preset = \"{}\", or {}",
                   joined_names(missing, ", "), "quickstart", "every dimension")});
}

void Loader::report() const {
  if (problems_.empty()) return;
  std::vector<Problem> sorted = problems_;
  std::stable_sort(sorted.begin(), sorted.end(), [](const Problem& left, const Problem& right) {
    return left.position.line < right.position.line ||
           (left.position.line == right.position.line &&
            left.position.column < right.position.column);
  });
  std::string text;
  for (size_t index = 0; index < std::min(sorted.size(), kMaxProblems); ++index) {
    text += (text.empty() ? "" : "\n") + sorted[index].text;
  }
  if (sorted.size() > kMaxProblems) {
    text += fmt::format("\nand {} more", sorted.size() - kMaxProblems);
  }
  fail(ExitCode::usage, "{}", text);
}

Config Loader::finish(const std::string& path) {
  Config config;
  config.name = std::filesystem::path(path).stem().string();
  config.model = base_model();
  config.faults.resize(faults_.size());
  for (const KeySpec& spec : key_specs()) {
    if (std::string_view(spec.section) != "faults") {
      apply(spec, keys_, &config, 0);
      continue;
    }
    for (size_t element = 0; element < faults_.size(); ++element) {
      apply(spec, faults_[element], &config, element);
    }
  }
  if (!has("numerics.reduction")) {
    config.numerics.reduction =
        config.run.device == DeviceKind::cpu ? ReductionMode::exact : ReductionMode::fast;
  }
  if (!has("numerics.compute") && config.run.device == DeviceKind::cuda) {
    config.numerics.compute = ComputeType::bf16;
  }
  complete_model(&config.model);
  report();
  return config;
}

std::string read_config_file(const std::string& path) {
  std::error_code status;
  if (std::filesystem::is_directory(path, status)) {
    fail(ExitCode::usage, "{}: is a directory, not a configuration file", path);
  }
  std::ifstream stream(path, std::ios::binary);
  if (!stream) {
    fail(ExitCode::usage, "{}: cannot open the configuration file: {}", path,
         std::generic_category().message(errno));
  }
  std::string text(kMaxFileBytes + 1, '\0');
  stream.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(stream.gcount()));
  if (text.size() > kMaxFileBytes) {
    fail(ExitCode::usage, "{}: larger than {} bytes: not a configuration file", path,
         kMaxFileBytes);
  }
  return text;
}

}  // namespace

Config parse_config(const std::string& text, const std::string& origin,
                    std::span<const std::string> sets) {
  Loader loader;
  loader.add_file(text, origin);
  for (const std::string& set_text : sets) loader.add_set(set_text);
  return loader.finish(origin);
}

Config load_config(const std::string& path, std::span<const std::string> sets) {
  return parse_config(read_config_file(path), path, sets);
}

}  // namespace cambium
