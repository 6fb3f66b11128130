// What the checkpoint tests share: temporary directories, files; tests/outcome.h.
#pragma once

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "src/base/check.h"
#include "tests/outcome.h"

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

}  // namespace cambium
