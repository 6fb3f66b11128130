// CHECK, CHECK_EQ, ...: always-on assertions for programming mistakes.
//
// A failure throws `Error` (exit code 70) whose message holds the expression, both values and
// file:line; the rank loop adds rank, step and seed on its way out (sim/scheduler.cc).
#pragma once

#include "src/base/error.h"

namespace cambium::check_detail {

template <class Value>
std::string show(const Value& value) {
  if constexpr (fmt::is_formattable<Value>::value) {
    return format_text("{}", value);
  } else if constexpr (std::is_enum_v<Value>) {
    return format_text("{}", static_cast<long long>(value));
  } else {
    return "?";
  }
}

[[noreturn]] inline void check_failed(const char* file, int line, const std::string& what) {
  throw Error(ExitCode::internal, format_text("{}:{}: CHECK failed: {}", file, line, what));
}

template <class Left, class Right>
[[noreturn]] void compare_failed(const char* file, int line, const char* expression,
                                 const Left& left, const Right& right) {
  check_failed(file, line, format_text("{} ({} vs {})", expression, show(left), show(right)));
}

}  // namespace cambium::check_detail

#define CHECK(condition)                                                     \
  do {                                                                       \
    if (!(condition)) [[unlikely]]                                           \
      ::cambium::check_detail::check_failed(__FILE__, __LINE__, #condition); \
  } while (0)

#define CAMBIUM_CHECK_OP(left, op, right)                                                   \
  do {                                                                                      \
    const auto& check_left = (left);                                                        \
    const auto& check_right = (right);                                                      \
    if (!(check_left op check_right)) [[unlikely]]                                          \
      ::cambium::check_detail::compare_failed(__FILE__, __LINE__, #left " " #op " " #right, \
                                              check_left, check_right);                     \
  } while (0)

#define CHECK_EQ(left, right) CAMBIUM_CHECK_OP(left, ==, right)
#define CHECK_NE(left, right) CAMBIUM_CHECK_OP(left, !=, right)
#define CHECK_LT(left, right) CAMBIUM_CHECK_OP(left, <, right)
#define CHECK_LE(left, right) CAMBIUM_CHECK_OP(left, <=, right)
#define CHECK_GT(left, right) CAMBIUM_CHECK_OP(left, >, right)
#define CHECK_GE(left, right) CAMBIUM_CHECK_OP(left, >=, right)
