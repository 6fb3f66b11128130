// Runs the built binary as a user does: arguments in; exit code, stdout and stderr out.
#pragma once

#include <string>
#include <vector>

namespace cambium {

struct BinaryRun {
  int exit_code = -1;  // 128 + signal when killed; -1 when it ran past the limit
  std::string output;  // stdout and stderr as they came
};

// Runs cambium from the repository's root without stdin; kills it after `limit_s` seconds.
// `environment` is added to this process's own ("NAME=value").
BinaryRun run_binary(const std::vector<std::string>& arguments,
                     const std::vector<std::string>& environment = {}, int limit_s = 60);

// A directory under the system's temporary one, removed with its contents at the end.
class ScratchDirectory {
 public:
  ScratchDirectory();
  ~ScratchDirectory();
  ScratchDirectory(const ScratchDirectory&) = delete;
  ScratchDirectory& operator=(const ScratchDirectory&) = delete;
  const std::string& path() const { return path_; }
  // Writes `content` to path()/name and returns that path; parent directories are made.
  std::string write(const std::string& name, const std::string& content) const;

 private:
  std::string path_;
};

}  // namespace cambium
