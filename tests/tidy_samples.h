// Must-fail samples of tests/tidy.cc: one or more for every rule over one file, and clean ones.
#pragma once

#include <string>

namespace tidy {

struct Sample {
  const char* rule;  // the one rule it breaks; empty = clean
  const char* path;
  const char* text;      // below the head comment that sample_text() puts first
  int repeat_lines = 0;  // that many ` x();` lines replace "@"
};

inline constexpr Sample kSamples[] = {
    {"", "src/model/a.cc", "int add(int a, int b) {\n  return a + b;\n}\n"},
    {"", "src/model/a.cc",
     "// Text with expf( and thread_local and 'quote\nconst int kOne = 1'000;\n"},
    {"", "src/model/a.cc", "const char* kText = \"static int x; getenv( \";\n"},
    {"", "src/model/a.cc", "const char* kText = R\"(std::exp( \" thread_local)\";\nint f(int);\n"},
    {"", "src/model/a.cc",
     "struct Flag {\n  bool on = false;\n};\nbool is_on(const Flag& flag);\n"},
    {"", "src/model/a.cc", "void f() {\n@}\n", 68},
    {"", "kernels/a.cu", "__global__ void f() {\n@}\n", 148},
    {"", "src/model/a.cc", "constexpr int64_t kReserve = int64_t{1} << 40;\n"},
    {"", "src/a.cc", "const Range kRange(int{1}, int{2});\nvoid f() {\n  x({1});\n}\n"},
    {"", "src/a.cc", "struct A {\n  static void f() {}\n};\n"},
    {"", "src/cli/main.cc", "const char* home() { return getenv(\"HOME\"); }\n"},
    {"", "src/cli/launch.cc", "#include \"sim/scheduler.h\"\n"},
    {"", "src/model/a.cc", "const float e = std::exp(1.f);  // tidy: allow libm: a sample\n"},
    {"line-length", "src/model/a.cc",
     "// 345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012"
     "3456789x\n"},
    {"function-length", "src/model/a.cc", "void f() {\n@}\n", 69},
    {"function-length", "src/model/a.cc", "struct A {\n  int f() const {\n@  }\n};\n", 69},
    {"function-length", "tests/model/a.cc", "TEST(Suite, Name) {\n@}\n", 90},
    {"function-length", "kernels/a.cu", "__global__ void f() {\n@}\n", 149},
    {"function-length", "src/a.cc", "A::A(int b) : b_{b} {\n@}\n", 69},
    {"file-length", "src/model/a.cc", "int f();\nnamespace a {\n@}\n", 600},
    {"std-function", "src/model/a.cc", "struct A {\n  std::function<void()> call;\n};\n"},
    {"thread-local", "tests/model/a.cc", "thread_local int x = 0;\n"},
    {"environment", "src/train/a.cc", "const char* home() { return std::getenv(\"HOME\"); }\n"},
    {"random", "src/model/a.cc", "int draw() { return std::rand(); }\n"},
    {"random", "sim/a.cc", "int draw() {\n  std::mt19937 engine;\n  return engine();\n}\n"},
    {"iostream", "src/model/a.cc", "void f() { std::cout << 1; }\n"},
    {"threads", "src/model/a.cc", "void f() { std::async(g); }\n"},
    {"libm", "reference/a.cc", "float f(float x) { return expf(x); }\n"},
    {"libm", "src/optim/a.cc", "double f(double x) { return std::pow(x, 2.0); }\n"},
    {"float-atomics", "kernels/a.cu", "__global__ void f(float* x) { atomicAdd(x, 1.f); }\n"},
    {"unfinished", "src/model/a.cc", "// TODO: finish.\n"},
    {"unfinished", "bench/a.cc", "// XXX\n"},
    {"history", "src/model/a.cc", "// This was previously a map.\n"},
    {"nolint", "src/model/a.cc", "// NOLINTNEXTLINE\n"},
    {"macro", "src/model/a.cc", "#define SQUARE(x) ((x) * (x))\n"},
    {"ifdef", "src/model/a.cc", "#ifdef CAMBIUM_HAS_CUDA\n#endif\n"},
    {"bool-parameter", "src/model/a.cc", "void f(bool fast);\n"},
    {"bool-parameter", "src/model/a.cc", "void f(int count, const bool fast) {}\n"},
    {"bool-parameter", "src/model/a.cc", "void f(int count,\n       bool fast);\n"},
    {"global", "src/model/a.cc", "namespace a {\nint counter = 0;\n}\n"},
    {"global", "src/model/a.cc", "static std::vector<int> kept;\n"},
    {"global", "sim/a.cc", "std::map<int, int> table = {{1, 2}};\n"},
    {"global", "src/model/a.cc", "int next() {\n  static int count = 0;\n  return ++count;\n}\n"},
    {"include-table", "src/base/a.cc", "#include \"src/config/config.h\"\n"},
    {"include-table", "kernels/a.h", "#pragma once\n#include \"src/comm/comm.h\"\n"},
    {"include-table", "reference/a.cc", "#include \"src/model/model.h\"\n"},
    {"include-table", "src/train/a.cc", "#include \"sim/scheduler.h\"\n"},
    {"include-table", "src/cli/train.cc", "#include \"sim/scheduler.h\"\n"},
    {"include-table", "src/train/a.cc", "#include \"src/cli/cli.h\"\n"},
    {"include-table", "sim/a.cc", "#include \"tests/ops/a.h\"\n"},
    {"heavy-header", "src/train/a.h", "#pragma once\n#include \"nlohmann/json.hpp\"\n"},
    {"", "kernels/a.h",
     "#pragma once\nstruct AArgs {\n  In<float> x_N;\n  Out<float> y_N;\n};\n"
     "void visit_views(const AArgs& a, V&& visit) {\n  visit(\"x\", a.x_N);\n"
     "  visit(\"y\", a.y_N);\n}\n"},
    {"undeclared-view", "kernels/a.h",
     "#pragma once\nstruct AArgs {\n  In<float> x_N;\n  Out<float> y_N;\n};\n"
     "void visit_views(const AArgs& a, V&& visit) {\n  visit(\"y\", a.y_N);\n}\n"},
    {"pragma-once", "src/train/a.h", "int f();\n"},
};

inline std::string sample_text(const Sample& sample) {
  std::string text = std::string("// A sample.\n") + sample.text;
  std::string lines;
  for (int line = 0; line < sample.repeat_lines; ++line) lines += "  x();\n";
  const size_t mark = text.find('@');
  return mark == std::string::npos ? text : text.replace(mark, 1, lines);
}

}  // namespace tidy
