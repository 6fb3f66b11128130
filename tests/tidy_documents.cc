// Paths and commands of the documents (tidy_documents.h).
#include "tests/tidy_documents.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <fstream>
#include <map>
#include <sstream>

#include "tests/tree.h"

namespace tidy {
namespace fs = std::filesystem;
namespace {

constexpr size_t kAgentsLimit = 150;

// Folders that commands make; what lies in them need not exist in a clean tree.
constexpr const char* kGenerated[] = {"build/", "runs/", "data/", "run/", "/"};

enum class Running { on, off };

// What the rules need from the tree, so that the self-test can give another one.
struct Surroundings {
  fs::path root;
  Running running = Running::on;
  std::map<std::string, std::string> help;  // subcommand -> text of --help, filled on demand
};

std::vector<std::string> words_of(const std::string& command) {
  std::istringstream stream(command);
  std::vector<std::string> words;
  for (std::string word; stream >> word;) words.push_back(word);
  return words;
}

struct CommandResult {
  int status = 0;
  std::string output;
};

CommandResult run_command(const fs::path& root, const std::string& command) {
  const std::string line =
      "cd '" + root.string() + "' && timeout 30 sh -c '" + command + "' </dev/null 2>&1";
  std::FILE* pipe = popen(line.c_str(), "r");
  if (pipe == nullptr) return {127, "popen fails"};
  CommandResult result;
  std::array<char, 4096> buffer{};
  for (size_t got = 0; (got = std::fread(buffer.data(), 1, buffer.size(), pipe)) > 0;) {
    result.output.append(buffer.data(), got);
  }
  result.status = pclose(pipe);
  return result;
}

bool is_generated(const std::string& path) {
  return std::any_of(std::begin(kGenerated), std::end(kGenerated),
                     [&](const char* folder) { return starts_with(path, folder); });
}

// A word in back quotes that names a file of the tree: it has a slash or a known ending, and no
// character of a placeholder or of code.
bool looks_like_path(const std::string& word) {
  if (word.empty() || word.find_first_of(" ()=:;,\"'$&|!?%+~@#[]\\") != std::string::npos) {
    return false;
  }
  if (starts_with(word, "-") || starts_with(word, "../")) return false;
  const bool placeholder = word.find_first_of("<>{}") != std::string::npos;
  if (placeholder) return false;
  if (word.find('/') != std::string::npos) {
    const std::string first = word.substr(0, word.find('/'));
    // A capital word such as RUN stands for the reader's own directory.
    return std::any_of(first.begin(), first.end(), [](char c) { return c < 'A' || c > 'Z'; });
  }
  for (const char* ending : {".cc", ".h", ".cu", ".sh", ".toml", ".cmake", ".md"}) {
    if (ends_with(word, ending) && word != ending) return word[0] < 'A' || word[0] > 'Z';
  }
  return false;
}

// `path` may hold `*` inside its last component; NAME stands for any.
bool path_exists(const fs::path& root, std::string path) {
  const size_t name = path.find("NAME");
  if (name != std::string::npos) path.replace(name, 4, "*");
  const size_t star = path.find('*');
  if (star == std::string::npos) return fs::exists(root / path);
  const fs::path folder = root / fs::path(path).parent_path();
  const std::string pattern = fs::path(path).filename();
  const std::string before = pattern.substr(0, pattern.find('*'));
  const std::string after = pattern.substr(pattern.rfind('*') + 1);
  if (!fs::is_directory(folder)) return false;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename();
    if (starts_with(name, before) && ends_with(name, after)) return true;
  }
  return false;
}

void check_quoted_paths(const SourceFile& document, const Surroundings& around,
                        Findings& findings) {
  for (size_t index = 0; index < document.lines.size(); ++index) {
    const std::string& line = document.lines[index];
    if (starts_with(line, "```")) continue;
    for (size_t open = line.find('`'); open != std::string::npos; open = line.find('`', open + 1)) {
      const size_t close = line.find('`', open + 1);
      if (close == std::string::npos) break;
      const std::string word = line.substr(open + 1, close - open - 1);
      open = close;
      if (!looks_like_path(word) || is_generated(word)) continue;
      if (!path_exists(around.root, word)) {
        findings.add(document, index + 1, "missing-path", "name a file that exists: " + word);
      }
    }
  }
}

const std::string& help_of(const std::string& subcommand, Surroundings& around) {
  std::string& text = around.help[subcommand];
  if (text.empty()) {
    text = run_command(around.root,
                       std::string(cambium::cambium_binary()) + " " + subcommand + " --help")
               .output;
  }
  return text;
}

// A word of a command line that names an input of the tree.
void check_argument_path(const SourceFile& document, size_t line, const std::string& word,
                         const Surroundings& around, Findings& findings) {
  const bool known = starts_with(word, "configs/") || starts_with(word, "scripts/") ||
                     starts_with(word, "tests/") || starts_with(word, "bench/");
  if (known && looks_like_path(word) && !path_exists(around.root, word)) {
    findings.add(document, line, "missing-path", "name a file that exists: " + word);
  }
}

void check_cambium(const SourceFile& document, size_t line, const std::vector<std::string>& words,
                   Surroundings& around, Findings& findings) {
  if (around.running == Running::off || words.size() < 2) return;
  std::string subcommand = words[1];
  const bool nested = words.size() > 2 && (subcommand == "data" || subcommand == "tokenizer" ||
                                           subcommand == "checkpoint" || subcommand == "config");
  if (nested) subcommand += " " + words[2];
  const std::string& help = help_of(subcommand, around);
  if (help.find("xample") == std::string::npos) {
    findings.add(document, line, "dead-command", "cambium has no working '" + subcommand + "'");
    return;
  }
  for (const std::string& word : words) {
    const std::string flag = word.substr(0, word.find('='));
    if (starts_with(flag, "--") && find_word(help, flag) == std::string::npos) {
      findings.add(document, line, "dead-flag", "cambium " + subcommand + " has no " + flag);
    }
  }
}

// Checks one command without running it: its script or tool, presets, subcommand, flags, inputs.
void check_command(const SourceFile& document, size_t line, const std::string& command,
                   Surroundings& around, Findings& findings) {
  std::vector<std::string> words = words_of(command);
  while (!words.empty() && words[0].find('=') != std::string::npos) words.erase(words.begin());
  if (!words.empty() && words[0] == "bash") words.erase(words.begin());
  if (words.empty()) return;
  const std::string& tool = words[0];
  for (const std::string& word : words) {
    check_argument_path(document, line, word, around, findings);
  }
  if (starts_with(tool, "scripts/") || starts_with(tool, ".ci/")) {
    const std::string text = read_text(around.root / tool);
    for (const std::string& word : words) {
      if (starts_with(word, "--") && text.find(word) == std::string::npos) {
        findings.add(document, line, "dead-flag", tool + " has no " + word);
      }
    }
  } else if (tool == "cmake" || tool == "ctest") {
    const std::string presets = read_text(around.root / "CMakePresets.json");
    for (size_t index = 0; index + 1 < words.size(); ++index) {
      if (words[index] == "--preset" && words[index + 1] != "PRESET" &&
          presets.find("\"name\": \"" + words[index + 1] + "\"") == std::string::npos) {
        findings.add(document, line, "dead-flag", "no preset " + words[index + 1]);
      }
    }
  } else if (ends_with(tool, "/cambium") || tool == "cambium") {
    check_cambium(document, line, words, around, findings);
  }
}

void run_marked(const SourceFile& document, size_t line, const std::string& command,
                Surroundings& around, Findings& findings) {
  std::string real = command;
  const std::string name = "build/cpu/cambium";
  if (starts_with(real, name + " ")) real.replace(0, name.size(), cambium::cambium_binary());
  const CommandResult result = run_command(around.root, real);
  if (result.status != 0) {
    const size_t tail = result.output.size() > 300 ? result.output.size() - 300 : 0;
    findings.add(document, line, "broken-command",
                 "mend it: '" + command + "' fails: " + result.output.substr(tail));
  }
}

void check_commands(const SourceFile& document, Surroundings& around, Findings& findings) {
  bool in_block = false;
  bool run_next = false;
  bool run_block = false;
  for (size_t index = 0; index < document.lines.size(); ++index) {
    const std::string& line = document.lines[index];
    if (line == "<!-- run -->") {
      run_next = true;
    } else if (starts_with(line, "```")) {
      in_block = !in_block && starts_with(line, "```sh");
      run_block = in_block && run_next;
      run_next = run_next && !in_block;
    } else if (in_block && !line.empty() && line[0] != '#') {
      const std::string command = line.substr(0, line.find("  #"));
      check_command(document, index + 1, command, around, findings);
      if (run_block && around.running == Running::on) {
        run_marked(document, index + 1, command, around, findings);
      }
    }
  }
}

void check_document(const SourceFile& document, Surroundings& around, Findings& findings) {
  if (document.path == "AGENTS.md" && document.lines.size() > kAgentsLimit) {
    findings.add(document, kAgentsLimit + 1, "agents-length", "shorten it to 150 lines");
  }
  check_quoted_paths(document, around, findings);
  check_commands(document, around, findings);
}

// A skill says what it needs, what to do, and ends in commands that pass or fail, which are run.
void check_skill(const SourceFile& document, const std::string& name, Findings& findings) {
  constexpr const char* kParts[] = {"## Prerequisites", "## Steps", "## PASS or FAIL",
                                    "<!-- run -->", "description: "};
  const auto has = [&](const std::string& part) {
    return std::any_of(document.lines.begin(), document.lines.end(),
                       [&](const std::string& line) { return starts_with(line, part); });
  };
  for (const char* part : kParts) {
    if (!has(part))
      findings.add(document, 1, "skill-part", std::string("add a line '") + part + "'");
  }
  if (!has("name: " + name)) findings.add(document, 1, "skill-part", "name it as its folder");
}

void check_skills(Surroundings& around, Findings& findings) {
  const fs::path folder = around.root / ".agents/skills";
  if (!fs::is_directory(folder)) return;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename();
    const SourceFile document =
        make_source(".agents/skills/" + name + "/SKILL.md", read_text(entry.path() / "SKILL.md"));
    check_skill(document, name, findings);
    check_document(document, around, findings);
  }
}

}  // namespace

