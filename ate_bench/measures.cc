#include "ate_bench/measures.h"

#include <algorithm>
#include <set>
#include <sstream>

namespace ate {

double active_seconds(const std::vector<TranscriptRecord>& records) {
  double total_s = 0;
  std::set<std::string> open_calls;
  for (size_t index = 0; index < records.size(); ++index) {
    const TranscriptRecord& record = records[index];
    if (index > 0) {
      const double gap_s = std::max(0.0, record.at_s - records[index - 1].at_s);
      total_s += open_calls.empty() ? std::min(gap_s, kGapLimitS) : gap_s;
    }
    if (record.kind == RecordKind::tool_call) open_calls.insert(record.call_id);
    if (record.kind == RecordKind::tool_result) open_calls.erase(record.call_id);
    if (record.kind == RecordKind::turn) open_calls.clear();  // a lost result ends with the turn
  }
  return total_s;
}

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  if (values.size() % 2 == 1) return values[middle];
  return (values[middle - 1] + values[middle]) / 2;
}

Measures measure_transcript(const Transcript& transcript) {
  Measures measures;
  std::vector<double> contexts;
  std::set<std::string> paths;
  int64_t output = 0;
  for (const TranscriptRecord& record : transcript.records) {
    if (record.kind == RecordKind::turn) {
      ++measures.agent_turns;
      output += record.output_tokens;
      if (record.input_tokens >= 0) contexts.push_back(static_cast<double>(record.input_tokens));
    }
    if (record.kind == RecordKind::tool_call) ++measures.tool_calls;
    if (!record.read_path.empty()) paths.insert(record.read_path);
  }
  if (transcript.tells_reads) measures.files_read = static_cast<int64_t>(paths.size());
  if (transcript.total_output_tokens >= 0 || !contexts.empty()) {
    measures.output_tokens = std::max(output, transcript.total_output_tokens);
  }
  measures.session_duration_s = active_seconds(transcript.records);
  if (!contexts.empty()) {
    measures.per_turn_context = median(contexts);
  } else if (transcript.total_input_tokens >= 0 && measures.agent_turns > 0) {
    measures.context_is_mean = true;
    measures.per_turn_context = static_cast<double>(transcript.total_input_tokens) /
                                static_cast<double>(measures.agent_turns);
  }
  return measures;
}

std::optional<double> session_cost(const Transcript& transcript, const Measures& measures,
                                   const std::map<std::string, Price>& prices) {
  const auto price = prices.find(transcript.model);
  if (price == prices.end() || !measures.output_tokens) return std::nullopt;
  int64_t input = transcript.total_input_tokens, cached = transcript.total_cached_tokens;
  if (input < 0) {  // no total: cut off, or a format that tells turns
    input = cached = 0;
    for (const TranscriptRecord& record : transcript.records) {
      if (record.kind != RecordKind::turn) continue;
      input += std::max<int64_t>(0, record.input_tokens);
      cached += record.cached_tokens;
    }
  }
  return 1e-6 * (static_cast<double>(input - cached) * price->second.input +
                 static_cast<double>(cached) * price->second.cached_input +
                 static_cast<double>(*measures.output_tokens) * price->second.output);
}

void add_run_log(const std::string& text, Measures& measures) {
  std::istringstream stream(text);
  std::string word, device, code;
  double first_s = -1, last_s = -1, value = 0;
  while (stream >> word >> value) {
    if (word == "start") {
      stream >> device;
      if (first_s < 0) first_s = value;
    } else if (word == "exit") {
      stream >> code;
      last_s = value;
    } else if (word == "busy") {
      measures.gpu_busy_s += value;
    }
  }
  if (first_s < 0 || last_s < first_s) return;
  (device == "gpu" ? measures.active_gpu_s : measures.cpu_simulated_s) += last_s - first_s;
}

int64_t count_changed_lines(const std::string& diff) {
  std::istringstream stream(diff);
  std::string line;
  int64_t changed = 0;
  bool in_hunk = false;
  while (std::getline(stream, line)) {
    if (line.rfind("diff --git ", 0) == 0) in_hunk = false;
    if (line.rfind("@@", 0) == 0) in_hunk = true;
    if (in_hunk && !line.empty() && (line[0] == '+' || line[0] == '-')) ++changed;
  }
  return changed;
}

}  // namespace ate
