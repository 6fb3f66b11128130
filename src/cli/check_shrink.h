// Shrinking of a failed check: fewer faults, ranks and layers, then fewer deviations from the
// first-in-first-out schedule, as long as the same part fails with the same exit code. What is left
// is minimal, no single reduction that is tried keeps the failure, or the least that a bounded
// number of checks found: larger reductions are tried first.
#pragma once

#include <string>
#include <vector>

#include "src/base/error.h"
#include "src/config/config.h"

namespace cambium {

// What fails, or is to be checked alone.
enum class CheckPart { all, full_shape, races, bits, threads, exact_schedules, fast_schedules };

struct CheckReport {
  std::string checked;  // what, in words
  std::vector<std::string> passed;
  std::string failure;
  std::string schedule = "fifo";  // the one that failed (LaunchOptions::schedule)
  ExitCode exit_code = ExitCode::done;
  CheckPart part = CheckPart::all;  // under way, or failed
};

// Checks a configuration: FIFO order, then `seeds` explored schedules, or `schedule` alone.
struct CheckRequest {
  Config config;
  int64_t seeds = 0;
  std::string schedule = {};
  CheckPart only = CheckPart::all;
};
using CheckVerdict = CheckReport (*)(const CheckRequest& request);

struct Repro {
  bool reproduces = false;        // by `schedule`; else nothing was shrunk
  std::vector<std::string> sets;  // after the user's own
  std::string schedule;
  int64_t runs = 0;  // checks that shrinking took
};
struct ShrinkRequest {
  std::string path;
  std::vector<std::string> sets;
  CheckReport failed;
  CheckVerdict verdict = nullptr;
};
Repro shrink(const ShrinkRequest& request);

// "KEY=VALUE" assignments without those whose key is assigned again later.
std::vector<std::string> last_assignments(const std::vector<std::string>& sets);

}  // namespace cambium
