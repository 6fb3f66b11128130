#include "ate_bench/prove.h"

#include <algorithm>
#include <filesystem>

#include "ate_bench/process.h"
#include "fmt/core.h"
#include "nlohmann/json.hpp"

namespace ate {
namespace {

std::string write_session(const std::string& script, const std::string& path) {
  const nlohmann::json exec = {{"type", "exec"}, {"command", "bash -eu '" + script + "'"}};
  write_file(path, "{\"type\":\"turn\",\"input_tokens\":0,\"output_tokens\":0}\n" + exec.dump() +
                       "\n{\"type\":\"end\"}\n");
  return path;
}

}  // namespace

bool prove_task(const Task& task, const ProofSpec& spec) {
  const std::vector<std::string> solutions = list_solutions(task);
  const auto wrong = std::count_if(solutions.begin(), solutions.end(),
                                   [](const auto& name) { return name.rfind("wrong_", 0) == 0; });
  const bool has_right = std::count(solutions.begin(), solutions.end(), "right") == 1;
  bool good = has_right && wrong >= 2 && wrong + 1 == static_cast<int64_t>(solutions.size());
  if (!good) fmt::print("{}: needs right.sh and at least two wrong_*.sh\n", task.name);
  for (const std::string& name : solutions) {
    const std::string directory = spec.out + "/" + task.name + "-" + name;
    const std::string script =
        std::filesystem::absolute(task.directory + "/grade/solutions/" + name + ".sh");
    AttemptSpec attempt;
    attempt.task = task;
    attempt.framework = load_framework(spec.home, spec.framework);
    attempt.agent = {"scripted", "", write_session(script, directory + ".session")};
    attempt.home = spec.home;
    attempt.ate_binary = spec.ate_binary;
    attempt.directory = directory;
    const AttemptRecord record = run_attempt(attempt);
    const Grade grade = grade_attempt(spec.home, directory);
    // A near-miss that does not even compile proves nothing: every check must have been reached.
    const bool reached =
        std::all_of(grade.checks.begin(), grade.checks.end(),
                    [](const CheckResult& check) { return check.detail != kNeverReached; });
    const bool sound = record.outcome == "finished" && grade.graded && reached;
    const bool holds = sound && grade.success == (name == "right");
    std::string failed;
    for (const CheckResult& check : grade.checks) {
      if (!check.passed) failed += fmt::format(" {} ({})", check.name, check.detail);
    }
    fmt::print("{} {}/{}: {} {:.1f} s{}{}\n", holds ? "ok  " : "BAD ", task.name, name,
               grade.success ? "accepted" : "rejected", grade.wall_s,
               sound ? "" : ", " + record.outcome + " " + record.detail,
               failed.empty() ? "" : ", failed:" + failed);
    if (!holds) fmt::print("     see {}/grade.log and agent.stderr\n", directory);
    good = good && holds;
  }
  return good;
}

}  // namespace ate
