// Parsers of agents' transcripts on sessions written for them, whole and cut off, and the measures.
#include "ate_bench/transcript.h"

#include "ate_bench/measures.h"
#include "ate_bench/process.h"
#include "gtest/gtest.h"
#include "tests/tree.h"

namespace ate {
namespace {

std::string recorded(const std::string& name) {
  return read_file(cambium::source_directory() + ("/tests/ate/transcripts/" + name + ".jsonl"));
}

const std::string kClaude = recorded("claude"), kCodex = recorded("codex");

std::string first_lines(const std::string& text, int count) {
  size_t end = 0;
  while (count-- > 0) end = text.find('\n', end) + 1;
  return text.substr(0, end);
}

TEST(AteTranscript, ClaudeCountsMessagesNotBlocks) {
  const std::vector<double> arrival_s = {0, 1, 2, 10, 11, 2000, 2010, 5000};
  const Transcript transcript = read_transcript(TranscriptFormat::claude, kClaude, arrival_s);
  EXPECT_TRUE(transcript.complete);
  EXPECT_EQ(transcript.model, "claude-x");
  const Measures measures = measure_transcript(transcript);
  EXPECT_EQ(measures.agent_turns, 3);
  EXPECT_EQ(measures.per_turn_context, 2020);
  EXPECT_EQ(measures.output_tokens, 120);  // the result's total is above 40 + 60 + 7
  EXPECT_EQ(measures.tool_calls, 3);
  EXPECT_EQ(measures.files_read, 1);
  EXPECT_FALSE(measures.context_is_mean);
  // 11 s to the second message; 1989 s of running tools count in full; 10 s more.
  EXPECT_DOUBLE_EQ(measures.session_duration_s, 2010);
  const auto cost = session_cost(transcript, "", {{"claude-x", {2, 0.5, 10, 4}}});
  ASSERT_TRUE(cost.has_value());
  EXPECT_NEAR(*cost, 1e-6 * (60 * 2 + 200 * 4 + 6000 * 0.5 + 120 * 10), 1e-12);
  EXPECT_FALSE(session_cost(transcript, "", {}).has_value());
  // Cut off after the second message: what is known of it is counted, cached tokens as such.
  const Transcript cut = read_transcript(TranscriptFormat::claude, first_lines(kClaude, 6), {});
  EXPECT_NEAR(*session_cost(cut, "", {{"claude-x", {2, 0.5, 10}}}),
              1e-6 * (230 * 2 + 3000 * 0.5 + 100 * 10), 1e-12);
}

TEST(AteTranscript, CutOffAtEveryByteIsNeverComplete) {
  for (const auto& [format, text] :
       {std::pair(TranscriptFormat::claude, kClaude), std::pair(TranscriptFormat::codex, kCodex)}) {
    int64_t turns = 0;
    for (size_t bytes = 0; bytes + 1 < text.size(); ++bytes) {
      const Transcript cut = read_transcript(format, text.substr(0, bytes), {});
      ASSERT_FALSE(cut.complete) << bytes;
      ASSERT_LE(cut.torn_lines, 1);
      const int64_t now = measure_transcript(cut).agent_turns;
      ASSERT_GE(now, turns);
      turns = now;
    }
    EXPECT_EQ(turns, 3);
    EXPECT_TRUE(read_transcript(format, text, {}).complete);
  }
}

TEST(AteTranscript, CodexTellsTotals) {
  const Measures measures =
      measure_transcript(read_transcript(TranscriptFormat::codex, kCodex, {}));
  EXPECT_EQ(measures.agent_turns, 3);  // reasoning and ls; the change; the message
  EXPECT_EQ(measures.tool_calls, 2);
  EXPECT_TRUE(measures.context_is_mean);
  EXPECT_EQ(measures.per_turn_context, 3000);
  EXPECT_EQ(measures.output_tokens, 300);
  EXPECT_FALSE(measures.files_read.has_value()) << "it reads by commands";
  const Measures cut =
      measure_transcript(read_transcript(TranscriptFormat::codex, first_lines(kCodex, 7), {}));
  EXPECT_EQ(cut.agent_turns, 3);
  EXPECT_FALSE(cut.output_tokens.has_value()) << "usage comes last";
  EXPECT_FALSE(cut.per_turn_context.has_value());
  EXPECT_FALSE(
      read_transcript(TranscriptFormat::codex, kCodex + "{\"type\":\"turn.started\"}\n", {})
          .complete);
  const Transcript lost = read_transcript(
      TranscriptFormat::codex,
      first_lines(kCodex, 4) +
          R"({"type":"turn.failed","error":{"message":"stream disconnected before completion"}})",
      {});
  EXPECT_FALSE(lost.complete);
  EXPECT_TRUE(is_network_error(lost.error));
}

TEST(AteTranscript, ClaudeSubagentsLieBetweenAMessage) {
  const std::vector<double> arrival_s = {0, 1, 2, 3, 4, 5, 5000, 5001, 5002, 5010, 5010};
  const Transcript transcript =
      read_transcript(TranscriptFormat::claude, recorded("claude_subagents"), arrival_s);
  EXPECT_TRUE(transcript.complete);
  const Measures measures = measure_transcript(transcript);
  EXPECT_EQ(measures.agent_turns, 4);
  EXPECT_EQ(measures.tool_calls, 3);
  EXPECT_EQ(measures.per_turn_context, (200 + 4005) / 2.0);
  EXPECT_EQ(measures.output_tokens, 60) << "subagents write, too";
  EXPECT_DOUBLE_EQ(measures.session_duration_s, 5010) << "a subagent's turn ends no call";
  const std::map<std::string, Price> prices = {{"claude-x", {2, 0.5, 10}},
                                               {"claude-y", {1, 0.1, 5, 3}}};
  EXPECT_NEAR(*session_cost(transcript, "", prices),
              1e-6 * (11 * 2 + 9000 * 0.5 + 40 * 10 + 210 * 1 + 90 * 3 + 20 * 5), 1e-12);
  EXPECT_FALSE(session_cost(transcript, "", {{"claude-x", {2, 0.5, 10}}}).has_value())
      << "a model without a price is not free";
}

TEST(AteTranscript, CodexCallsOfOneInvocationOverlap) {
  const Transcript transcript =
      read_transcript(TranscriptFormat::codex, recorded("codex_parallel"), {});
  EXPECT_TRUE(transcript.complete) << "it reconnected";
  const Measures measures = measure_transcript(transcript);
  EXPECT_EQ(measures.agent_turns, 2) << "the two calls and the plan; the message";
  EXPECT_EQ(measures.tool_calls, 2);
  EXPECT_EQ(measures.per_turn_context, 4000);
  EXPECT_NEAR(*session_cost(transcript, "gpt-x", {{"gpt-x", {1, 0.1, 10}}}),
              1e-6 * (2000 * 1 + 6000 * 0.1 + 300 * 10), 1e-12);
}

TEST(AteTranscript, CodexSessionFilesTellTurns) {
  const Transcript transcript =
      read_transcript(TranscriptFormat::codex, recorded("codex_session"), {});
  EXPECT_TRUE(transcript.complete);
  EXPECT_EQ(transcript.model, "gpt-x");
  const Measures measures = measure_transcript(transcript);
  EXPECT_EQ(measures.agent_turns, 2) << "a count that is repeated is no turn";
  EXPECT_EQ(measures.tool_calls, 1);
  EXPECT_FALSE(measures.context_is_mean);
  EXPECT_EQ(measures.per_turn_context, 2000);
  EXPECT_EQ(measures.output_tokens, 70);
  EXPECT_DOUBLE_EQ(measures.session_duration_s, 20 * 60 + 21) << "the tool ran for 20 minutes";
}

TEST(AteTranscript, ClaudeErrorResultIsNoEnd) {
  const Transcript failed = read_transcript(
      TranscriptFormat::claude,
      first_lines(kClaude, 3) + R"({"type":"result","subtype":"error_during_execution",)"
                                R"("is_error":true,"result":"Connection error."})",
      {});
  EXPECT_FALSE(failed.complete);
  EXPECT_TRUE(is_network_error(failed.error));
  EXPECT_FALSE(is_network_error("error_max_turns: "));
  for (const char* result : {R"({"type":"result","subtype":"error_max_turns","is_error":false})",
                             R"({"type":"result","subtype":"success","is_error":true})"}) {
    EXPECT_FALSE(
        read_transcript(TranscriptFormat::claude, first_lines(kClaude, 3) + result, {}).complete)
        << result;
  }
}

TEST(AteTranscript, GenericAndStamps) {
  const std::string text = R"({"type":"turn","t":0,"input_tokens":100,"output_tokens":7,"model":"m"}
{"type":"turn","t":700,"input_tokens":300,"output_tokens":8}
{"type":"tool_call","t":700,"id":"a","name":"read","read_path":"x"}
{"type":"tool_result","t":1500,"id":"a"}
{"type":"turn","timestamp":"1970-01-01T00:25:10.5Z","input_tokens":200,"output_tokens":9}
{"type":"end"}
)";
  const Transcript transcript = read_transcript(TranscriptFormat::generic, text, {});
  EXPECT_TRUE(transcript.complete);
  const Measures measures = measure_transcript(transcript);
  EXPECT_EQ(measures.per_turn_context, 200);
  EXPECT_DOUBLE_EQ(measures.session_duration_s, 600 + 800 + 10.5);
  EXPECT_FALSE(read_transcript(TranscriptFormat::generic, first_lines(text, 5), {}).complete);
}

TEST(AteMeasures, MedianRunLogsAndDiffs) {
  EXPECT_EQ(median({4, 1, 3, 2}), 2.5);
  EXPECT_EQ(median({}), 0);
  Measures measures;
  add_run_log("start 100.5 gpu\nbusy 12.5\nexit 130.5 0\n", measures);
  add_run_log("start 10 cpu\nexit 15 1\n", measures);
  add_run_log("start 10 gpu\n", measures);  // never ended
  EXPECT_DOUBLE_EQ(measures.active_gpu_s, 30);
  EXPECT_DOUBLE_EQ(measures.gpu_busy_s, 12.5);
  EXPECT_DOUBLE_EQ(measures.cpu_simulated_s, 5);
  EXPECT_EQ(
      count_changed_lines("diff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -1,2 +1,2 @@\n-a\n+b\n c\n"
                          "diff --git a/y b/y\n--- a/y\n+++ b/y\n@@ -1 +1 @@\n--- z\n"),
      3);
}

}  // namespace
}  // namespace ate
