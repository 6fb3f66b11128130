// Whole runs through the binary: outputs, resume in other layouts, signals, golden parity.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "fmt/format.h"
#include "tests/cli/run_binary.h"
#include "tests/tree.h"

namespace cambium {

namespace {

// Text enough for a few sequences of bytes.
std::string corpus() {
  std::string text;
  for (int i = 0; i < 400; ++i) {
    text += fmt::format("Line {} of a small corpus, {} words long.\n", i, i % 7);
  }
  return text;
}

std::string small_config(const ScratchDirectory& scratch) {
  const std::string text = scratch.write("corpus.txt", corpus());
  return scratch.write(
      "small.toml",
      fmt::format("[model]\nlayers = 2\nhidden = 32\nheads = 4\nkv_heads = 2\nhead_dim = 8\n"
                  "experts = 8\ntop_k = 2\nexpert_hidden = 24\nvocab = 300\nmax_positions = 64\n"
                  "[data]\ntrain = [\"{}\"]\n"
                  "[train]\nsteps = 6\nglobal_batch_sequences = 8\nsequence_length = 32\n"
                  "sample_tokens = 20\neval_sequences = 8\n[numerics]\nblock_tokens = 8\n"
                  "[balance]\nloss = \"global_batch_lagged\"\nbias_update_rate = 0.01\n"
                  "[parallel]\ndp = 4\nep = 2\n[checkpoint]\nevery_steps = 2\n",
                  text));
}

std::string last_step_line(const std::string& run) {
  std::ifstream file(run + "/metrics.jsonl");
  std::string line, last;
  while (std::getline(file, line)) {
    if (line.find("\"digest\"") != std::string::npos) last = line;
  }
  return last.substr(0, last.find("\"step_ms\"")) + last.substr(last.find("\"digest\""), 45);
}

std::string file_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// The file is of the last steps, in global order: the layout, a stop and a resume leave no mark.
TEST(Train, RoutingTraceOfALayoutIsThatOfOneRankByteForByte) {
  const ScratchDirectory scratch;
  const std::string config = small_config(scratch), one = scratch.path() + "/one.h5";
  const std::string four = scratch.path() + "/sub/four.h5", run = scratch.path() + "/four";
  const auto traced = [&](std::vector<std::string> arguments, const std::string& file) {
    arguments.insert(arguments.begin(), {"train", config});
    arguments.insert(arguments.end(), {"--trace-routing", file, "--trace-steps", "2"});
    const BinaryRun ended = run_binary(arguments);
    EXPECT_EQ(ended.exit_code, 0) << ended.output;
    return ended.output;
  };
  const std::string single = "parallel={dp=1,ep=1}";
  EXPECT_NE(traced({"--out", scratch.path() + "/one", "--set", single}, one).find("steps 5 to 6"),
            std::string::npos);
  EXPECT_EQ(run_binary({"train", config, "--out", run, "--stop-after-step", "4"}).exit_code, 0);
  traced({"--out", run, "--resume"}, four);
  EXPECT_GT(file_bytes(one).size(), 2u * 2 * 2 * 8 * 32 * 2 * 4);
  EXPECT_TRUE(file_bytes(four) == file_bytes(one));
  EXPECT_FALSE(std::filesystem::exists(four + ".tmp"));
  const BinaryRun late =
      run_binary({"train", config, "--out", run, "--resume", "--trace-routing", four});
  EXPECT_EQ(late.exit_code, 2) << late.output;
  EXPECT_NE(late.output.find("none is left to trace"), std::string::npos) << late.output;
}

TEST(Train, ResumeRefusesAnotherRouting) {
  const ScratchDirectory scratch;
  const std::string config = small_config(scratch), run = scratch.path() + "/run";
  EXPECT_EQ(run_binary({"train", config, "--out", run, "--stop-after-step", "2", "--trace-routing",
                        scratch.path() + "/t.h5"})
                .exit_code,
            0);
  const BinaryRun other =
      run_binary({"train", config, "--out", run, "--resume", "--set", "balance.routing=even"});
  EXPECT_EQ(other.exit_code, 2);
  EXPECT_NE(other.output.find("balance.routing"), std::string::npos) << other.output;
  const BinaryRun shape =
      run_binary({"train", config, "--out", run + "2", "--set", "balance.routing=replay", "--set",
                  "balance.routing_file=" + scratch.path() + "/t.h5", "--set", "model.top_k=3"});
  EXPECT_EQ(shape.exit_code, 2);
  EXPECT_NE(shape.output.find("model.top_k = 2, not 3"), std::string::npos) << shape.output;
  EXPECT_FALSE(std::filesystem::exists(run + "2"));
}

TEST(Train, WritesEveryOutputAndResumesBitExactInOtherLayouts) {
  const ScratchDirectory scratch;
  const std::string config = small_config(scratch), a = scratch.path() + "/a";
  const BinaryRun straight = run_binary({"train", config, "--out", a});
  ASSERT_EQ(straight.exit_code, 0) << straight.output;
  for (const char* name : {"config.resolved.toml", "run.json", "metrics.jsonl", "digests.jsonl",
                           "samples.txt", "report.html"}) {
    EXPECT_TRUE(std::filesystem::exists(a + "/" + name)) << name;
  }
  EXPECT_EQ(run_binary({"train", config, "--out", a}).exit_code, 33);
  const char* layouts[][2] = {{"1", "1"}, {"2", "2"}, {"8", "4"}, {"8", "8"}};
  for (int stop = 1; stop <= 4; ++stop) {
    const std::string b = fmt::format("{}/b{}", scratch.path(), stop);
    const BinaryRun first =
        run_binary({"train", config, "--out", b, "--stop-after-step", std::to_string(stop)});
    ASSERT_EQ(first.exit_code, 0) << first.output;
    const auto& layout = layouts[stop - 1];
    const BinaryRun second = run_binary({"train", config, "--out", b, "--resume", "--set",
                                         fmt::format("parallel.dp={}", layout[0]), "--set",
                                         fmt::format("parallel.ep={}", layout[1])});
    ASSERT_EQ(second.exit_code, 0) << second.output;
    EXPECT_EQ(last_step_line(b), last_step_line(a)) << "stop after " << stop;
    const BinaryRun equal = run_binary({"compare", a, b});
    EXPECT_EQ(equal.exit_code, 0) << equal.output;
  }
  const BinaryRun other =
      run_binary({"train", config, "--out", scratch.path() + "/c", "--set", "run.seed=5"});
  ASSERT_EQ(other.exit_code, 0) << other.output;
  EXPECT_EQ(run_binary({"compare", a, scratch.path() + "/c"}).exit_code, 51);
}

// Each step of one run in another layout, every one of them from the last one's checkpoint; with
// moments in bf16, whose rounding depends on element and step alone.
TEST(Train, CheckpointsMoveBetweenLayoutsOfAllDimensions) {
  const ScratchDirectory scratch;
  const std::string config = small_config(scratch), a = scratch.path() + "/a";
  const std::string moments = "optimizer.state_dtype=bf16";
  ASSERT_EQ(run_binary({"train", config, "--out", a, "--set", moments}).exit_code, 0);
  const std::vector<std::string> layouts[] = {
      {"parallel.dp=1", "parallel.ep=1", "parallel.sharding=none"},
      {"parallel.dp=2", "parallel.ep=2", "parallel.pp=2", "parallel.schedule=dualpipev",
       "parallel.sharding=full"},
      {"parallel.dp=2", "parallel.ep=4", "parallel.cp=2", "parallel.sharding=zero2"},
      {"parallel.dp=1", "parallel.ep=1", "parallel.pp=2", "parallel.schedule=zb_h1"},
      {"parallel.dp=8", "parallel.ep=8", "parallel.sharding=full"},
      {"parallel.dp=1", "parallel.ep=2", "parallel.cp=2", "parallel.pp=2",
       "parallel.schedule=interleaved_1f1b"},
  };
  const std::string b = scratch.path() + "/b";
  for (int64_t step = 1; step <= 6; ++step) {
    std::vector<std::string> arguments{
        "train", config, "--out", b, "--set", moments, "--stop-after-step", std::to_string(step)};
    if (step > 1) arguments.push_back("--resume");
    for (const std::string& set : layouts[step - 1]) {
      arguments.push_back("--set");
      arguments.push_back(set);
    }
    const BinaryRun run = run_binary(arguments);
    ASSERT_EQ(run.exit_code, 0) << step << ": " << run.output;
  }
  EXPECT_EQ(last_step_line(b), last_step_line(a));
  EXPECT_EQ(run_binary({"compare", a, b}).exit_code, 0);
}

TEST(Train, ResumeRefusesAnotherModelAndCompletesAFinishedRun) {
  const ScratchDirectory scratch;
  const std::string config = small_config(scratch), a = scratch.path() + "/a";
  ASSERT_EQ(run_binary({"train", config, "--out", a}).exit_code, 0);
  std::filesystem::remove(a + "/report.html");
  const BinaryRun again = run_binary({"train", config, "--out", a, "--resume"});
  EXPECT_EQ(again.exit_code, 0) << again.output;
  EXPECT_TRUE(std::filesystem::exists(a + "/report.html"));
  const BinaryRun other =
      run_binary({"train", config, "--out", a, "--resume", "--set", "optimizer.lr=0.5"});
  EXPECT_EQ(other.exit_code, 2);
  EXPECT_NE(other.output.find("optimizer.lr"), std::string::npos) << other.output;
}

TEST(Train, EvalAndGenerateReadTheRun) {
  const ScratchDirectory scratch;
  const std::string config = small_config(scratch), a = scratch.path() + "/a";
  ASSERT_EQ(run_binary({"train", config, "--out", a}).exit_code, 0);
  const BinaryRun eval = run_binary({"eval", a, "--json"});
  EXPECT_EQ(eval.exit_code, 0) << eval.output;
  EXPECT_NE(eval.output.find("bits_per_byte"), std::string::npos);
  const BinaryRun text = run_binary({"generate", a, "--tokens", "8", "--seed", "3"});
  EXPECT_EQ(text.exit_code, 0) << text.output;
  EXPECT_EQ(run_binary({"generate", a, "--tokens", "8", "--seed", "3"}).output, text.output);
}

TEST(Parity, GoldenModelsPassOnEveryLayout) {
  const std::string goldens = std::string(source_directory()) + "/../shared/golden/";
  if (!std::filesystem::exists(goldens)) GTEST_SKIP() << "skipped: no golden directories";
  for (const char* name : {"qwen3_moe", "mixtral", "olmoe"}) {
    for (const auto& [dp, ep] : {std::pair{1, 1}, {2, 1}, {2, 2}}) {
      const BinaryRun run =
          run_binary({"parity", goldens + name, "--set", fmt::format("parallel.dp={}", dp), "--set",
                      fmt::format("parallel.ep={}", ep)});
      EXPECT_EQ(run.exit_code, 0) << name << ": " << run.output;
    }
    const BinaryRun stages =
        run_binary({"parity", goldens + name, "--set", "parallel.pp=2", "--set",
                    "parallel.schedule=1f1b", "--set", "parallel.sharding=full"});
    EXPECT_EQ(stages.exit_code, 0) << name << ": " << stages.output;
  }
}

// The embedding's gradient is the sum of both of its uses, in one reduction mode as in the other.
TEST(Parity, TiedEmbeddingPassesOnEveryLayout) {
  const std::string golden = std::string(source_directory()) + "/tests/golden/qwen3_moe_tied";
  for (const char* layout : {"parallel.dp=1", "parallel.dp=2", "parallel.pp=2"}) {
    for (const char* reduction : {"numerics.reduction=exact", "numerics.reduction=fast"}) {
      const BinaryRun run = run_binary({"parity", golden, "--set", layout, "--set", reduction});
      EXPECT_EQ(run.exit_code, 0) << layout << " " << reduction << ": " << run.output;
    }
  }
}

// Dense layers, biases, a sliding window and YaRN; a gated shared expert; on layouts that spread
// all of them.
TEST(Parity, OptionsOfTheFamiliesPassOnEveryLayout) {
  const std::vector<std::vector<std::string>> layouts = {
      {},
      {"parallel.dp=2", "numerics.reduction=fast"},
      {"parallel.dp=2", "parallel.ep=2"},
      {"parallel.pp=4", "parallel.dp=2", "parallel.sharding=full"},
      {"parallel.pp=2", "parallel.cp=2", "numerics.block_tokens=8"},
      {"parallel.dp=2", "parallel.cp=2", "numerics.block_tokens=8", "parallel.context=ring",
       "numerics.reduction=fast"}};
  for (const char* name : {"qwen3_moe_options", "qwen2_moe"}) {
    const std::string golden = std::string(source_directory()) + "/tests/golden/" + name;
    for (const std::vector<std::string>& layout : layouts) {
      std::vector<std::string> arguments = {"parity", golden};
      for (const std::string& assignment : layout) {
        arguments.insert(arguments.end(), {"--set", assignment});
      }
      const BinaryRun run = run_binary(arguments);
      EXPECT_EQ(run.exit_code, 0) << run.output;
    }
  }
}

}  // namespace

}  // namespace cambium
