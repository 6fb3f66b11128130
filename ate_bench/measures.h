// What a session spent, by the definitions of ATE-Bench, and what we add to them.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "ate_bench/transcript.h"

namespace ate {

// A gap without a tool call counts at most this long: the agent's machine slept, or a person left.
constexpr double kGapLimitS = 600;

struct Measures {
  int64_t agent_turns = 0;                 // model invocations
  std::optional<double> per_turn_context;  // median over turns of input tokens, cached included
  bool context_is_mean = false;            // the agent tells totals only (codex exec)
  std::optional<int64_t> output_tokens;    // absent when no record tells a usage
  double session_duration_s = 0;           // active wall time
  double active_gpu_s = 0;                 // wall time of runs on a GPU, from their logs
  double gpu_busy_s = 0;                   // sampled utilization times the sampling interval
  double cpu_simulated_s = 0;              // wall time of runs on the CPU, from their logs
  int64_t tool_calls = 0;
  std::optional<int64_t> files_read;  // different paths; absent without a tool that reads one file
  int64_t lines_changed = 0;          // added and removed, of the captured diff
  std::optional<double> cost;         // absent without the model's price or any usage
};

// Dollars for a million tokens. `cache_write`: of input that is written to a cache.
struct Price {
  double input = 0, cached_input = 0, output = 0, cache_write = input;
};

double active_seconds(const std::vector<TranscriptRecord>& records);
double median(std::vector<double> values);  // of the two middle ones the mean; 0 for none
Measures measure_transcript(const Transcript& transcript);
// Every model of the session needs its price. `model` is that of turns that name none.
std::optional<double> session_cost(const Transcript& transcript, const std::string& model,
                                   const std::map<std::string, Price>& prices);

// Adds the runs of one log of .ate/run: lines `start T gpu|cpu`, `busy SECONDS`, `exit T CODE`.
// From the first stamp to the last exit; a run that never ended counts nothing.
void add_run_log(const std::string& text, Measures& measures);
int64_t count_changed_lines(const std::string& diff);

}  // namespace ate
