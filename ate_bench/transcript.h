// Transcripts of coding agents, read into one list of records whatever the agent wrote.
//
// Formats: Claude Code `--output-format stream-json` and its session files, Codex CLI `exec --json`
// and its session files (`rollout-*.jsonl`), and our own JSONL (docs: ate_bench/README.md). A
// transcript may end anywhere: a torn last line is counted, not an error, and a transcript without
// its closing record is `complete == false`.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace ate {

enum class RecordKind { turn, tool_call, tool_result, other };
enum class TranscriptFormat { claude, codex, generic };

struct TranscriptRecord {
  RecordKind kind = RecordKind::other;
  double at_s = 0;            // seconds; of the record itself, else its line's arrival
  int64_t input_tokens = -1;  // of a turn, cached ones included; -1 when the agent does not tell
  int64_t output_tokens = 0;
  int64_t cached_tokens = 0;   // of the input, read from a cache
  int64_t written_tokens = 0;  // of the input, written to a cache
  std::string model;           // of a turn
  std::string call_id;         // pairs a tool_call with its tool_result; of a turn, its message
  std::string tool;            // name, of a tool_call
  std::string read_path;       // of a tool_call that reads one file
};

// Input counts what was read from a cache or written to it too.
struct TokenCounts {
  int64_t input = 0, cached = 0, written = 0, output = 0;
};

struct Transcript {
  std::vector<TranscriptRecord> records;
  std::string model;
  std::string error;                          // the agent's own last error message
  std::map<std::string, TokenCounts> totals;  // by model, where the agent states the session's own
  bool tells_reads = true;                    // has a tool that reads one file
  int64_t torn_lines = 0;                     // lines that are no JSON object
  bool complete = false;                      // the closing record is there and reports no error
};

TranscriptFormat transcript_format(const std::string& name);

// `arrival_s[i]` is when line i came; used where records have no time. May be shorter than the
// text.
Transcript read_transcript(TranscriptFormat format, const std::string& text,
                           const std::vector<double>& arrival_s);

// Whether an error message speaks of a lost connection rather than of the task.
bool is_network_error(const std::string& message);

}  // namespace ate
