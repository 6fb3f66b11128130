// One attempt: a scratch copy, the agent in it, what it left; then the grade, in another copy.
#pragma once

#include <string>
#include <vector>

#include "ate_bench/task.h"

namespace ate {

struct AgentChoice {
  std::string name;  // claude, codex, generic, scripted
  std::string model;
  std::string command;  // of `generic`; scripted: the session to replay
};

struct AttemptSpec {
  Task task;
  Framework framework;
  AgentChoice agent;
  std::string home;        // ate_bench/
  std::string ate_binary;  // plays scripted sessions
  std::string directory;   // of the attempt, made here
  double limit_s = 0;
};

// How the session ended. Only `finished` attempts can succeed.
//   finished, timeout, crash, network_loss, edited_read_only, prepare_failed
//   recorded: a transcript from elsewhere (`ate session`)
struct AttemptRecord {
  std::string task, suite, framework, source, commit, agent, model, outcome, detail;
  double wall_s = 0;
  std::vector<std::string> hidden;  // paths that the grading copy lacks too
};

AttemptRecord run_attempt(const AttemptSpec& spec);

constexpr const char* kNeverReached = "the grader never reached it";

struct CheckResult {
  std::string name;
  bool passed = false;
  std::string detail;
};

struct Grade {
  std::vector<CheckResult> checks;  // one for each check that task.toml names, in its order
  bool graded = false;              // the grader itself ran to its end
  bool success = false;             // finished, graded, and every check passed
  double wall_s = 0;
};

Grade grade_attempt(const std::string& home, const std::string& directory);

void save_attempt(const AttemptRecord& record, const std::string& directory);
AttemptRecord load_attempt(const std::string& directory);
Grade load_grade(const std::string& directory);
// `CHECK name PASS|FAIL detail` lines; a named check without a line, or with any FAIL, fails.
std::vector<CheckResult> read_checks(const std::vector<std::string>& names,
                                     const std::string& output);

// Replays a recorded session: `exec` records run in this directory, the others are printed.
int play_session(const std::string& path);

}  // namespace ate
