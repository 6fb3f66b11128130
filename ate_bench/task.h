// Tasks and frameworks as they lie on disk (ate_bench/README.md describes both directories).
#pragma once

#include <map>
#include <string>
#include <vector>

#include "ate_bench/measures.h"

namespace ate {

struct Task {
  std::string name;  // its directory's
  std::string directory;
  std::string suite;  // questions, operate, extend
  std::string title;
  double budget_s = 0;  // of an attempt
  double grade_limit_s = 0;
  std::vector<std::string> frameworks;
  std::vector<std::string> read_only;  // paths that an attempt must not change
  std::vector<std::string> checks;     // every one must PASS
};

struct Framework {
  std::string name;
  std::string directory;  // of framework.toml
  std::string source;     // a local directory or a URL that git clones
  std::string commit;
  std::vector<std::string> hidden;  // paths that agents never see
};

std::vector<Task> list_tasks(const std::string& home);
Task load_task(const std::string& home, const std::string& name);
// `name` is one of ate_bench/frameworks, or a directory with a git repository of Cambium.
Framework load_framework(const std::string& home, const std::string& name);
std::map<std::string, Price> load_prices(const std::string& path);
std::vector<std::string> list_solutions(const Task& task);  // right, wrong_*

}  // namespace ate
