#include "ate_bench/task.h"

#include <algorithm>
#include <filesystem>
#include <stdexcept>

#include "toml++/toml.h"

namespace ate {
namespace {

namespace fs = std::filesystem;

std::string text_at(const toml::table& table, const char* key, const std::string& path) {
  const auto value = table[key].value<std::string>();
  if (!value) throw std::runtime_error(path + ": the key '" + key + "' is missing: add a string");
  return *value;
}

std::vector<std::string> list_at(const toml::table& table, const char* key) {
  std::vector<std::string> found;
  if (const toml::array* values = table[key].as_array()) {
    for (const auto& value : *values) found.push_back(value.value<std::string>().value_or(""));
  }
  return found;
}

}  // namespace

Task load_task(const std::string& home, const std::string& name) {
  Task task;
  task.name = name;
  task.directory = home + "/tasks/" + name;
  const std::string path = task.directory + "/task.toml";
  if (!fs::exists(path)) {
    throw std::runtime_error("no task '" + name + "' in " + home + "/tasks: `ate list` names them");
  }
  const toml::table table = toml::parse_file(path);
  task.suite = text_at(table, "suite", path);
  task.title = text_at(table, "title", path);
  if (task.suite != "questions" && task.suite != "operate" && task.suite != "extend") {
    throw std::runtime_error(path + ": suite is one of questions, operate, extend");
  }
  task.budget_s = table["budget_s"].value_or(0.0);
  task.grade_limit_s = table["grade_limit_s"].value_or(300.0);
  task.frameworks = list_at(table, "frameworks");
  task.read_only = list_at(table, "read_only");
  task.checks = list_at(table, "checks");
  if (task.budget_s <= 0 || task.checks.empty() || task.frameworks.empty()) {
    throw std::runtime_error(path + ": budget_s > 0, checks and frameworks are needed");
  }
  return task;
}

std::vector<Task> list_tasks(const std::string& home) {
  std::vector<Task> tasks;
  for (const auto& entry : fs::directory_iterator(home + "/tasks")) {
    if (!fs::exists(entry.path() / "task.toml")) continue;
    tasks.push_back(load_task(home, entry.path().filename()));
  }
  std::sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) {
    return std::pair(a.suite, a.name) < std::pair(b.suite, b.name);
  });
  return tasks;
}

Framework load_framework(const std::string& home, const std::string& name) {
  Framework framework;
  const size_t equals = name.find('=');  // NAME=DIR: a clone of NAME
  const std::string directory = equals == std::string::npos ? name : name.substr(equals + 1);
  const bool is_directory = directory.find('/') != std::string::npos || directory == ".";
  framework.name = equals != std::string::npos ? name.substr(0, equals)
                   : is_directory              ? "cambium"
                                               : name;
  framework.directory = home + "/frameworks/" + framework.name;
  const std::string path = framework.directory + "/framework.toml";
  if (!fs::exists(path)) {
    throw std::runtime_error("no framework '" + name + "': a directory, or one of " + home +
                             "/frameworks");
  }
  const toml::table table = toml::parse_file(path);
  framework.source = text_at(table, "source", path);
  framework.commit = text_at(table, "commit", path);
  framework.hidden = list_at(table, "hidden");
  if (is_directory) framework.source = fs::absolute(directory);
  if (framework.source == ".") framework.source = fs::absolute(home).parent_path();
  return framework;
}

std::map<std::string, Price> load_prices(const std::string& path) {
  std::map<std::string, Price> prices;
  if (path.empty()) return prices;
  const toml::table table = toml::parse_file(path);
  for (const auto& [model, node] : table) {
    const toml::table* row = node.as_table();
    const auto price = [&, name = std::string(model.str())](const char* key) {
      const auto value = row != nullptr ? (*row)[key].value<double>() : std::nullopt;
      if (!value) throw std::runtime_error(path + ": [" + name + "] needs the number " + key);
      return *value;
    };
    const double input = price("input");
    prices[std::string(model.str())] = {input, price("cached_input"), price("output"),
                                        (*row)["cache_write"].value_or(input)};
  }
  return prices;
}

std::vector<std::string> list_solutions(const Task& task) {
  std::vector<std::string> names;
  const std::string directory = task.directory + "/grade/solutions";
  if (!fs::exists(directory)) return names;
  for (const auto& entry : fs::directory_iterator(directory)) {
    if (entry.path().extension() == ".sh") names.push_back(entry.path().stem());
  }
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace ate
