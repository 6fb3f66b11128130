// Mistakes of distributed trainers as mutants of this one: `check` finds each within four seeds,
// names it, and prints a command that finds it again. Those that
// need another program are in tests/sim/corpus_test.cc (1, 4, 5, 10); number 13, a torn checkpoint,
// is tests/checkpoint/checkpoint_faults_test.cc.
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
  return run_binary(arguments);
}

TEST(Corpus, CheckFindsEveryMutantOfTheTrainerAndItsReproFindsItAgain) {
  for (const Mutant& mutant : kMutants) {
    std::vector<std::string> arguments = {"check", "configs/quickstart.toml", "--seeds", "4"};
    for (const std::string& set : mutant.sets) arguments.insert(arguments.end(), {"--set", set});
    arguments.insert(arguments.end(), {"--set", fmt::format("faults=[{{{}}}]", mutant.fault)});
    const BinaryRun run = run_binary(arguments);
    EXPECT_EQ(run.exit_code, mutant.exit_code) << mutant.number << ": " << run.output;
    EXPECT_NE(run.output.find(mutant.cause), std::string::npos) << mutant.number << run.output;
    const BinaryRun again = run_repro(run.output);
    EXPECT_EQ(again.exit_code, mutant.exit_code) << mutant.number << ": " << again.output;
  }
}

}  // namespace

}  // namespace cambium
