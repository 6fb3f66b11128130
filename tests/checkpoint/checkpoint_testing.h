// What the checkpoint tests share: temporary directories, files, and the exit code of an
// expression.
#pragma once

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "src/base/check.h"

namespace cambium {

// A fresh directory, removed at the end.
class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string pattern = base() + "/cambium-test-" + std::string(6, 'X');
    CHECK(::mkdtemp(pattern.data()) != nullptr);
    path_ = pattern;
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  ~TemporaryDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::string& path() const { return path_; }

 private:
  // Memory where there is such a file system: the batteries sync thousands of files.
  static std::string base() {
    const bool has_memory = ::access("/dev/shm", W_OK | X_OK) == 0;
    return has_memory ? "/dev/shm" : std::filesystem::temp_directory_path().string();
  }

  std::string path_;
};

inline void write_text(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << text;
}

struct Outcome {
  int code = 0;
  std::string message;
};

// 0, or the exit code and message of the Error that `body` throws.
template <class Body>
Outcome outcome_of(Body&& body) {
  try {
    body();
    return {};
  } catch (const Error& error) {
    return {static_cast<int>(error.exit_code()), error.what()};
  }
}

}  // namespace cambium
