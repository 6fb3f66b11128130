// Faults as a user meets them: refused, struck, recovered from; and a flipped bit, which no run
// notices, found by `check` and by `compare`.
#include <gtest/gtest.h>

#include <fstream>

#include "fmt/format.h"
#include "tests/cli/run_binary.h"

namespace cambium {

namespace {

std::string config_to_break(const ScratchDirectory& scratch) {
  std::string text;
  for (int i = 0; i < 400; ++i) text += fmt::format("Line {} of a small corpus.\n", i);
  const std::string corpus = scratch.write("corpus.txt", text);
  return scratch.write(
      "break.toml",
      fmt::format("[model]\nlayers = 2\nhidden = 32\nheads = 4\nkv_heads = 2\nhead_dim = 8\n"
                  "experts = 8\ntop_k = 2\nexpert_hidden = 24\nvocab = 300\nmax_positions = 64\n"
                  "[data]\ntrain = [\"{}\"]\n"
                  "[train]\nsteps = 6\nglobal_batch_sequences = 8\nsequence_length = 32\n"
                  "sample_tokens = 0\n[numerics]\nblock_tokens = 8\n[parallel]\ndp = 4\nep = 2\n"
                  "[checkpoint]\nevery_steps = 2\n",
                  corpus));
}

struct Trainer {
  std::string config, directory;
  BinaryRun run(const std::string& name, const std::string& faults, bool resume = false) const {
    std::vector<std::string> arguments = {"train", config, "--out", directory + "/" + name,
                                          "--set", faults, "--set", "run.allow_faults=true"};
    if (resume) arguments.emplace_back("--resume");
    return run_binary(arguments);
  }
  BinaryRun compare(const std::string& name) const {
    return run_binary({"compare", directory + "/whole", directory + "/" + name});
  }
};

TEST(Faults, AStruckRunGoesOnWithoutItsFaultToTheSameBits) {
  const ScratchDirectory scratch;
  const Trainer trainer{config_to_break(scratch), scratch.path()};
  ASSERT_EQ(trainer.run("whole", "faults=[]").exit_code, 0);
  const struct {
    const char* fault;
    int exit_code;
    const char* says;
  } cases[] = {
      {"kind='lost_peer',rank=2,step=4", 20, "lost in a save"},
      {"kind='disk_full',rank=1,step=4", 31, "No space left"},
      {"kind='failed_write',rank=3,step=6,site='#1'", 31, "Input/output error"},
      {"kind='pause',rank=1,step=3,seconds=400", 21, "for longer than 300 s of virtual time"},
      {"kind='rank_crash',probability=1", 20, "faults drawn from seed 1: 1 strike"},
  };
  for (const auto& row : cases) {
    const std::string name = fmt::format("struck-{}", &row - cases);
    const BinaryRun struck = trainer.run(name, fmt::format("faults=[{{{}}}]", row.fault));
    EXPECT_EQ(struck.exit_code, row.exit_code) << struck.output;
    EXPECT_NE(struck.output.find(row.says), std::string::npos) << struck.output;
    const BinaryRun resumed = trainer.run(name, "faults=[]", true);
    EXPECT_EQ(resumed.exit_code, 0) << resumed.output;
    EXPECT_EQ(trainer.compare(name).exit_code, 0) << row.fault;
  }
}

TEST(Faults, ASlowRankLeavesNoMark) {
  const ScratchDirectory scratch;
  const BinaryRun run = run_binary({"check", config_to_break(scratch), "--seeds", "6", "--set",
                                    "faults=[{kind='slow_rank',rank=2}]"});
  EXPECT_EQ(run.exit_code, 0) << run.output;
  for (const char* text : {"(fault: slow_rank on rank 2", "6 explored schedules"}) {
    EXPECT_NE(run.output.find(text), std::string::npos) << run.output;
  }
}

TEST(Faults, FlippedBitIsRefusedUnlessAllowedAndThenFound) {
  const ScratchDirectory scratch;
  const Trainer trainer{config_to_break(scratch), scratch.path()};
  const std::string flip = "faults=[{kind='bit_flip',rank=1,step=2}]";
  const BinaryRun refused =
      run_binary({"train", trainer.config, "--out", scratch.path() + "/no", "--set", flip});
  EXPECT_EQ(refused.exit_code, 2) << refused.output;
  const BinaryRun check = run_binary({"check", trainer.config, "--set", flip});
  EXPECT_EQ(check.exit_code, 51) << check.output;
  EXPECT_NE(check.output.find("step 2, tensor '"), std::string::npos) << check.output;
  ASSERT_EQ(trainer.run("whole", "faults=[]").exit_code, 0);
  ASSERT_EQ(trainer.run("flipped", flip).exit_code, 0);  // no value is out of the ordinary
  const BinaryRun compared = trainer.compare("flipped");
  EXPECT_EQ(compared.exit_code, 51) << compared.output;
  EXPECT_NE(compared.output.find("first difference: step 2, loss"), std::string::npos)
      << compared.output;
}

}  // namespace

}  // namespace cambium
