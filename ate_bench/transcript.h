// Transcripts of coding agents, read into one list of records whatever the agent wrote.
//
// Formats: Claude Code `--output-format stream-json`, Codex CLI `exec --json`, and our own JSONL
// (docs: ate_bench/README.md). A transcript may end anywhere: a torn last line is counted, not an
// error, and a transcript without its closing record is `complete == false`.
#pragma once

#include <cstdint>
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
  int64_t cached_tokens = 0;  // of the input, read from a cache
  std::string call_id;        // pairs a tool_call with its tool_result
  std::string tool;           // name, of a tool_call
  std::string read_path;      // of a tool_call that reads one file
};

struct Transcript {
  std::vector<TranscriptRecord> records;
  std::string model;
  std::string error;                 // the agent's own last error message
  int64_t total_output_tokens = -1;  // the session's total when the agent states one
  int64_t total_input_tokens = -1;   // the same, cached included
  int64_t total_cached_tokens = 0;   // the part of that which was read from a cache
  bool tells_reads = true;           // has a tool that reads one file
  int64_t torn_lines = 0;            // lines that are no JSON object
  bool complete = false;             // the closing record is there and reports no error
};

TranscriptFormat transcript_format(const std::string& name);

// `arrival_s[i]` is when line i came; used where records have no time. May be shorter than the
// text.
Transcript read_transcript(TranscriptFormat format, const std::string& text,
                           const std::vector<double>& arrival_s);

// Whether an error message speaks of a lost connection rather than of the task.
bool is_network_error(const std::string& message);

}  // namespace ate
