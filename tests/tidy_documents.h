// tidy's rules over AGENTS.md and README.md, and the list of findings that all rules share.
#pragma once

#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include "tests/tidy_scan.h"

namespace tidy {

class Findings {
 public:
  // Leaves out a line that says `tidy: allow RULE: reason`.
  void add(const SourceFile& source, size_t line, const std::string& rule,
           const std::string& instead);
  void print() const;
  size_t count() const { return found_.size(); }
  std::set<std::string> rules() const;

 private:
  struct Finding {
    std::string path;
    size_t line;
    std::string rule;
    std::string instead;
  };
  std::vector<Finding> found_;
  size_t exempt_ = 0;
};

// The whole file; empty when there is none.
std::string read_text(const std::filesystem::path& path);

// Every path in AGENTS.md and README.md exists; AGENTS.md has at most 150 lines; commands in a
// block marked `<!-- run -->` run and exit 0 within 30 s; the other commands name scripts, presets,
// subcommands and flags that exist.
void check_documents(const std::filesystem::path& root, Findings& findings);

// Proves on samples that each rule over documents can fail.
bool documents_self_test();

}  // namespace tidy
