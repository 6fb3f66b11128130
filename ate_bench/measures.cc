#include "ate_bench/measures.h"

#include <algorithm>
#include <set>
#include <sstream>

namespace ate {

double active_seconds(const std::vector<TranscriptRecord>& records) {
  std::set<std::string> answered, open_calls;
  for (const TranscriptRecord& record : records) {
    if (record.kind == RecordKind::tool_result) answered.insert(record.call_id);
  }
  double total_s = 0;
  for (size_t index = 0; index < records.size(); ++index) {
    const TranscriptRecord& record = records[index];
    if (index > 0) {
      const double gap_s = std::max(0.0, record.at_s - records[index - 1].at_s);
      total_s += open_calls.empty() ? std::min(gap_s, kGapLimitS) : gap_s;
    }
    if (record.kind == RecordKind::tool_call) open_calls.insert(record.call_id);
    if (record.kind == RecordKind::tool_result) open_calls.erase(record.call_id);
    if (record.kind == RecordKind::turn) {  // ends calls whose result was lost, and no others
      std::erase_if(open_calls, [&](const std::string& id) { return answered.count(id) == 0; });
    }
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
  TokenCounts total;
  for (const auto& [model, counts] : transcript.totals) {
    total.input += counts.input;
    total.output += counts.output;
  }
  if (!transcript.totals.empty() || !contexts.empty()) {
    measures.output_tokens = std::max(output, total.output);
  }
  measures.session_duration_s = active_seconds(transcript.records);
  if (!contexts.empty()) {
    measures.per_turn_context = median(contexts);
  } else if (!transcript.totals.empty() && measures.agent_turns > 0) {
    measures.context_is_mean = true;
    measures.per_turn_context =
        static_cast<double>(total.input) / static_cast<double>(measures.agent_turns);
  }
  return measures;
}

std::optional<double> session_cost(const Transcript& transcript, const std::string& model,
                                   const std::map<std::string, Price>& prices) {
  std::map<std::string, TokenCounts> spent;
  for (const TranscriptRecord& record : transcript.records) {
    if (record.kind != RecordKind::turn || record.input_tokens < 0) continue;
    TokenCounts& counts = spent[record.model];
    counts = {counts.input + record.input_tokens, counts.cached + record.cached_tokens,
              counts.written + record.written_tokens, counts.output + record.output_tokens};
  }
  if (!transcript.totals.empty()) spent = transcript.totals;
  double cost = 0;
  for (const auto& [name, counts] : spent) {
    const auto price = prices.find(name.empty() ? model : name);
    if (price == prices.end()) return std::nullopt;
    const auto plain = static_cast<double>(counts.input - counts.cached - counts.written);
    cost += 1e-6 * (plain * price->second.input +
                    static_cast<double>(counts.cached) * price->second.cached_input +
                    static_cast<double>(counts.written) * price->second.cache_write +
                    static_cast<double>(counts.output) * price->second.output);
  }
  return spent.empty() ? std::nullopt : std::optional(cost);
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
