// Child processes and small files: a command in its own process group, killed whole at a limit.
#pragma once

#include <string>
#include <vector>

namespace ate {

struct ChildSpec {
  std::vector<std::string> arguments;    // argv; looked up in PATH
  std::string directory;                 // where it runs
  std::vector<std::string> environment;  // NAME=value, added to ours
  std::string stdout_path, stderr_path;  // files; stdout and stderr may be the same
  std::string times_path;                // arrival of each stdout line, seconds; may be empty
  double limit_s = 0;
};

struct ChildResult {
  int exit_code = -1;  // 128 + signal when killed
  bool timed_out = false;
  double wall_s = 0;
};

ChildResult run_child(const ChildSpec& spec);

// Runs `bash -c script` with `arguments` as $1...; throws with its output when it fails.
void run_shell(const std::string& script, const std::vector<std::string>& arguments,
               const std::string& directory);

std::string read_file(const std::string& path);  // "" when there is none
void write_file(const std::string& path, const std::string& text);
double now_s();

}  // namespace ate
