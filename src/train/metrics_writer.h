// MetricsWriter: metrics.jsonl, digests.jsonl and the TensorBoard event file of one run directory.
//
// Each line is one write(2), so a line is in the kernel before its step's checkpoint commits, and a
// killed process leaves at most one torn last line. A failed write is an Error with exit code 31.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "src/base/error.h"
#include "src/train/run_record.h"

namespace cambium {

enum class EventFiles { off, on };

class MetricsWriter {
 public:
  // Opens the files of `run_directory`, which exists. What an earlier attempt wrote beyond
  // `resume_step` is dropped, so that the step lines of a resumed run equal those of a straight
  // one: a torn last line, steps after `resume_step`, exit events. A fresh run passes 0.
  MetricsWriter(const std::string& run_directory, int64_t resume_step, EventFiles event_files);
  ~MetricsWriter();
  MetricsWriter(const MetricsWriter&) = delete;
  MetricsWriter& operator=(const MetricsWriter&) = delete;

  void write_step(const StepMetrics& metrics);
  // A step that an earlier attempt recorded already is compared, not written twice: other digests
  // for it mean that the loaded state is not the saved one (Error, exit code 51).
  void write_digests(const StepDigests& digests);
  // The last line of metrics.jsonl.
  void write_exit(const ExitEvent& event);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Writes run.json: temporary file, fsync, rename. May be called again when more is known.
void write_run_record(const std::string& run_directory, const RunRecord& record);

}  // namespace cambium
