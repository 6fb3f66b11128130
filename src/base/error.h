// Errors that a user can cause or must act on: a stable exit code, what, where, why, next step.
//
// Programming mistakes are CHECK failures (check.h); everything here is a `cambium::Error`, thrown
// with the exit code of design.md section 4 and turned into that code by `main` alone.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "fmt/core.h"

namespace cambium {

// Stable exit codes of the command line. NOTE: never renumber; scripts depend on them.
enum class ExitCode : int {
  done = 0,
  usage = 2,
  peer_lost = 20,
  watchdog = 21,
  collective_mismatch = 22,
  deadlock = 23,
  corrupt_file = 30,
  io = 31,
  bad_corpus = 32,
  directory_in_use = 33,
  unsafe_file = 34,
  out_of_memory = 40,
  non_finite = 50,
  verification_mismatch = 51,
  internal = 70,
  stopped_by_signal = 75,
};

// An error with its exit code. `what()` is the whole message: what, where, why, next step.
class Error : public std::runtime_error {
 public:
  Error(ExitCode exit_code, const std::string& message)
      : std::runtime_error(message), exit_code_(exit_code) {}
  ExitCode exit_code() const { return exit_code_; }

 private:
  ExitCode exit_code_;
};

// A format string checked at compile time, but for nvcc, whose front end cannot run fmt 9's parser.
#ifdef __CUDACC__
template <class... Arguments>
using FormatString = std::type_identity_t<fmt::string_view>;
#else
template <class... Arguments>
using FormatString = fmt::format_string<Arguments...>;
#endif

// fmt::format that headers may use: they are compiled by nvcc too.
template <class... Arguments>
std::string format_text(FormatString<Arguments...> format, Arguments&&... arguments) {
  return fmt::vformat(format, fmt::make_format_args(arguments...));
}

// Throws `Error` with a formatted message.
template <class... Arguments>
[[noreturn]] void fail(ExitCode exit_code, FormatString<Arguments...> format,
                       Arguments&&... arguments) {
  throw Error(exit_code, fmt::vformat(format, fmt::make_format_args(arguments...)));
}

}  // namespace cambium
