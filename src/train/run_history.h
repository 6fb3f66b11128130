// run_history: reads a run directory back, whether it finished, still runs or was killed mid-line.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "src/train/run_record.h"

namespace cambium {

struct RunHistory {
  std::vector<StepMetrics> steps;  // by increasing step
  std::optional<ExitEvent> exit;   // absent while the run goes on, or after a kill
  int64_t unreadable_lines = 0;    // torn or damaged lines, which are skipped
};

// Errors: exit code 2 when `run_directory` has no metrics.jsonl.
RunHistory read_run_history(const std::string& run_directory);
// Errors: exit code 2 when `run_directory` has no digests.jsonl.
std::vector<StepDigests> read_digests(const std::string& run_directory);
// An empty record when run.json is absent or damaged.
RunRecord read_run_record(const std::string& run_directory);

}  // namespace cambium
