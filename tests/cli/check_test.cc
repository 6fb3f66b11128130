// `cambium check` passes on what is right, and names the cause of each injected fault.
#include <gtest/gtest.h>

#include <chrono>
#include <fstream>
#include <sstream>

#include "fmt/format.h"
#include "tests/cli/run_binary.h"
#include "tests/tree.h"

namespace cambium {

namespace {

constexpr int kSlowCheckS = 400;  // of half a minute, on a machine in use

struct FaultCase {
  const char* kind;
  int exit_code;
  const char* cause;  // what the message must hold
};

// dp 4 with ep 2 of the small model of configs/tiny.toml.
std::string faulty_config(const char* kind, int64_t rank = 3) {
  return fmt::format(
      "[model]\nlayers = 2\nhidden = 32\nheads = 4\nkv_heads = 2\nhead_dim = 8\nexperts = 8\n"
      "top_k = 2\nexpert_hidden = 24\nvocab = 300\nmax_positions = 64\n"
      "[train]\nsteps = 4\nglobal_batch_sequences = 8\nsequence_length = 32\n"
      "[numerics]\nblock_tokens = 16\n[parallel]\ndp = 4\nep = 2\n"
      "[[faults]]\nkind = \"{}\"\nrank = {}\nstep = 1\n",
      kind, rank);
}

TEST(Check, PassesOnTheShippedConfigurationsWithinAMinute) {
  for (const char* path : {"configs/quickstart.toml", "configs/tiny.toml"}) {
    const auto start = std::chrono::steady_clock::now();
    const BinaryRun run = run_binary({"check", path});
    EXPECT_EQ(run.exit_code, 0) << run.output;
    EXPECT_NE(run.output.find("PASS"), std::string::npos);
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(60));
  }
}

TEST(Check, NamesTheCauseOfEveryFault) {
  const ScratchDirectory scratch;
  const FaultCase cases[] = {
      {"wrong_count", 22, "count"},
      {"swapped_collectives", 22, "skipped or reordered"},
      {"skipped_collective", 22, "skipped or reordered"},
      {"expert_gradient_scale", 51, "2 times that of one rank: a wrong gradient scale"},
      {"rng_rank", 51, "initial weights differ: a rank draws from another random stream"},
      {"routing_order", 51, "the routing sort is not stable by (token, k)"},
  };
  for (const FaultCase& fault : cases) {
    const std::string path =
        scratch.write(fmt::format("{}.toml", fault.kind), faulty_config(fault.kind));
    const BinaryRun run = run_binary({"check", path});
    EXPECT_EQ(run.exit_code, fault.exit_code) << fault.kind << ": " << run.output;
    EXPECT_NE(run.output.find(fault.cause), std::string::npos) << fault.kind << ": " << run.output;
    EXPECT_NE(run.output.find("REPRO: cambium check"), std::string::npos) << run.output;
  }
}

TEST(Check, NamesTheCauseOfFaultsInPipelinesAndContexts) {
  const ScratchDirectory scratch;
  const FaultCase cases[] = {
      {"swapped_send", 51,
       "its gradient has other terms: tokens lost, repeated or sent to the wrong place"},
      {"missing_micro_batch", 51, "tokens lost, repeated or sent to the wrong place"},
      {"zigzag_half", 51, "tokens lost, repeated or sent to the wrong place"},
      {"gradient_axis", 51, "tokens are missing, or gradients are summed over the wrong ranks"},
  };
  for (const FaultCase& fault : cases) {
    // Targets are read by the last stage, the other faults strike the first.
    const int64_t rank = fault.kind == std::string("missing_micro_batch") ? 7 : 3;
    const std::string path =
        scratch.write(fmt::format("{}.toml", fault.kind), faulty_config(fault.kind, rank));
    const BinaryRun run =
        run_binary({"check", path, "--set", "parallel.pp=2", "--set", "parallel.dp=2", "--set",
                    "parallel.cp=2", "--set", "numerics.block_tokens=8"});
    EXPECT_EQ(run.exit_code, fault.exit_code) << fault.kind << ": " << run.output;
    EXPECT_NE(run.output.find(fault.cause), std::string::npos) << fault.kind << ": " << run.output;
  }
  // K and V of a ring's first hop change places.
  const std::string path = scratch.write("ring.toml", faulty_config("swapped_send"));
  const BinaryRun run =
      run_binary({"check", path, "--set", "parallel.dp=2", "--set", "parallel.cp=2", "--set",
                  "parallel.context=ring", "--set", "numerics.block_tokens=8"});
  EXPECT_EQ(run.exit_code, 51) << run.output;
  // Without a pipeline or a context there is nothing to strike.
  for (const char* kind : {"swapped_send", "zigzag_half"}) {
    const std::string path = scratch.write("nothing.toml", faulty_config(kind));
    EXPECT_EQ(run_binary({"check", path}).exit_code, 2) << kind;
  }
}

// The twin of configs/quickstart.toml has half the layers, and so no such call.
TEST(Check, FindsWhatOnlyTheFullShapeShows) {
  const FaultCase cases[] = {
      {"wrong_count", 22, "call #"},
      {"swapped_collectives", 22, "skipped or reordered"},
      {"skipped_collective", 22, "skipped or reordered"},
  };
  for (const FaultCase& fault : cases) {
    const BinaryRun run =
        run_binary({"check", "configs/quickstart.toml", "--set",
                    fmt::format("faults=[{{kind=\"{}\",rank=3,site=\"expert#20\"}}]", fault.kind)});
    EXPECT_EQ(run.exit_code, fault.exit_code) << fault.kind << ": " << run.output;
    for (const char* text : {fault.cause, "'expert' [0,1,2,3]", "src/model/", "REPRO: "}) {
      EXPECT_NE(run.output.find(text), std::string::npos) << fault.kind << ": " << run.output;
    }
  }
  const BinaryRun clean = run_binary({"check", "configs/quickstart.toml", "--json"});
  EXPECT_EQ(clean.exit_code, 0) << clean.output;
  EXPECT_NE(clean.output.find("\"at full shape 2 steps of all 8 ranks match"), std::string::npos)
      << clean.output;
}

TEST(Check, PassesOnSixtyFourRanksOfAThirtyBillionParameterModel) {
  const BinaryRun run =
      run_binary({"check", "configs/qwen3-30b-a3b-8x8.toml", "--seeds", "1"}, {}, kSlowCheckS);
  EXPECT_EQ(run.exit_code, 0) << run.output;
  EXPECT_NE(run.output.find("at full shape 2 steps of all 64 ranks match, cannot deadlock"),
            std::string::npos)
      << run.output;
}

TEST(Check, FindsAMissingWait) {
  const ScratchDirectory scratch;
  const std::string path = scratch.write("f.toml", faulty_config("missing_wait"));
  const auto run = [&](const char* site) {
    return run_binary(
        {"check", path, "--set",
         fmt::format("faults=[{{kind=\"missing_wait\", rank=3, site=\"{}\"}}]", site)});
  };
  const BinaryRun missing = run("qwen3_moe.cc");
  EXPECT_EQ(missing.exit_code, 51) << missing.output;
  for (const char* text : {"rank 3, step 1: race: nothing orders two accesses", "REPRO: "}) {
    EXPECT_NE(missing.output.find(text), std::string::npos) << missing.output;
  }
  EXPECT_EQ(run("no_such_place").exit_code, 2);
  EXPECT_EQ(run_binary({"train", path, "--out", scratch.path() + "/run"}).exit_code, 2);
}

std::string with_single_spaces(const std::string& text) {
  std::istringstream words(text);
  std::string joined, word;
  while (words >> word) joined += (joined.empty() ? "" : " ") + word;
  return joined;
}

// README's samples, which leave out what "..." stands for.
TEST(Check, PrintsTheReportsThatReadmeShows) {
  std::ifstream file(std::string(source_directory()) + "/README.md");
  const std::string readme{std::istreambuf_iterator<char>(file), {}};
  struct Sample {
    const char* begins;
    std::vector<std::string> sets;
  };
  const Sample samples[] = {
      {"rank 1, step 1: race: ", {"faults=[{kind=\"missing_wait\",rank=1,site=\"qwen3_moe.cc\"}]"}},
      {"deadlock: cycle of ranks ",
       {"parallel.pp=2", "parallel.dp=4",
        "faults=[{kind=\"skipped_collective\",rank=7,site=\"pipeline\"}]"}},
  };
  for (const Sample& sample : samples) {
    std::vector<std::string> arguments = {"check", "configs/quickstart.toml"};
    for (const std::string& set : sample.sets) {
      EXPECT_NE(readme.find(set), std::string::npos) << set;
      arguments.insert(arguments.end(), {"--set", set});
    }
    const std::string output = with_single_spaces(run_binary(arguments).output);
    // The command that finds it again needs one layer.
    EXPECT_NE(output.find("--set 'model.layers=1' --schedule fifo"), std::string::npos) << output;
    const size_t begin = readme.find(std::string("    ") + sample.begins);
    ASSERT_NE(begin, std::string::npos) << sample.begins;
    std::string shown =
        with_single_spaces(readme.substr(begin, readme.find("\n\n", begin) - begin)) + " ...";
    for (size_t end = 0; (end = shown.find(" ...")) != std::string::npos;) {
      const std::string part = shown.substr(0, end);
      EXPECT_NE(output.find(part), std::string::npos) << "README: " << part << "\n" << output;
      shown.erase(0, std::min(shown.size(), end + 5));
    }
  }
}

TEST(Check, TrainRefusesFaultsUnlessAllowed) {
  const ScratchDirectory scratch;
  const std::string path = scratch.write("f.toml", faulty_config("rng_rank"));
  const BinaryRun run = run_binary({"train", path, "--out", scratch.path() + "/run"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_NE(run.output.find("run.allow_faults"), std::string::npos) << run.output;
}

}  // namespace

}  // namespace cambium
