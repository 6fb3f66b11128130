// Helpers of the data tests: a directory that ends with its test, files, exit codes of errors.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "tests/outcome.h"

namespace cambium {

class ScratchDirectory {
 public:
  ScratchDirectory() {
    std::string name = (std::filesystem::temp_directory_path() / "cambium-data-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) ADD_FAILURE() << "mkdtemp " << name;
    path_ = name;
  }
  ~ScratchDirectory() { std::filesystem::remove_all(path_); }
  ScratchDirectory(const ScratchDirectory&) = delete;
  ScratchDirectory& operator=(const ScratchDirectory&) = delete;

  std::string path(const std::string& name) const { return (path_ / name).string(); }
  std::string write(const std::string& name, const std::string& content) const {
    std::ofstream(path(name), std::ios::binary) << content;
    return path(name);
  }
  std::string read(const std::string& name) const {
    std::ifstream file(path(name), std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  // Entries of the directory, so that leftovers show.
  int64_t entries() const { return std::distance(std::filesystem::directory_iterator(path_), {}); }

 private:
  std::filesystem::path path_;
};

// `body` must end with this exit code and a message that holds `text`.
template <class Body>
void expect_fails(int exit_code, const std::string& text, Body&& body) {
  const Outcome outcome = outcome_of(body);
  EXPECT_EQ(outcome.code, exit_code) << outcome.message;
  EXPECT_NE(outcome.message.find(text), std::string::npos) << outcome.message;
}

}  // namespace cambium
