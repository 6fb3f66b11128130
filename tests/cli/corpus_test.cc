// Mistakes of distributed trainers as mutants of this one: `check` finds each within four seeds,
// names it, and prints a command that finds it again; a torn checkpoint (13), which `check` has
// none of, is found by the restart. Those that need another program are in tests/sim/corpus_test.cc
// (1, 4, 5, 10). scripts/corpus.sh runs all fifteen, and what is right at 1,000 seeds.
#include <gtest/gtest.h>

#include "fmt/format.h"
#include "tests/cli/run_binary.h"

namespace cambium {

namespace {

struct Mutant {
  int number;  // of the list in the test's name
  const char* fault;
  int exit_code;
  const char* cause;
  std::vector<std::string> sets;
};

const std::vector<std::string> kPipeline = {"parallel.pp=2", "parallel.dp=4", "parallel.ep=2"};
const std::vector<std::string> kFast = {"numerics.reduction=\"fast\""};

const Mutant kMutants[] = {
    {2, "kind=\"skipped_collective\", rank=3", 22, "skipped or reordered", {}},
    {3, "kind=\"skipped_collective\", rank=5, site=\"world\"", 22, "skipped or reordered", {}},
    {6, "kind=\"wrong_count\", rank=2, site=\"world\"", 22, "count", {}},
    {7, "kind=\"missing_wait\", rank=1, site=\"qwen3_moe.cc\"", 51, "race", {}},
    {8, "kind=\"missing_wait\", rank=1, site=\"pipeline_pass.cc\"", 51, "race", kPipeline},
    {9, "kind=\"stuck_rank\", rank=6, site=\"expert#2\"", 21, "alive but stuck", {}},
    {11, "kind=\"rng_rank\", rank=3", 51, "draws from another random stream", {}},
    {12, "kind=\"expert_gradient_scale\", rank=3", 51, "wrong gradient scale", {}},
    {14, "kind=\"missing_micro_batch\", rank=7", 51, "tokens lost", kPipeline},
    {15, "kind=\"arrival_order_sum\"", 51, "same terms in another order", kFast},
};

constexpr int kLimitS = 300;  // a REPRO line is shrunk in up to 400 runs, on a machine in use

BinaryRun run_repro(const std::string& output) {
  const size_t at = output.find("REPRO: cambium ");
  if (at == std::string::npos) return {};
  std::vector<std::string> arguments;
  std::string word;
  bool quoted = false;
  for (size_t i = at + 15; i < output.size() && output[i] != '\n'; ++i) {
    if (output[i] == '\'') {
      quoted = !quoted;
    } else if (output[i] == ' ' && !quoted) {
      arguments.push_back(std::exchange(word, ""));
    } else {
      word += output[i];
    }
  }
  arguments.push_back(word);
  return run_binary(arguments, {}, kLimitS);
}

void expect_found(const Mutant& mutant, int64_t seeds) {
  std::vector<std::string> arguments = {"check", "configs/quickstart.toml", "--seeds",
                                        fmt::format("{}", seeds)};
  for (const std::string& set : mutant.sets) arguments.insert(arguments.end(), {"--set", set});
  arguments.insert(arguments.end(), {"--set", fmt::format("faults=[{{{}}}]", mutant.fault)});
  const BinaryRun run = run_binary(arguments, {}, kLimitS);
  EXPECT_EQ(run.exit_code, mutant.exit_code) << mutant.number << ": " << run.output;
  EXPECT_NE(run.output.find(mutant.cause), std::string::npos) << mutant.number << run.output;
  // Fewer layers, and no deviation from first in, first out where none is needed.
  EXPECT_NE(run.output.find("--set 'model.layers=1' --schedule fifo"), std::string::npos)
      << mutant.number << ": " << run.output;
  const BinaryRun again = run_repro(run.output);
  EXPECT_EQ(again.exit_code, mutant.exit_code) << mutant.number << ": " << again.output;
}

TEST(Corpus, CheckFindsEveryMutantOfTheTrainerAndItsReproFindsItAgain) {
  for (const Mutant& mutant : kMutants) expect_found(mutant, 4);
}

// 13: the newest checkpoint lost half of a shard, then a rank is lost. The restart names the file
// and goes on from the one before, to the bits of a run without faults.
TEST(Corpus, RestartFindsATornCheckpoint) {
  const ScratchDirectory scratch;
  std::string text;
  for (int i = 0; i < 400; ++i) text += fmt::format("Line {} of a small corpus.\n", i);
  const std::string corpus = scratch.write("corpus.txt", text);
  const auto train = [&](const std::string& name, const std::string& faults, bool resume) {
    std::vector<std::string> arguments = {"train", "configs/tiny.toml", "--out",
                                          scratch.path() + "/" + name};
    for (const std::string& set :
         {fmt::format("data.train=[\"{}\"]", corpus), std::string("parallel.dp=4"),
          std::string("parallel.ep=2"), std::string("train.steps=6"),
          std::string("checkpoint.every_steps=2"), std::string("train.sample_tokens=0"),
          std::string("run.allow_faults=true"), "faults=[" + faults + "]"}) {
      arguments.insert(arguments.end(), {"--set", set});
    }
    if (resume) arguments.emplace_back("--resume");
    return run_binary(arguments);
  };
  ASSERT_EQ(train("whole", "", false).exit_code, 0);
  const BinaryRun lost =
      train("torn", "{kind='torn_write',rank=3,step=4},{kind='rank_crash',rank=1,step=5}", false);
  EXPECT_EQ(lost.exit_code, 20) << lost.output;
  const BinaryRun resumed = train("torn", "", true);
  EXPECT_EQ(resumed.exit_code, 0) << resumed.output;
  EXPECT_NE(resumed.output.find("step-00000004"), std::string::npos) << resumed.output;
  EXPECT_NE(resumed.output.find("resume: from step 2"), std::string::npos) << resumed.output;
  const BinaryRun equal =
      run_binary({"compare", scratch.path() + "/whole", scratch.path() + "/torn"});
  EXPECT_EQ(equal.exit_code, 0) << equal.output;
}

// scripts/corpus.sh runs it beside the mutants: what is right stays right in a thousand schedules.
TEST(Corpus, DISABLED_TrainerIsCleanAtAThousandSeeds) {
  const BinaryRun clean =
      run_binary({"check", "configs/quickstart.toml", "--seeds", "1000"}, {}, 500);
  EXPECT_EQ(clean.exit_code, 0) << clean.output;
}

}  // namespace

}  // namespace cambium
