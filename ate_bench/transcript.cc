#include "ate_bench/transcript.h"

#include <cstdio>
#include <ctime>
#include <sstream>
#include <stdexcept>

#include "nlohmann/json.hpp"

namespace ate {
namespace {

using Json = nlohmann::json;

const Json& member(const Json& object, const char* name) {
  static const Json none;
  if (!object.is_object()) return none;
  const auto at = object.find(name);
  return at == object.end() ? none : *at;
}

std::string text_of(const Json& object, const char* name) {
  const Json& value = member(object, name);
  return value.is_string() ? value.get<std::string>() : "";
}

int64_t count_of(const Json& object, const char* name) {
  const Json& value = member(object, name);
  return value.is_number() ? value.get<int64_t>() : 0;
}

// "2026-01-02T03:04:05.678Z" to seconds since 1970; `otherwise` when it is no such stamp.
double stamp_seconds(const std::string& text, double otherwise) {
  std::tm parts = {};
  double seconds = 0;
  if (std::sscanf(text.c_str(), "%d-%d-%dT%d:%d:%lf", &parts.tm_year, &parts.tm_mon, &parts.tm_mday,
                  &parts.tm_hour, &parts.tm_min, &seconds) != 6) {
    return otherwise;
  }
  parts.tm_year -= 1900;
  parts.tm_mon -= 1;
  return static_cast<double>(timegm(&parts)) + seconds;
}

// One turn per message id: Claude Code repeats the message, usage included, for each content block.
void read_claude_assistant(const Json& message, double at_s, std::string& last_id,
                           Transcript& transcript) {
  const Json& usage = member(message, "usage");
  const int64_t input = count_of(usage, "input_tokens") +
                        count_of(usage, "cache_creation_input_tokens") +
                        count_of(usage, "cache_read_input_tokens");
  const std::string id = text_of(message, "id");
  if (id.empty() || id != last_id) {
    transcript.records.push_back({.kind = RecordKind::turn,
                                  .at_s = at_s,
                                  .input_tokens = input,
                                  .cached_tokens = count_of(usage, "cache_read_input_tokens")});
    transcript.model = text_of(message, "model");
  }
  last_id = id;
  for (size_t back = transcript.records.size(); back-- > 0;) {
    TranscriptRecord& turn = transcript.records[back];
    if (turn.kind != RecordKind::turn) continue;
    turn.output_tokens = std::max(turn.output_tokens, count_of(usage, "output_tokens"));
    break;
  }
  for (const Json& block : member(message, "content")) {
    if (text_of(block, "type") != "tool_use") continue;
    const std::string tool = text_of(block, "name");
    const std::string path = tool == "Read" ? text_of(member(block, "input"), "file_path") : "";
    transcript.records.push_back({.kind = RecordKind::tool_call,
                                  .at_s = at_s,
                                  .call_id = text_of(block, "id"),
                                  .tool = tool,
                                  .read_path = path});
  }
}

void read_claude_result(const Json& line, Transcript& transcript) {
  const Json& usage = member(line, "usage");
  transcript.total_output_tokens = count_of(usage, "output_tokens");
  transcript.total_cached_tokens = count_of(usage, "cache_read_input_tokens");
  transcript.total_input_tokens = count_of(usage, "input_tokens") +
                                  count_of(usage, "cache_creation_input_tokens") +
                                  transcript.total_cached_tokens;
  const Json& failed = member(line, "is_error");
  transcript.complete = failed.is_boolean() && !failed.get<bool>();
  if (!transcript.complete) {
    transcript.error = text_of(line, "subtype") + ": " + text_of(line, "result");
  }
}

void read_claude(const Json& line, double at_s, std::string& last_id, Transcript& transcript) {
  const std::string type = text_of(line, "type");
  const Json& message = member(line, "message");
  if (type == "assistant") {
    read_claude_assistant(message, at_s, last_id, transcript);
  } else if (type == "user") {
    transcript.records.push_back({RecordKind::other, at_s});
    for (const Json& block : member(message, "content")) {
      if (text_of(block, "type") != "tool_result") continue;
      transcript.records.push_back({.kind = RecordKind::tool_result,
                                    .at_s = at_s,
                                    .call_id = text_of(block, "tool_use_id")});
    }
  } else if (type == "result") {
    read_claude_result(line, transcript);
  } else {
    transcript.records.push_back({RecordKind::other, at_s});
  }
}

// Codex tells items, not model invocations: a new one begins with the first item after the start
// or after a tool's result. It tells tokens per prompt: contexts are known as a mean only.
void read_codex(const Json& line, double at_s, std::string& state, Transcript& transcript) {
  const std::string type = text_of(line, "type");
  const Json& item = member(line, "item");
  const std::string kind = text_of(item, "type");
  const bool is_tool = kind == "command_execution" || kind == "mcp_tool_call" ||
                       kind == "web_search" || kind == "file_change";
  transcript.tells_reads = false;
  const bool is_item = type == "item.started" || type == "item.completed";
  if (is_item && state != "model" && !(is_tool && type == "item.completed" && state == "tool")) {
    transcript.records.push_back({RecordKind::turn, at_s});
    state = "model";
  }
  if (is_item && is_tool) {
    const std::string id = text_of(item, "id");
    bool open = false;
    for (const TranscriptRecord& record : transcript.records) {
      open = open || (record.kind == RecordKind::tool_call && record.call_id == id);
    }
    if (!open) {
      transcript.records.push_back(
          {.kind = RecordKind::tool_call, .at_s = at_s, .call_id = id, .tool = kind});
    }
    state = "tool";
    if (type == "item.completed") {
      transcript.records.push_back({.kind = RecordKind::tool_result, .at_s = at_s, .call_id = id});
      state = "result";
    }
  } else if (type == "turn.completed") {
    const Json& usage = member(line, "usage");
    transcript.total_input_tokens =
        std::max<int64_t>(0, transcript.total_input_tokens) + count_of(usage, "input_tokens");
    transcript.total_cached_tokens += count_of(usage, "cached_input_tokens");
    transcript.total_output_tokens =
        std::max<int64_t>(0, transcript.total_output_tokens) + count_of(usage, "output_tokens");
    transcript.complete = true;
  } else if (type == "turn.failed" || type == "error") {
    transcript.error =
        type == "error" ? text_of(line, "message") : text_of(member(line, "error"), "message");
    transcript.complete = false;
  } else if (!is_item) {
    transcript.complete = transcript.complete && type != "turn.started";
    transcript.records.push_back({RecordKind::other, at_s});
  }
}

void read_generic(const Json& line, double at_s, Transcript& transcript) {
  const std::string type = text_of(line, "type");
  if (type == "turn") {
    const Json& input = member(line, "input_tokens");
    transcript.records.push_back({.kind = RecordKind::turn,
                                  .at_s = at_s,
                                  .input_tokens = input.is_number() ? input.get<int64_t>() : -1,
                                  .output_tokens = count_of(line, "output_tokens"),
                                  .cached_tokens = count_of(line, "cached_tokens")});
    if (!text_of(line, "model").empty()) transcript.model = text_of(line, "model");
  } else if (type == "tool_call") {
    transcript.records.push_back({.kind = RecordKind::tool_call,
                                  .at_s = at_s,
                                  .call_id = text_of(line, "id"),
                                  .tool = text_of(line, "name"),
                                  .read_path = text_of(line, "read_path")});
  } else if (type == "tool_result") {
    transcript.records.push_back(
        {.kind = RecordKind::tool_result, .at_s = at_s, .call_id = text_of(line, "id")});
  } else if (type == "end") {
    transcript.error = text_of(line, "error");
    transcript.complete = transcript.error.empty();
  } else {
    transcript.records.push_back({RecordKind::other, at_s});
  }
}

}  // namespace

TranscriptFormat transcript_format(const std::string& name) {
  if (name == "claude") return TranscriptFormat::claude;
  if (name == "codex") return TranscriptFormat::codex;
  if (name == "generic" || name == "scripted") return TranscriptFormat::generic;
  throw std::runtime_error("agent '" + name + "' is none of claude, codex, generic, scripted");
}

Transcript read_transcript(TranscriptFormat format, const std::string& text,
                           const std::vector<double>& arrival_s) {
  Transcript transcript;
  std::string state, line;
  std::istringstream stream(text);
  double at_s = 0;
  for (size_t index = 0; std::getline(stream, line); ++index) {
    if (line.empty()) continue;
    const Json parsed = Json::parse(line, nullptr, false);
    if (!parsed.is_object()) {
      ++transcript.torn_lines;
      continue;
    }
    if (index < arrival_s.size()) at_s = arrival_s[index];
    at_s = stamp_seconds(text_of(parsed, "timestamp"), at_s);
    const Json& stamp = member(parsed, "t");
    if (stamp.is_number()) at_s = stamp.get<double>();
    switch (format) {
      case TranscriptFormat::claude:
        read_claude(parsed, at_s, state, transcript);
        break;
      case TranscriptFormat::codex:
        read_codex(parsed, at_s, state, transcript);
        break;
      case TranscriptFormat::generic:
        read_generic(parsed, at_s, transcript);
        break;
    }
  }
  return transcript;
}

bool is_network_error(const std::string& message) {
  for (const char* sign : {"network", "onnection", "stream disconnected", "timed out", "ECONN",
                           "ENOTFOUND", "EAI_AGAIN", "resolve host", "socket"}) {
    if (message.find(sign) != std::string::npos) return true;
  }
  return false;
}

}  // namespace ate
