#include "src/train/run_history.h"

#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "src/base/error.h"

namespace cambium {
namespace {

using SortedJson = nlohmann::json;

// Missing or of another type: `fallback`. A null is the number spelled under "non_finite".
double number(const SortedJson& object, const char* key, double fallback) {
  if (!object.contains(key)) return fallback;
  const SortedJson& value = object[key];
  if (value.is_number()) return value.get<double>();
  if (!value.is_null()) return fallback;
  const std::string spelling = object.contains("non_finite") && object["non_finite"].is_object()
                                   ? object["non_finite"].value(key, std::string("nan"))
                                   : std::string("nan");
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (spelling == "inf") return kInfinity;
  return spelling == "-inf" ? -kInfinity : std::numeric_limits<double>::quiet_NaN();
}

std::optional<double> optional_number(const SortedJson& object, const char* key) {
  if (!object.contains(key)) return std::nullopt;
  return number(object, key, 0);
}

template <class Value>
Value integer(const SortedJson& object, const char* key) {
  if (!object.contains(key) || !object[key].is_number_integer()) return 0;
  return object[key].get<Value>();
}

std::string text(const SortedJson& object, const char* key) {
  if (!object.contains(key) || !object[key].is_string()) return "";
  return object[key].get<std::string>();
}

std::vector<std::vector<int64_t>> expert_load(const SortedJson& object) {
  std::vector<std::vector<int64_t>> layers;
  if (!object.contains("expert_load") || !object["expert_load"].is_array()) return layers;
  for (const SortedJson& layer : object["expert_load"]) {
    std::vector<int64_t> load;
    for (const SortedJson& count : layer.is_array() ? layer : SortedJson::array()) {
      if (count.is_number_integer()) load.push_back(count.get<int64_t>());
    }
    layers.push_back(std::move(load));
  }
  return layers;
}

StepMetrics step_metrics(const SortedJson& object) {
  StepMetrics metrics;
  metrics.step = integer<int64_t>(object, "step");
  metrics.loss = number(object, "loss", 0);
  metrics.grad_norm = number(object, "grad_norm", 0);
  metrics.lr = number(object, "lr", 0);
  metrics.step_ms = number(object, "step_ms", 0);
  metrics.tokens_per_s = number(object, "tokens_per_s", 0);
  metrics.tokens = integer<int64_t>(object, "tokens");
  metrics.digest = text(object, "digest");
  metrics.balance_loss = optional_number(object, "balance_loss");
  metrics.z_loss = optional_number(object, "z_loss");
  metrics.validation_loss = optional_number(object, "validation_loss");
  metrics.expert_load = expert_load(object);
  return metrics;
}

std::ifstream open_lines(const std::string& run_directory, const char* name) {
  const std::string path = run_directory + "/" + name;
  std::ifstream stream(path, std::ios::binary);
  if (!stream || std::filesystem::is_directory(path)) {
    fail(ExitCode::usage,
         "{}: not a run directory: it has no {}; name a directory that `train` made", run_directory,
         name);
  }
  return stream;
}

}  // namespace

RunHistory read_run_history(const std::string& run_directory) {
  std::ifstream stream = open_lines(run_directory, "metrics.jsonl");
  RunHistory history;
  for (std::string line; std::getline(stream, line);) {
    const SortedJson object = SortedJson::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!object.is_object()) {
      ++history.unreadable_lines;
    } else if (text(object, "event") == "exit") {
      history.exit =
          ExitEvent{integer<int>(object, "code"), text(object, "reason"), text(object, "resume")};
    } else if (integer<int64_t>(object, "step") > 0) {
      history.exit.reset();  // the run went on
      StepMetrics metrics = step_metrics(object);
      while (!history.steps.empty() && history.steps.back().step >= metrics.step) {
        history.steps.pop_back();
      }
      history.steps.push_back(std::move(metrics));
    } else {
      ++history.unreadable_lines;
    }
  }
  return history;
}

std::vector<StepDigests> read_digests(const std::string& run_directory) {
  std::ifstream stream = open_lines(run_directory, "digests.jsonl");
  std::vector<StepDigests> all;
  for (std::string line; std::getline(stream, line);) {
    const SortedJson object = SortedJson::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!object.is_object() || !object.contains("digests") || !object["digests"].is_object()) {
      continue;
    }
    StepDigests digests;
    digests.step = integer<int64_t>(object, "step");
    for (const auto& [name, digest] : object["digests"].items()) {
      if (digest.is_string()) digests.digests[name] = digest.get<std::string>();
    }
    all.push_back(std::move(digests));
  }
  return all;
}

RunRecord read_run_record(const std::string& run_directory) {
  std::ifstream stream(run_directory + "/run.json", std::ios::binary);
  const SortedJson object =
      stream ? SortedJson::parse(stream, nullptr, /*allow_exceptions=*/false) : SortedJson();
  RunRecord record;
  if (!object.is_object()) return record;
  record.name = text(object, "name");
  record.build = text(object, "build");
  record.machine = text(object, "machine");
  record.config_hash = text(object, "config_hash");
  record.layout = text(object, "layout");
  record.transport = text(object, "transport");
  record.device = text(object, "device");
  record.reduction = text(object, "reduction");
  record.start_time = text(object, "start_time");
  record.seed = integer<uint64_t>(object, "seed");
  record.ranks = integer<int64_t>(object, "ranks");
  record.workers = integer<int64_t>(object, "workers");
  record.steps = integer<int64_t>(object, "steps");
  record.parameters = integer<int64_t>(object, "parameters");
  record.active_parameters = integer<int64_t>(object, "active_parameters");
  record.unigram_loss = optional_number(object, "unigram_loss");
  record.bigram_loss = optional_number(object, "bigram_loss");
  return record;
}

}  // namespace cambium
