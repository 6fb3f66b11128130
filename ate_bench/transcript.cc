#include "ate_bench/transcript.h"

#include <cstdio>
#include <ctime>
#include <set>
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

// One turn for each message id: Claude Code repeats a message, usage included, for each content
// block, and messages of subagents lie between.
TranscriptRecord& claude_turn(const std::string& id, double at_s, Transcript& transcript) {
  for (size_t back = transcript.records.size(); back-- > 0 && !id.empty();) {
    TranscriptRecord& record = transcript.records[back];
    if (record.kind == RecordKind::turn && record.call_id == id) return record;
  }
  transcript.records.push_back({.kind = RecordKind::turn, .at_s = at_s, .call_id = id});
  return transcript.records.back();
}

void read_claude_assistant(const Json& message, double at_s, Transcript& transcript) {
  const Json& usage = member(message, "usage");
  TranscriptRecord& turn = claude_turn(text_of(message, "id"), at_s, transcript);
  turn.cached_tokens = count_of(usage, "cache_read_input_tokens");
  turn.written_tokens = count_of(usage, "cache_creation_input_tokens");
  turn.input_tokens = count_of(usage, "input_tokens") + turn.cached_tokens + turn.written_tokens;
  turn.output_tokens = std::max(turn.output_tokens, count_of(usage, "output_tokens"));
  turn.model = text_of(message, "model");
  if (transcript.model.empty()) transcript.model = turn.model;
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

// `usage` is of the main conversation; `modelUsage`, of newer versions, has subagents in it, too.
void read_claude_result(const Json& line, Transcript& transcript) {
  transcript.totals.clear();
  for (const auto& [model, usage] : member(line, "modelUsage").items()) {
    const int64_t cached = count_of(usage, "cacheReadInputTokens");
    const int64_t written = count_of(usage, "cacheCreationInputTokens");
    transcript.totals[model] = {count_of(usage, "inputTokens") + cached + written, cached, written,
                                count_of(usage, "outputTokens")};
  }
  const Json& usage = member(line, "usage");
  if (transcript.totals.empty() && usage.is_object()) {
    const int64_t cached = count_of(usage, "cache_read_input_tokens");
    const int64_t written = count_of(usage, "cache_creation_input_tokens");
    transcript.totals[transcript.model] = {count_of(usage, "input_tokens") + cached + written,
                                           cached, written, count_of(usage, "output_tokens")};
  }
  const Json& failed = member(line, "is_error");
  const std::string subtype = text_of(line, "subtype");
  transcript.complete = subtype == "success" && !(failed.is_boolean() && failed.get<bool>());
  if (!transcript.complete) transcript.error = subtype + ": " + text_of(line, "result");
}

void read_claude(const Json& line, double at_s, Transcript& transcript) {
  const std::string type = text_of(line, "type");
  const Json& message = member(line, "message");
  if (type == "assistant") {
    read_claude_assistant(message, at_s, transcript);
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

struct CodexState {
  bool answered = true;        // the next item is of another invocation
  std::set<std::string> open;  // tool calls that run
  std::string session_total;   // of a session file: the last count of tokens
};

TokenCounts codex_tokens(const Json& usage) {
  return {count_of(usage, "input_tokens"), count_of(usage, "cached_input_tokens"),
          count_of(usage, "cache_write_input_tokens"), count_of(usage, "output_tokens")};
}

// A new invocation begins with the first item after the start or after the results of all calls
// that run: calls of one invocation may overlap. Errors are not the model's.
void read_codex_item(const std::string& type, const Json& item, double at_s, CodexState& state,
                     Transcript& transcript) {
  const std::string kind = text_of(item, "type"), id = text_of(item, "id");
  if (kind == "error" || type == "item.updated") return;
  const bool is_tool = kind == "command_execution" || kind == "mcp_tool_call" ||
                       kind == "collab_tool_call" || kind == "web_search" || kind == "file_change";
  const bool is_open = state.open.count(id) == 1;
  if (state.answered && !is_open) transcript.records.push_back({RecordKind::turn, at_s});
  state.answered = false;
  if (!is_tool) return;
  if (!is_open) {
    transcript.records.push_back(
        {.kind = RecordKind::tool_call, .at_s = at_s, .call_id = id, .tool = kind});
    state.open.insert(id);
  }
  if (type != "item.completed") return;
  transcript.records.push_back({.kind = RecordKind::tool_result, .at_s = at_s, .call_id = id});
  state.open.erase(id);
  state.answered = state.open.empty();
}

// A session file has a count of tokens after each invocation, at times twice.
void read_codex_session(const std::string& type, const Json& payload, double at_s,
                        CodexState& state, Transcript& transcript) {
  const std::string kind = text_of(payload, "type");
  const auto ends_with = [&](const std::string& end) {
    return kind.size() > end.size() && kind.compare(kind.size() - end.size(), end.size(), end) == 0;
  };
  const Json& info = member(payload, "info");
  const Json& total = member(info, "total_token_usage");
  if (type == "turn_context") {
    transcript.model = text_of(payload, "model");
  } else if (kind == "token_count" && total.is_object() && total.dump() != state.session_total) {
    state.session_total = total.dump();
    const TokenCounts last = codex_tokens(member(info, "last_token_usage"));
    transcript.records.push_back({.kind = RecordKind::turn,
                                  .at_s = at_s,
                                  .input_tokens = last.input,
                                  .output_tokens = last.output,
                                  .cached_tokens = last.cached,
                                  .written_tokens = last.written,
                                  .model = transcript.model});
  } else if (type == "response_item" && ends_with("_call")) {
    transcript.records.push_back({.kind = RecordKind::tool_call,
                                  .at_s = at_s,
                                  .call_id = text_of(payload, "call_id"),
                                  .tool = text_of(payload, "name")});
  } else if (type == "response_item" && ends_with("_call_output")) {
    transcript.records.push_back(
        {.kind = RecordKind::tool_result, .at_s = at_s, .call_id = text_of(payload, "call_id")});
  } else {
    if (kind == "task_started") transcript.complete = false;
    if (kind == "task_complete") transcript.complete = true;
    transcript.records.push_back({RecordKind::other, at_s});
  }
}

// `exec --json` tells items, not invocations, and tokens for a prompt: contexts are known as a
// mean.
void read_codex(const Json& line, double at_s, CodexState& state, Transcript& transcript) {
  const std::string type = text_of(line, "type");
  transcript.tells_reads = false;
  if (member(line, "payload").is_object()) {
    read_codex_session(type, member(line, "payload"), at_s, state, transcript);
  } else if (type.rfind("item.", 0) == 0) {
    read_codex_item(type, member(line, "item"), at_s, state, transcript);
  } else if (type == "turn.completed") {
    const TokenCounts counts = codex_tokens(member(line, "usage"));
    TokenCounts& total = transcript.totals[transcript.model];
    total = {total.input + counts.input, total.cached + counts.cached,
             total.written + counts.written, total.output + counts.output};
    transcript.complete = true;
  } else if (type == "turn.failed" || type == "error") {
    transcript.error =
        type == "error" ? text_of(line, "message") : text_of(member(line, "error"), "message");
    transcript.complete = false;
  } else {
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
                                  .cached_tokens = count_of(line, "cached_tokens"),
                                  .written_tokens = count_of(line, "written_tokens"),
                                  .model = text_of(line, "model")});
    if (transcript.model.empty()) transcript.model = text_of(line, "model");
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
  CodexState state;
  std::string line;
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
        read_claude(parsed, at_s, transcript);
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