void Findings::add(const SourceFile& source, size_t line, const std::string& rule,
                   const std::string& instead) {
  if (line >= 1 && line <= source.lines.size()) {
    const std::string& text = source.lines[line - 1];
    const std::string mark = "tidy: allow " + rule + ": ";
    const size_t at = text.find(mark);
    if (at != std::string::npos && at + mark.size() + 4 < text.size()) {
      ++exempt_;
      return;
    }
  }
  found_.push_back({source.path, line, rule, instead});
}

void Findings::print() const {
  for (const Finding& finding : found_) {
    std::printf("%s:%zu: %s: %s\n", finding.path.c_str(), finding.line, finding.rule.c_str(),
                finding.instead.c_str());
  }
  std::printf("tidy: %zu findings, %zu lines exempt with a reason\n", found_.size(), exempt_);
}

std::set<std::string> Findings::rules() const {
  std::set<std::string> rules;
  for (const Finding& finding : found_) rules.insert(finding.rule);
  return rules;
}

std::string read_text(const fs::path& path) {
  std::ifstream stream(path, std::ios::binary);
  std::ostringstream text;
  text << stream.rdbuf();
  return text.str();
}

void check_documents(const fs::path& root, Findings& findings) {
  Surroundings around{root, Running::on, {}};
  for (const char* name : {"AGENTS.md", "README.md", "CONTRIBUTING.md"}) {
    if (!fs::exists(root / name)) continue;
    check_document(make_source(name, read_text(root / name)), around, findings);
  }
  check_skills(around, findings);
}

