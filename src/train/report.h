// write_report: RUN/report.html, one file that needs nothing else and shows a whole run.
#pragma once

#include <string>

namespace cambium {

// Reads run.json, metrics.jsonl, config.resolved.toml and samples.txt of `run_directory` and writes
// report.html there (temporary file, rename). Works on a run that goes on or was killed; what is
// absent is left out. Errors: exit code 2 when there is no metrics.jsonl, 31 when writing fails.
void write_report(const std::string& run_directory);

}  // namespace cambium
