// Scanner of tests/tidy.cc: a source file as code without comments and literals, its functions and
// its statements at namespace scope. It reads the dialect of this repository, not all of C++.
#pragma once

#include <string>
#include <vector>

namespace tidy {

struct SourceFile {
  std::string path;                // relative to the root, with '/'
  std::vector<std::string> lines;  // as written
  std::vector<std::string> code;   // same lines, comments and literals blanked
};

// A function body: `line` is that of its opening brace, both 1-based, `end_line` inclusive.
struct FunctionBody {
  std::string head;  // text between the previous statement and the brace
  int line = 0;
  int end_line = 0;
};

// A statement outside functions and types that ends in ';' or in an initialiser.
struct NamespaceStatement {
  std::string text;
  int line = 0;
};

struct Outline {
  std::vector<FunctionBody> functions;
  std::vector<NamespaceStatement> statements;
};

SourceFile make_source(const std::string& path, const std::string& text);
Outline outline(const SourceFile& source);

bool is_identifier(char letter);
// Position of `word` in `line` from `start` on, with no identifier character around it; or npos.
size_t find_word(const std::string& line, const std::string& word, size_t start = 0);
bool has_word(const std::string& line, const std::string& word);
bool starts_with(const std::string& text, const std::string& prefix);
bool ends_with(const std::string& text, const std::string& suffix);

}  // namespace tidy
