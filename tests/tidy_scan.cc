// Scanner of tests/tidy.cc (tidy_scan.h).
#include "tests/tidy_scan.h"

#include <algorithm>
#include <cctype>
#include <utility>

namespace tidy {
namespace {

enum class Lexeme { code, line_comment, block_comment, string, character, raw_string };

// One pass over the text; every character that is not code becomes a blank.
class Blanker {
 public:
  explicit Blanker(const std::string& text) : text_(text), out_(text) {}
  std::string run() {
    for (at_ = 0; at_ < text_.size(); ++at_) step();
    return out_;
  }

 private:
  bool next_is(const char* token) const { return text_.compare(at_, 2, token) == 0; }
  void blank() {
    if (text_[at_] != '\n') out_[at_] = ' ';
  }
  void step() {
    switch (state_) {
      case Lexeme::code:
        return code_step();
      case Lexeme::line_comment:
        blank();
        if (text_[at_] == '\n') state_ = Lexeme::code;
        return;
      case Lexeme::block_comment:
        blank();
        if (at_ > 0 && text_[at_] == '/' && text_[at_ - 1] == '*') state_ = Lexeme::code;
        return;
      case Lexeme::raw_string:
        if (text_.compare(at_, raw_end_.size(), raw_end_) == 0) state_ = Lexeme::string;
        blank();
        if (state_ == Lexeme::string) raw_tail_ = raw_end_.size() - 1;
        return;
      case Lexeme::string:
      case Lexeme::character:
        return literal_step();
    }
  }
  void code_step() {
    const char letter = text_[at_];
    const bool word_before = at_ > 0 && is_identifier(text_[at_ - 1]);
    if (next_is("//")) {
      state_ = Lexeme::line_comment;
      blank();
    } else if (next_is("/*")) {
      state_ = Lexeme::block_comment;
      blank();
      ++at_;
      blank();
    } else if (letter == '"' && at_ > 0 && text_[at_ - 1] == 'R') {
      const size_t open = text_.find('(', at_);
      if (open == std::string::npos) return;
      raw_end_ = ")" + text_.substr(at_ + 1, open - at_ - 1) + "\"";
      state_ = Lexeme::raw_string;
    } else if (letter == '"') {
      state_ = Lexeme::string;
    } else if (letter == '\'' && !word_before) {  // not a digit separator
      state_ = Lexeme::character;
    }
  }
  void literal_step() {
    if (raw_tail_ > 0) {  // the end of a raw string: delimiter and quote
      blank();
      if (--raw_tail_ == 0) state_ = Lexeme::code;
      return;
    }
    const char quote = state_ == Lexeme::string ? '"' : '\'';
    if (text_[at_] == '\\') {
      blank();
      ++at_;
      if (at_ < text_.size()) blank();
    } else if (text_[at_] == quote) {
      state_ = Lexeme::code;
    } else {
      blank();
    }
  }

  const std::string& text_;
  std::string out_;
  std::string raw_end_;
  size_t at_ = 0;
  size_t raw_tail_ = 0;
  Lexeme state_ = Lexeme::code;
};

std::vector<std::string> split_lines(const std::string& text) {
  std::vector<std::string> lines;
  size_t start = 0;
  while (start < text.size()) {
    const size_t end = text.find('\n', start);
    lines.push_back(text.substr(start, end == std::string::npos ? end : end - start));
    if (end == std::string::npos) break;
    start = end + 1;
  }
  return lines;
}

std::string trimmed(const std::string& text) {
  const size_t first = text.find_first_not_of(" \t\n");
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(" \t\n") - first + 1);
}

enum class Scope { name_space, type, function, initializer };

Scope classify(const std::string& head) {
  if (head.empty()) return Scope::initializer;
  if (find_word(head, "namespace") != std::string::npos) return Scope::name_space;
  if (head.back() == '=' || head.back() == ',' || head.back() == '(') return Scope::initializer;
  if (starts_with(head, "extern")) return Scope::name_space;  // extern "C" {
  const bool has_call = head.find('(') != std::string::npos;
  // Braces among a call's arguments, and a member's braces in a constructor's initialiser list; the
  // body's brace follows ')' or '}'.
  if (std::count(head.begin(), head.end(), '(') != std::count(head.begin(), head.end(), ')')) {
    return Scope::initializer;
  }
  if (head.find(") : ") != std::string::npos && is_identifier(head.back())) {
    return Scope::initializer;
  }
  for (const char* word : {"class", "struct", "union", "enum"}) {
    if (has_word(head, word) && !has_call) return Scope::type;
  }
  if (has_call && head.find(" = ") == std::string::npos) return Scope::function;
  if (has_call && has_word(head, "operator")) return Scope::function;
  return has_call && head.find(" = ") > head.find('(') ? Scope::function : Scope::initializer;
}

// Follows the braces; letters come one by one with their line.
class Outliner {
 public:
  void take(char letter, int line) {
    if (letter == '{') {
      open(line);
    } else if (letter == '}') {
      close(line);
    } else if (in(Scope::initializer)) {
      return;
    } else if (letter == ';') {
      if (in_namespace()) result_.statements.push_back({trimmed(head_), head_line_});
      head_.clear();
    } else {
      if (trimmed(head_).empty()) head_line_ = line;
      head_ += letter;
    }
  }
  Outline take_result() { return std::move(result_); }

