// cambium plan as a user runs it: text, JSON, the timeline, and a layout that does not fit.
#include <sys/resource.h>

#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "fmt/format.h"
#include "gtest/gtest.h"
#include "tests/cli/run_binary.h"
#include "tests/tree.h"

namespace cambium {
namespace {

// Between simulated ranks, as between processes: measured, written, and what plan then goes by.
TEST(PlanCommand, LinksAreMeasuredIntoAMachineThatPlanReads) {
  ScratchDirectory scratch;
  const std::string machine = scratch.path() + "/here.toml";
  const BinaryRun measured =
      run_binary({"calibrate", "--links", "laptop", "--out", machine, "--ranks", "4"});
  ASSERT_EQ(measured.exit_code, 0) << measured.output;
  for (const char* kind : {"all_to_all_v", "all_gather", "reduce_scatter", "all_reduce"}) {
    EXPECT_NE(measured.output.find(kind), std::string::npos) << measured.output;
  }
  std::stringstream text;
  text << std::ifstream(machine).rdbuf();
  EXPECT_NE(text.str().find("calibrate --links laptop: 4 simulated ranks"), std::string::npos);
  const auto plan = [&](const std::string& name) {
    const BinaryRun run =
        run_binary({"plan", "configs/quickstart.toml", "--machine", name, "--json", "--set",
                    "parallel.dp=4", "--set", "parallel.ep=4"});
    EXPECT_EQ(run.exit_code, 0) << run.output;
    return nlohmann::json::parse(run.output);
  };
  const auto before = plan("laptop"), after = plan(machine);
  EXPECT_EQ(after["machine"], "here");
  EXPECT_NE(after["step_ms"], before["step_ms"]);
  EXPECT_EQ(after["peak_bytes"], before["peak_bytes"]);
}

// Kernels, copies and launches of this machine; and what they say of steps they were not fitted to.
TEST(PlanCommand, CalibrateWritesAMachineThatPlanReads) {
  ScratchDirectory scratch;
  const std::string machine = scratch.path() + "/here.toml";
  const BinaryRun measured =
      run_binary({"calibrate", "--device", "cpu", "--out", machine}, {}, 600);
  ASSERT_EQ(measured.exit_code, 0) << measured.output;
  const BinaryRun plan = run_binary({"plan", "configs/quickstart.toml", "--machine", machine});
  EXPECT_EQ(plan.exit_code, 0) << plan.output;
  EXPECT_NE(plan.output.find("on here, 8 ranks"), std::string::npos) << plan.output;
  const BinaryRun check = run_binary({"calibrate", "--check", machine}, {}, 300);
  // A shared machine's times promise nothing: 51 says that their mean error is above the bar.
  EXPECT_TRUE(check.exit_code == 0 || check.exit_code == 51) << check.output;
  EXPECT_NE(check.output.find("of 12 steps not used in the fit"), std::string::npos);
  EXPECT_NE(check.output.find("memory equal to the byte"), std::string::npos) << check.output;
}

TEST(PlanCommand, JsonHasItsKeysAndTheTraceTheFiveStages) {
  ScratchDirectory scratch;
  const std::string trace = scratch.path() + "/trace.json";
  const BinaryRun run = run_binary({"plan", "configs/quickstart.toml", "--machine", "laptop",
                                    "--json", "--trace", trace, "--set", "parallel.pp=2", "--set",
                                    "parallel.dp=4", "--set", "parallel.ep=2"});
  ASSERT_EQ(run.exit_code, 0) << run.output;
  const nlohmann::json plan = nlohmann::json::parse(run.output);
  for (const char* key :
       {"machine", "ranks", "simulated_ranks", "step_ms", "tokens_per_s_per_rank", "mfu",
        "exposed_communication", "pipeline_bubble", "extrapolated", "links_extrapolated",
        "peak_bytes", "device_bytes", "fits", "ops", "by_rank"}) {
    EXPECT_TRUE(plan.contains(key)) << key;
  }
  EXPECT_EQ(plan["ranks"], 8);
  EXPECT_GT(plan["pipeline_bubble"].get<double>(), 0);
  // 8 sequences of 128 tokens a step.
  const double rate = 8 * plan["tokens_per_s_per_rank"].get<double>();
  EXPECT_NEAR(1e-3 * plan["step_ms"].get<double>() * rate, 8 * 128, 1e-6);
  ASSERT_EQ(plan["by_rank"].size(), 8u);
  // Ops of all ranks, the dearest first; on the compute streams they are what keeps ranks busy.
  int64_t busy_ns = 0, ops_ns = 0, last_ns = INT64_MAX;
  for (const auto& rank : plan["by_rank"]) busy_ns += rank["busy_ns"].get<int64_t>();
  for (const auto& op : plan["ops"]) {
    const auto time_ns = op["time_ns"].get<int64_t>();
    EXPECT_LE(time_ns, last_ns);
    EXPECT_GT(op["calls"].get<int64_t>(), 0) << op;
    ops_ns += last_ns = time_ns;
  }
  EXPECT_GT(plan["ops"].size(), 20u);
  EXPECT_NEAR(static_cast<double>(ops_ns) / static_cast<double>(busy_ns), 1, 0.05);
  for (const auto& rank : plan["by_rank"]) {
    int64_t sum = 0;
    for (const auto& [name, bytes] : rank["peak_by_class"].items()) sum += bytes.get<int64_t>();
    EXPECT_EQ(sum, rank["peak_bytes"].get<int64_t>());
    EXPECT_EQ(rank["peak_by_class"].size(), 6u);
    EXPECT_NE(rank["peak_at"].get<std::string>().find(", at '"), std::string::npos) << rank;
  }
  std::ifstream file(trace);
  const nlohmann::json events = nlohmann::json::parse(file)["traceEvents"];
  std::set<std::pair<int, std::string>> seen;
  for (const auto& event : events) seen.emplace(event["pid"].get<int>(), event["name"]);
  for (int rank = 0; rank < 8; ++rank) {
    for (const char* stage : {"attend", "dispatch", "expert", "combine", "aggregate"}) {
      EXPECT_EQ(seen.count({rank, stage}), 1u) << rank << " " << stage;
    }
  }
}

// What docs/dualpipev.svg shows: with its pairs' stages in turn, a step exposes far less of what
// travels than the same list pass after pass.
TEST(PlanCommand, PairsHideTravellingRowsAndTheTimelineShowsThem) {
  ScratchDirectory scratch;
  std::map<std::string, nlohmann::json> plans;
  for (const char* overlap : {"true", "false"}) {
    std::vector<std::string> line = {"plan",       "configs/quickstart.toml",
                                     "--machine",  "dgx-h200",
                                     "--fold",     "--json",
                                     "--timeline", scratch.path() + "/" + overlap + ".svg"};
    for (const char* assignment :
         {"model=qwen3-30b-a3b", "model.layers=16", "run.device=cuda", "numerics.compute=bf16",
          "numerics.reduction=fast", "train.sequence_length=4096", "train.micro_batch_sequences=1",
          "train.global_batch_sequences=80", "parallel.pp=4", "parallel.dp=8", "parallel.ep=8",
          "parallel.schedule=dualpipev", "logging.digest_every_steps=100"}) {
      line.insert(line.end(), {"--set", assignment});
    }
    line.insert(line.end(), {"--set", std::string("parallel.overlap=") + overlap});
    const BinaryRun run = run_binary(line);
    ASSERT_EQ(run.exit_code, 0) << run.output;
    plans[overlap] = nlohmann::json::parse(run.output);
  }
  EXPECT_LT(plans["true"]["exposed_communication"].get<double>(),
            0.8 * plans["false"]["exposed_communication"].get<double>());
  EXPECT_LT(plans["true"]["step_ms"].get<double>(), plans["false"]["step_ms"].get<double>());
  const auto text_of = [](const std::string& path) {
    std::stringstream text;
    text << std::ifstream(path).rdbuf();
    return text.str();
  };
  const std::string svg = text_of(scratch.path() + "/true.svg");
  EXPECT_TRUE(svg == text_of(std::string(source_directory()) + "/docs/dualpipev.svg"))
      << "draw docs/dualpipev.svg again, with README's command";
  EXPECT_NE(svg, text_of(scratch.path() + "/false.svg"));
  for (const char* part : {"rank 0 compute", "rank 8 comm", "rank 24 pipe", "\"attend forward\"",
                           "\"expert backward\"", "\"expert weights\"", "\"dispatch backward\""}) {
    EXPECT_NE(svg.find(part), std::string::npos) << part;
  }
}

struct ScaleCase {
  const char *ranks, *pp, *ep;
  bool folds;
};

// Seconds of a core that a plan of Qwen3-30B-A3B takes, with 8 micro-batches of 4,096 tokens.
double plan_core_s(const ScaleCase& scale) {
  const auto used_s = [] {
    rusage usage{};
    getrusage(RUSAGE_CHILDREN, &usage);
    const auto seconds = [](const timeval& time) {
      return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
    };
    return seconds(usage.ru_utime) + seconds(usage.ru_stime);
  };
  const std::string dp = fmt::format("{}", 64 / std::stoi(scale.pp));
  std::vector<std::string> line{
      "plan", "configs/quickstart.toml", "--machine", "dgx-h200", "--ranks", scale.ranks};
  if (scale.folds) line.emplace_back("--fold");
  for (const std::string& assignment :
       {std::string("model=qwen3-30b-a3b"), std::string("run.device=cuda"),
        std::string("numerics.compute=bf16"), std::string("numerics.reduction=fast"),
        std::string("train.sequence_length=4096"), std::string("train.micro_batch_sequences=1"),
        std::string("logging.digest_every_steps=100"), "parallel.dp=" + dp,
        std::string("parallel.pp=") + scale.pp, std::string("parallel.ep=") + scale.ep,
        fmt::format("train.global_batch_sequences={}", 8 * std::stoi(dp))}) {
    line.insert(line.end(), {"--set", assignment});
  }
  const double before = used_s();
  const BinaryRun run = run_binary(line, {}, 300);
  EXPECT_EQ(run.exit_code, 0) << run.output;
  EXPECT_NE(run.output.find(fmt::format("{} ranks", scale.ranks)), std::string::npos);
  return used_s() - before;
}

// Twice the time that is claimed, as tests run beside others.
TEST(PlanCommand, ManyRanksTakeSeconds) {
  EXPECT_LT(plan_core_s({"64", "1", "64", false}), 2 * 2);
  EXPECT_LT(plan_core_s({"64", "4", "16", false}), 2 * 2);
  EXPECT_LT(plan_core_s({"16384", "4", "16", true}), 2 * 10);
}

// Half a minute and 4 GB each.
TEST(PlanCommand, DISABLED_AThousandRanksTakeAMinute) {
  EXPECT_LT(plan_core_s({"1024", "1", "64", false}), 60);
  EXPECT_LT(plan_core_s({"1024", "4", "16", false}), 60);
}

// What goes by shapes or sizes beyond the machine file's says so.
// Bubbles of 4 stages and 8 micro-batches: 3 of 11 for one stage after another and the uneven
// stages beside; less for schedules that fill them.
TEST(PlanCommand, BubblesAreThoseOfTheSchedules) {
  std::map<std::string, double> bubbles;
  for (const std::string schedule : {"gpipe", "1f1b", "zb_h1", "zb_v"}) {
    std::vector<std::string> line{
        "plan", "configs/quickstart.toml", "--machine", "dgx-h200", "--fold", "--json"};
    for (const std::string assignment :
         {"model=qwen3-30b-a3b", "run.device=cuda", "numerics.compute=bf16",
          "numerics.reduction=fast", "train.sequence_length=4096", "train.micro_batch_sequences=1",
          "train.global_batch_sequences=64", "logging.digest_every_steps=100", "parallel.pp=4",
          "parallel.dp=8", "parallel.ep=8"}) {
      line.insert(line.end(), {"--set", assignment});
    }
    line.insert(line.end(), {"--set", "parallel.schedule=" + schedule});
    const BinaryRun run = run_binary(line);
    ASSERT_EQ(run.exit_code, 0) << run.output;
    bubbles[schedule] = nlohmann::json::parse(run.output)["pipeline_bubble"].get<double>();
  }
  EXPECT_GT(bubbles["gpipe"], 3.0 / 11);
  EXPECT_LT(bubbles["gpipe"], 3.0 / 11 + 0.12);
  EXPECT_NEAR(bubbles["1f1b"], bubbles["gpipe"], 0.01);
  EXPECT_LT(bubbles["zb_h1"], bubbles["1f1b"] - 0.02);
  EXPECT_LT(bubbles["zb_v"], bubbles["zb_h1"] - 0.05);
}

TEST(PlanCommand, ExtrapolationIsSaid) {
  const auto plan = [](const std::string& machine) {
    return run_binary({"plan", "configs/qwen3-30b-a3b-1x8.toml", "--machine", machine}).output;
  };
  const auto share = [](const std::string& output) {
    const size_t note = output.find("NOTE: "), end = output.find(" % of the ops' time");
    return note == std::string::npos ? 0.0 : std::stod(output.substr(note + 6, end - note - 6));
  };
  const std::string measured = plan("dgx-h200"), scaled = plan("dgx-b200");
  EXPECT_GT(share(scaled), 90) << scaled;
  EXPECT_LT(share(measured), 60) << measured;
  EXPECT_NE(measured.find("NOTE: some transfers are smaller or larger than those measured"),
            std::string::npos);
}

TEST(PlanCommand, WhatDoesNotFitExits40) {
  const BinaryRun run =
      run_binary({"plan", "configs/quickstart.toml", "--machine", "dgx-h100", "--set",
                  "run.device=\"cuda\"", "--set", "numerics.compute=\"bf16\"", "--set",
                  "model=\"qwen3-30b-a3b\"", "--set", "train.sequence_length=4096"});
  EXPECT_EQ(run.exit_code, 40) << run.output;
  EXPECT_NE(run.output.find("DOES NOT FIT"), std::string::npos) << run.output;
}

TEST(PlanCommand, RanksScaleTheBatchAndARecordedRunIsARouting) {
  ScratchDirectory scratch;
  const std::string loads = scratch.write(
      "metrics.jsonl",
      "{\"step\":1,\"expert_load\":[[9,1,1,1],[1,1,9,1]]}\n{\"event\":\"exit\",\"code\":0}\n");
  const BinaryRun run =
      run_binary({"plan", "configs/tiny.toml", "--machine", "laptop", "--ranks", "4", "--json",
                  "--set", "parallel.ep=1", "--set", "plan.routing=" + loads});
  ASSERT_EQ(run.exit_code, 0) << run.output;
  EXPECT_EQ(nlohmann::json::parse(run.output)["ranks"], 4);
}

}  // namespace
}  // namespace cambium
