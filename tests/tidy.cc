// tidy: the house style as a test. Prints `file:line: rule: do this instead`; exit 1 on findings.
//
// It reads every source file and document of the tree that git would track: lengths, the include
// table, banned words with their replacement, op companions, files that no CMake target compiles,
// and whether the paths and commands of AGENTS.md and README.md are real. Before that it proves on
// samples (tidy_samples.h) that each rule can fail. A line is exempt from a rule when it says
// `tidy: allow RULE: reason`; the number of exemptions is printed.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "tests/tidy_documents.h"
#include "tests/tidy_samples.h"
#include "tests/tidy_scan.h"
#include "tests/tree.h"

namespace tidy {
namespace {

constexpr int kLineLimit = 100;
constexpr int kHostFunctionLimit = 70;
constexpr int kDeviceFunctionLimit = 150;
constexpr int kFileLimit = 600;

// Folders of the code proper; a rule names those that it covers.
enum Area : unsigned {
  kSrc = 1,
  kKernels = 2,
  kReference = 4,
  kSim = 8,
  kTests = 16,
  kBench = 32,
  kCli = 64,  // src/cli; not part of kSrc
  kCore = kSrc | kKernels | kReference | kSim,
  kAll = kCore | kCli | kTests | kBench,
};

struct BannedWord {
  const char* word;
  const char* rule;
  const char* instead;
  unsigned areas;
};

constexpr const char* kFmath = "src/base/fmath.h: libm differs between machines (D1)";
constexpr const char* kPhilox = "a named Philox stream: one root seed, same bits";

// Words followed by '(' here match calls only. Scanned in code, without comments and literals.
constexpr BannedWord kBannedWords[] = {
    {"std::function", "std-function", "a template parameter or a function pointer", kCore | kCli},
    {"thread_local", "thread-local", "pass the object explicitly", kAll},
    {"getenv", "environment", "read it in src/cli/main.cc and pass the value", kCore | kCli},
    {"std::rand", "random", kPhilox, kAll},
    {"std::mt19937", "random", kPhilox, kCore | kCli},
    {"std::random_device", "random", kPhilox, kCore | kCli},
    {"std::async", "threads", "Workers::parallel_for (src/base/workers.h)", kCore | kCli},
    {"std::cout", "iostream", "fmt::print to stdout, from src/cli only", kCore | kCli},
    {"std::cerr", "iostream", "fmt::print to stderr, from src/cli or Progress", kCore | kCli},
    {"expf(", "libm", kFmath, kCore},
    {"exp2f(", "libm", kFmath, kCore},
    {"logf(", "libm", kFmath, kCore},
    {"log2f(", "libm", kFmath, kCore},
    {"log1pf(", "libm", kFmath, kCore},
    {"sinf(", "libm", kFmath, kCore},
    {"cosf(", "libm", kFmath, kCore},
    {"tanhf(", "libm", kFmath, kCore},
    {"powf(", "libm", kFmath, kCore},
    {"std::exp(", "libm", kFmath, kCore},
    {"std::exp2(", "libm", kFmath, kCore},
    {"std::log(", "libm", kFmath, kCore},
    {"std::log2(", "libm", kFmath, kCore},
    {"std::log10(", "libm", kFmath, kCore},
    {"std::log1p(", "libm", kFmath, kCore},
    {"std::expm1(", "libm", kFmath, kCore},
    {"std::sin(", "libm", kFmath, kCore},
    {"std::cos(", "libm", kFmath, kCore},
    {"std::tan(", "libm", kFmath, kCore},
    {"std::tanh(", "libm", kFmath, kCore},
    {"std::pow(", "libm", kFmath, kCore},
    {"std::erf(", "libm", kFmath, kCore},
    {"__expf(", "libm", "the accurate function: fast intrinsics differ from the reference", kAll},
    {"atomicAdd(", "float-atomics", "a fixed-order reduction (D1)", kKernels},
};

// Scanned in the raw line: words that belong in an issue, or that tell history.
constexpr BannedWord kBannedProse[] = {
    {"TODO", "unfinished", "finish it, or say in an issue what is missing", kAll},
    {"FIXME", "unfinished", "finish it, or say in an issue what is missing", kAll},
    {"XXX", "unfinished", "finish it, or say in an issue what is missing", kAll},
    {"previously", "history", "say what is, in the present tense", kAll},
    {"NOLINTNEXTLINE", "nolint", "mend the code", kAll},
};

// Headers that cost seconds for every file that sees them.
constexpr const char* kHeavyHeaders[] = {
    "nlohmann/json.hpp", "CLI/CLI.hpp",  "CLI11.hpp", "toml++/toml.h",
    "toml++/toml.hpp",   "toml.hpp",     "Eigen/",    "hdf5.h",
    "<regex>",           "fmt/ranges.h", "spdlog/",   "<iostream>",
};

// The include table: what a file under `folder` may include of ours. First match rules.
struct IncludeRule {
  const char* folder;
  std::vector<std::string> may;
};

const std::vector<IncludeRule>& include_table() {
  static const std::vector<IncludeRule> table = {
      {"src/base/", {"src/base/"}},
      {"kernels/", {"kernels/", "src/base/"}},
      {"reference/", {"reference/", "kernels/", "src/base/"}},
      {"src/cli/launch.cc", {"src/", "kernels/", "sim/"}},
      {"src/cli/", {"src/", "kernels/"}},
      // model.path names a Hugging Face directory: the parser asks its reader for the dimensions.
      {"src/config/load.cc",
       {"src/config/", "src/base/", "kernels/", "src/checkpoint/hf_config.h"}},
      // Rules between keys ask the pipeline schedules what they need: host arithmetic.
      {"src/config/derive.cc", {"src/config/", "src/base/", "kernels/", "src/parallel/schedule.h"}},
      {"src/config/", {"src/config/", "src/base/", "kernels/"}},
      {"src/",
       {"src/base/", "src/config/", "src/comm/", "src/model/", "src/parallel/", "src/optim/",
        "src/data/", "src/checkpoint/", "src/train/", "kernels/"}},
      {"sim/", {"sim/", "src/", "kernels/"}},
      {"tests/", {""}},
      {"bench/", {""}},
      {"ate_bench/", {""}},
  };
  return table;
}

unsigned area_of(const std::string& path) {
  if (starts_with(path, "src/cli/")) return kCli;
  if (starts_with(path, "src/")) return kSrc;
  if (starts_with(path, "kernels/")) return kKernels;
  if (starts_with(path, "reference/")) return kReference;
  if (starts_with(path, "sim/")) return kSim;
  if (starts_with(path, "tests/tidy")) return 0;  // this checker names the words that it bans
  if (starts_with(path, "tests/")) return kTests;
  return kBench;
}

bool is_header(const std::string& path) { return ends_with(path, ".h"); }

// --- Rules over one file ---

void check_lengths(const SourceFile& source, Findings& findings) {
  for (size_t index = 0; index < source.lines.size(); ++index) {
    // Columns, not bytes: UTF-8 continuation bytes do not count.
    const std::string& line = source.lines[index];
    const auto columns = std::count_if(line.begin(), line.end(), [](char letter) {
      return (static_cast<unsigned char>(letter) & 0xC0) != 0x80;
    });
    if (columns > kLineLimit) {
      findings.add(source, index + 1, "line-length",
                   "break the line: " + std::to_string(columns) + " columns, at most 100");
    }
  }
  if (source.lines.size() > kFileLimit) {
    findings.add(
        source, 1, "file-length",
        "split by purpose: " + std::to_string(source.lines.size()) + " lines, at most 600");
  }
  for (const FunctionBody& body : outline(source).functions) {
    const int length = body.end_line - body.line + 1;
    const bool device = has_word(body.head, "__global__");
    const int limit = device ? kDeviceFunctionLimit : kHostFunctionLimit;
    if (length > limit) {
      findings.add(source, body.line, "function-length",
                   "cut it into named phases: " + std::to_string(length) + " lines, at most " +
                       std::to_string(limit));
    }
  }
}

// A file begins with its purpose, or with the header of its own name, which holds the purpose.
void check_head(const SourceFile& source, Findings& findings) {
  const std::string first = source.lines.empty() ? "" : source.lines[0];
  std::string stem = std::filesystem::path(source.path).stem();
  if (starts_with(stem, "shared_")) stem = stem.substr(7);
  const bool own_header =
      starts_with(first, "#include \"") && ends_with(first, "/" + stem + ".h\"");
  if (!starts_with(first, "//") && !own_header) {
    findings.add(source, 1, "purpose", "begin the file with a comment: what it is and why");
  }
  if (!is_header(source.path)) return;
  const bool once =
      std::find(source.lines.begin(), source.lines.end(), "#pragma once") != source.lines.end();
  if (!once) findings.add(source, 1, "pragma-once", "add `#pragma once` below the head comment");
}

void check_words(const SourceFile& source, Findings& findings) {
  const unsigned area = area_of(source.path);
  for (size_t index = 0; index < source.lines.size(); ++index) {
    for (const BannedWord& banned : kBannedWords) {
      if ((banned.areas & area) == 0 || !has_word(source.code[index], banned.word)) continue;
      if (source.path == "src/cli/main.cc" && std::string(banned.rule) == "environment") continue;
      // Device functions are CUDA's own, the same on every machine with the toolkit.
      const bool is_device = ends_with(source.path, ".cu") || ends_with(source.path, ".cuh");
      if (is_device && std::string(banned.rule) == "libm") continue;
      findings.add(source, index + 1, banned.rule,
                   std::string("not ") + banned.word + " but " + banned.instead);
    }
    for (const BannedWord& banned : kBannedProse) {
      if ((banned.areas & area) == 0 || !has_word(source.lines[index], banned.word)) continue;
      findings.add(source, index + 1, banned.rule, banned.instead);
    }
  }
}

void check_preprocessor(const SourceFile& source, Findings& findings) {
  for (size_t index = 0; index < source.code.size(); ++index) {
    const std::string& line = source.code[index];
    if (starts_with(line, "#define ")) {
      const std::string name = line.substr(8, line.find_first_of(" (", 8) - 8);
      if (!starts_with(name, "CHECK") && name != "CAMBIUM_CHECK_OP") {
        findings.add(source, index + 1, "macro", "a constexpr, a template or a function");
      }
    }
    const bool conditional = starts_with(line, "#if");
    if (conditional && (area_of(source.path) & (kSrc | kSim | kReference)) != 0 &&
        line.find("CAMBIUM_HAS_SENTENCEPIECE") == std::string::npos &&
        line.find("__SANITIZE_") == std::string::npos &&
        line.find("__CUDACC__") == std::string::npos) {  // nvcc reads base headers too
      findings.add(source, index + 1, "ifdef", "`if constexpr (kHasCuda)`, or a file of its own");
    }
  }
}

// `bool name` as a parameter of a function: between '(' or ',' and ',' or ')'.
void check_bool_parameters(const SourceFile& source, Findings& findings) {
  if ((area_of(source.path) & (kCore | kCli)) == 0) return;  // tests write their cases as they like
  for (size_t index = 0; index < source.code.size(); ++index) {
    const std::string& line = source.code[index];
    for (size_t at = find_word(line, "bool"); at != std::string::npos;
         at = find_word(line, "bool", at + 1)) {
      size_t before = line.find_last_not_of(' ', at == 0 ? 0 : at - 1);
      if (before != std::string::npos && at >= 6 && line.compare(at - 6, 6, "const ") == 0) {
        before = line.find_last_not_of(' ', at - 7);
      }
      // At a line's start the parameter list began above; a declaration ends in ';' instead.
      const bool starts_line = line.find_first_not_of(' ') == at;
      size_t end = at + 4;
      while (end < line.size() && (line[end] == ' ' || is_identifier(line[end]))) ++end;
      const bool named = end > at + 5 && end < line.size();
      const bool closes = named && (line[end] == ',' || line[end] == ')');
      const bool opens = before != std::string::npos && !starts_line && before < at &&
                         (line[before] == '(' || line[before] == ',');
      const bool in_angle = line.rfind('<', at) != std::string::npos &&
                            line.find('>', at) != std::string::npos && line[before] == ',';
      if (closes && (opens || starts_line) && !in_angle) {
        findings.add(source, index + 1, "bool-parameter",
                     "an `enum class` that says what is meant");
      }
    }
  }
}

// Variables at namespace scope or `static` in a function that something can change.
void check_globals(const SourceFile& source, Findings& findings) {
  if ((area_of(source.path) & (kCore | kCli)) == 0) return;
  const Outline parts = outline(source);
  for (const NamespaceStatement& statement : parts.statements) {
    const std::string& text = statement.text;
    const bool constant = has_word(text, "constexpr") || has_word(text, "const") ||
                          text.find("const*") != std::string::npos;
    bool other = text.empty() || !(text.find(' ') < text.size());
    for (const char* word : {"using", "typedef", "template", "extern", "friend", "static_assert",
                             "namespace", "class", "struct", "enum", "operator", "concept"}) {
      other = other || has_word(text, word);
    }
    const size_t call = text.find('(');
    const bool function = call != std::string::npos && call < text.find(" = ");
    if (!constant && !other && !function) {
      findings.add(source, statement.line, "global", "a const, or a member passed explicitly");
    }
  }
  for (const FunctionBody& body : parts.functions) {
    for (int line = body.line; line <= body.end_line; ++line) {
      const std::string& code = source.code[static_cast<size_t>(line) - 1];
      const size_t at = find_word(code, "static");
      if (at == std::string::npos || code.find_first_not_of(' ') != at) continue;
      if (has_word(code, "const") || has_word(code, "constexpr")) continue;
      const size_t mark = code.find_first_of("(={;", at);
      if (mark != std::string::npos && code[mark] == '(') continue;  // a member function
      findings.add(source, line, "global", "a const, or a member passed explicitly");
    }
  }
}

void check_includes(const SourceFile& source, Findings& findings) {
  const IncludeRule* rule = nullptr;
  for (const IncludeRule& row : include_table()) {
    if (rule == nullptr && starts_with(source.path, row.folder)) rule = &row;
  }
  for (size_t index = 0; index < source.lines.size(); ++index) {
    const std::string& line = source.lines[index];
    if (!starts_with(line, "#include ")) continue;
    const bool ours = [&] {
      for (const char* folder :
           {"src/", "kernels/", "reference/", "sim/", "tests/", "bench/", "ate_bench/"}) {
        if (starts_with(line, std::string("#include \"") + folder)) return true;
      }
      return false;
    }();
    if (ours && rule != nullptr) {
      const std::string target = line.substr(10);
      const bool allowed = std::any_of(rule->may.begin(), rule->may.end(), [&](const auto& folder) {
        return starts_with(target, folder);
      });
      if (!allowed) {
        findings.add(
            source, index + 1, "include-table",
            std::string(rule->folder) + " knows less: move the code, or pass the value in");
      }
    }
    if (!is_header(source.path) || (area_of(source.path) & (kCore | kCli)) == 0) continue;
    for (const char* heavy : kHeavyHeaders) {
      if (line.find(heavy) != std::string::npos) {
        findings.add(source, index + 1, "heavy-header", "include it in the .cc alone");
      }
    }
  }
}

// Race detection, and copies to a device, see what an op's visit_views names, and nothing else.
void check_declared_views(const SourceFile& source, Findings& findings) {
  if (!starts_with(source.path, "kernels/") || !ends_with(source.path, ".h")) return;
  if (starts_with(source.path, "kernels/shared_")) return;  // parts of ops, which declare
  std::map<std::string, std::map<std::string, int>> views;  // by args struct: member and line
  std::string args, visited;
  for (int number = 1; number <= static_cast<int>(source.code.size()); ++number) {
    const std::string& line = source.code[static_cast<size_t>(number - 1)];
    if (starts_with(line, "struct ")) args = line.substr(7, line.find(' ', 7) - 7);
    if (starts_with(line, "}")) args = visited = "";
    const bool is_view =
        starts_with(line, "  In<") || starts_with(line, "  Out<") || starts_with(line, "  InOut<");
    if (ends_with(args, "Args") && is_view) {
      const size_t begin = line.find("> ") + 2;
      views[args][line.substr(begin, line.find_first_of("; ={", begin) - begin)] = number;
    }
    const std::string head = "void visit_views(const ";
    if (starts_with(line, head)) visited = line.substr(head.size(), line.find('&') - head.size());
    if (visited.empty()) continue;
    std::erase_if(views[visited], [&](const auto& view) { return has_word(line, view.first); });
  }
  for (const auto& [op, members] : views) {
    for (const auto& [name, number] : members) {
      findings.add(source, number, "undeclared-view", "visit '" + name + "' in its visit_views");
    }
  }
}

void check_file(const SourceFile& source, Findings& findings) {
  check_lengths(source, findings);
  check_head(source, findings);
  check_words(source, findings);
  check_preprocessor(source, findings);
  check_bool_parameters(source, findings);
  check_globals(source, findings);
  check_includes(source, findings);
  check_declared_views(source, findings);
}

// --- Rules over the tree ---

bool is_source(const std::string& path) {
  for (const char* ending : {".cc", ".h", ".cu", ".c", ".cuh"}) {
    if (ends_with(path, ending)) return true;
  }
  return false;
}

// Every kernels/<op>.h that declares a reference implementation is listed in kernels/ops.cmake
// (whose cambium_op() refuses to configure without the companions), and so is every .cu.
void check_ops(const std::vector<SourceFile>& sources, const std::string& ops_cmake,
               Findings& findings) {
  for (const SourceFile& source : sources) {
    if (!starts_with(source.path, "kernels/")) continue;
    const std::string name = std::filesystem::path(source.path).stem();
    const bool declares = std::any_of(source.code.begin(), source.code.end(), [](const auto& line) {
      return line.find("namespace reference") != std::string::npos;
    });
    if ((!declares && !ends_with(source.path, ".cu")) || starts_with(name, "shared_")) continue;
    if (ops_cmake.find("cambium_op(" + name + ")") == std::string::npos &&
        ops_cmake.find("cambium_op(" + name + " ") == std::string::npos) {
      findings.add(source, 1, "op-companions",
                   "add `cambium_op(" + name + ")` to kernels/ops.cmake, with its companions");
    }
  }
}

// `compile_commands` is CMake's own list of what it compiles.
void check_compiled(const std::vector<SourceFile>& sources, const std::string& compile_commands,
                    Findings& findings) {
  for (const SourceFile& source : sources) {
    if (!ends_with(source.path, ".cc") && !ends_with(source.path, ".c")) continue;
    if (compile_commands.find("/" + source.path + "\"") == std::string::npos) {
      findings.add(source, 1, "not-compiled", "move it where a CMake glob finds it, or delete it");
    }
  }
}

void print_sizes(const std::vector<SourceFile>& sources) {
  std::map<std::string, size_t> lines_of;
  size_t core = 0;
  for (const SourceFile& source : sources) {
    const std::string folder = source.path.substr(0, source.path.find('/'));
    lines_of[folder] += source.lines.size();
    if ((area_of(source.path) & (kCore | kCli)) != 0) core += source.lines.size();
  }
  std::printf("tidy: %zu files, core %zu lines (", sources.size(), core);
  const char* separator = "";
  for (const auto& [folder, lines] : lines_of) {
    std::printf("%s%s %zu", separator, folder.c_str(), lines);
    separator = ", ";
  }
  std::printf(")\n");
}

std::vector<SourceFile> read_tree(const std::filesystem::path& root) {
  std::vector<SourceFile> sources;
  for (const char* folder : {"src", "kernels", "reference", "sim", "tests", "bench", "ate_bench"}) {
    if (!std::filesystem::exists(root / folder)) continue;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(root / folder)) {
      const std::string path = std::filesystem::relative(entry.path(), root).generic_string();
      if (entry.is_regular_file() && is_source(path)) {
        sources.push_back(make_source(path, read_text(entry.path())));
      }
    }
  }
  std::sort(sources.begin(), sources.end(),
            [](const SourceFile& a, const SourceFile& b) { return a.path < b.path; });
  return sources;
}

// Each sample must break exactly the rule that it names; the clean ones break none.
bool self_test() {
  bool good = true;
  for (const Sample& sample : kSamples) {
    const SourceFile source = make_source(sample.path, sample_text(sample));
    Findings findings;
    check_file(source, findings);
    const std::set<std::string> rules = findings.rules();
    const std::set<std::string> want =
        *sample.rule == '\0' ? std::set<std::string>{} : std::set<std::string>{sample.rule};
    if (rules == want) continue;
    good = false;
    std::printf("tidy: self-test: sample for '%s' in %s gave:", sample.rule, sample.path);
    for (const std::string& rule : rules) std::printf(" %s", rule.c_str());
    std::printf("\n%s\n", sample_text(sample).c_str());
  }
  Findings findings;
  check_ops({make_source("kernels/lost.h", "namespace reference {\n}\n")}, "cambium_op(kept)\n",
            findings);
  check_compiled({make_source("src/lost.cc", "")}, "\"/r/src/kept.cc\"", findings);
  const std::set<std::string> want = {"op-companions", "not-compiled"};
  if (findings.rules() != want) good = false;
  return documents_self_test() && good;
}

int run(const std::filesystem::path& root) {
  if (!self_test()) {
    std::printf("tidy: the self-test fails: a rule that cannot fail checks nothing\n");
    return 3;
  }
  const std::vector<SourceFile> sources = read_tree(root);
  Findings findings;
  for (const SourceFile& source : sources) check_file(source, findings);
  check_ops(sources, read_text(root / "kernels/ops.cmake"), findings);
  check_compiled(sources,
                 read_text(std::string(cambium::build_directory()) + "/compile_commands.json"),
                 findings);
  print_sizes(sources);
  check_documents(root, findings);
  findings.print();
  return findings.count() == 0 ? 0 : 1;
}

}  // namespace
}  // namespace tidy

int main(int count, char** values) {
  return tidy::run(count > 1 ? values[1] : cambium::source_directory());
}