bool documents_self_test() {
  Surroundings around{fs::path(cambium::source_directory()), Running::off, {}};
  const auto rules_of = [&](const std::string& text) {
    Findings findings;
    check_document(make_source("AGENTS.md", text), around, findings);
    return findings.rules();
  };
  const auto only = [](const char* rule) { return std::set<std::string>{rule}; };
  bool good = rules_of("See `src/no_such_file.cc`.\n") == only("missing-path");
  good = good && rules_of("`src/base/no_such*.h`\n") == only("missing-path");
  good = good && rules_of("`src/base/NAME.py`\n") == only("missing-path");
  good = good && rules_of("```sh\ncmake --preset no_such\n```\n") == only("dead-flag");
  good = good && rules_of("```sh\nscripts/test.sh --no-such\n```\n") == only("dead-flag");
  good = good && rules_of("```sh\nscripts/no_such.sh\n```\n") == only("missing-path");
  good = good && rules_of(std::string(151, '\n')) == only("agents-length");
  good = good && rules_of("`src/base/error.h` `src/base/*.h` `RUN/x.json` `a = b/c`\n").empty();
  Findings skill;
  check_skill(make_source("SKILL.md", "name: other\n## Steps\n"), "mine", skill);
  good = good && skill.rules() == only("skill-part");
  good = good && run_command(around.root, "exit 3").status != 0;
  good = good && run_command(around.root, "true").status == 0;
  if (!good) std::printf("tidy: self-test of the documents fails\n");
  return good;
}

}  // namespace tidy