 private:
  bool in(Scope scope) const { return !scopes_.empty() && scopes_.back() == scope; }
  bool in_namespace() const { return scopes_.empty() || in(Scope::name_space); }

  void open(int line) {
    const bool nested = in(Scope::function) || in(Scope::initializer);
    const Scope scope = nested ? scopes_.back() : classify(trimmed(head_));
    if (!nested && scope == Scope::function) {
      result_.functions.push_back({trimmed(head_), line, 0});
      function_depth_ = scopes_.size();
    }
    scopes_.push_back(scope);
    if (scope != Scope::initializer) head_.clear();  // an initialiser belongs to its statement
  }

  void close(int line) {
    if (scopes_.empty()) return;
    const Scope scope = scopes_.back();
    scopes_.pop_back();
    if (scope == Scope::function && scopes_.size() == function_depth_) {
      result_.functions.back().end_line = line;
    }
    if (scope != Scope::initializer) {
      head_.clear();
    } else if (!in(Scope::initializer)) {
      head_ += "{}";
    }
  }

  Outline result_;
  std::vector<Scope> scopes_;
  std::string head_;
  int head_line_ = 0;
  size_t function_depth_ = 0;
};

}  // namespace

bool is_identifier(char letter) {
  return std::isalnum(static_cast<unsigned char>(letter)) != 0 || letter == '_';
}

size_t find_word(const std::string& line, const std::string& word, size_t start) {
  for (size_t at = line.find(word, start); at != std::string::npos; at = line.find(word, at + 1)) {
    const size_t end = at + word.size();
    const bool clean_start = at == 0 || !is_identifier(line[at - 1]) || !is_identifier(word[0]);
    const bool clean_end =
        end >= line.size() || !is_identifier(line[end]) || !is_identifier(word.back());
    if (clean_start && clean_end) return at;
  }
  return std::string::npos;
}

bool has_word(const std::string& line, const std::string& word) {
  return find_word(line, word) != std::string::npos;
}

bool starts_with(const std::string& text, const std::string& prefix) {
  return text.compare(0, prefix.size(), prefix) == 0;
}

bool ends_with(const std::string& text, const std::string& suffix) {
  return text.size() >= suffix.size() &&
         text.compare(text.size() - suffix.size(), suffix.size(), suffix) == 0;
}

SourceFile make_source(const std::string& path, const std::string& text) {
  return {path, split_lines(text), split_lines(Blanker(text).run())};
}

Outline outline(const SourceFile& source) {
  Outliner outliner;
  bool preprocessor = false;
  for (size_t index = 0; index < source.code.size(); ++index) {
    const std::string& line = source.code[index];
    const size_t first = line.find_first_not_of(" \t");
    preprocessor = preprocessor || (first != std::string::npos && line[first] == '#');
    if (preprocessor) {
      preprocessor = ends_with(line, "\\");
      continue;
    }
    for (const char letter : line) outliner.take(letter, static_cast<int>(index) + 1);
    outliner.take(' ', static_cast<int>(index) + 1);
  }
  return outliner.take_result();
}

}  // namespace tidy
