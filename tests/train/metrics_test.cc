// The run directory's files: what is written reads back, survives a kill and resumes cleanly.
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/resource.h>

#include <bit>
#include <cmath>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>

#include "src/base/check.h"
#include "src/train/metrics_writer.h"
#include "src/train/run_history.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;

// A directory that the test owns.
class RunDirectory : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "cambium-run-XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    directory_ = pattern;
  }
  void TearDown() override { fs::remove_all(directory_); }
  std::string read(const std::string& name) const {
    std::ifstream stream(directory_ + "/" + name, std::ios::binary);
    std::ostringstream text;
    text << stream.rdbuf();
    return text.str();
  }
  void append(const std::string& name, const std::string& text) const {
    std::ofstream(directory_ + "/" + name, std::ios::binary | std::ios::app) << text;
  }
  std::string directory_;
};

StepMetrics sample_step(int64_t step) {
  StepMetrics metrics;
  metrics.step = step;
  metrics.loss = 5.0 / static_cast<double>(step) + 0.1;
  metrics.grad_norm = 1.0 / 3.0;
  metrics.lr = std::bit_cast<double>(0x3F50624DD2F1A9FBull + static_cast<uint64_t>(step));
  metrics.step_ms = 12.5;
  metrics.tokens_per_s = 81'920;
  metrics.tokens = 1024;
  metrics.digest = "00112233445566778899aabbccddeeff";
  metrics.balance_loss = 0.7;
  metrics.expert_load = {{1, 2, 3, 1018}, {}, {256, 256, 256, 256}};
  return metrics;
}

void expect_same_double(double got, double want) {
  EXPECT_EQ(std::bit_cast<uint64_t>(got), std::bit_cast<uint64_t>(want)) << got << " " << want;
}

TEST_F(RunDirectory, StepsReadBackToTheBit) {
  {
    MetricsWriter writer(directory_, 0, EventFiles::off);
    for (int64_t step = 1; step <= 50; ++step) writer.write_step(sample_step(step));
    writer.write_exit({0, "done", ""});
  }
  const RunHistory history = read_run_history(directory_);
  ASSERT_EQ(history.steps.size(), 50u);
  EXPECT_EQ(history.unreadable_lines, 0);
  for (int64_t step = 1; step <= 50; ++step) {
    const StepMetrics& got = history.steps[static_cast<size_t>(step) - 1];
    const StepMetrics want = sample_step(step);
    EXPECT_EQ(got.step, step);
    expect_same_double(got.loss, want.loss);
    expect_same_double(got.lr, want.lr);
    expect_same_double(got.grad_norm, want.grad_norm);
    EXPECT_EQ(got.tokens, want.tokens);
    EXPECT_EQ(got.digest, want.digest);
    EXPECT_EQ(got.expert_load, want.expert_load);
    ASSERT_TRUE(got.balance_loss.has_value());
    EXPECT_FALSE(got.validation_loss.has_value());
  }
  ASSERT_TRUE(history.exit.has_value());
  EXPECT_EQ(history.exit->code, 0);
  const std::string text = read("metrics.jsonl");
  const std::string last = text.substr(text.rfind('\n', text.size() - 2) + 1);
  EXPECT_EQ(last, "{\"event\":\"exit\",\"code\":0,\"reason\":\"done\",\"resume\":null}\n");
}

TEST_F(RunDirectory, NonFiniteNumbersAreNullWithTheirSpelling) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  StepMetrics metrics = sample_step(1);
  metrics.loss = std::numeric_limits<double>::quiet_NaN();
  metrics.grad_norm = kInfinity;
  metrics.validation_loss = -kInfinity;
  MetricsWriter(directory_, 0, EventFiles::on).write_step(metrics);
  EXPECT_NE(read("metrics.jsonl").find("\"loss\":null"), std::string::npos);
  const StepMetrics got = read_run_history(directory_).steps.at(0);
  EXPECT_TRUE(std::isnan(got.loss));
  EXPECT_EQ(got.grad_norm, kInfinity);
  EXPECT_EQ(got.validation_loss.value(), -kInfinity);
}

TEST_F(RunDirectory, ALineIsOnDiskWhenItsCallReturns) {
  MetricsWriter writer(directory_, 0, EventFiles::off);
  writer.write_step(sample_step(1));
  EXPECT_EQ(read_run_history(directory_).steps.size(), 1u);
  writer.write_step(sample_step(2));
  EXPECT_EQ(read_run_history(directory_).steps.size(), 2u);
}

TEST_F(RunDirectory, ResumedFileEqualsAStraightOne) {
  {
    MetricsWriter writer(directory_, 0, EventFiles::off);
    for (int64_t step = 1; step <= 9; ++step) writer.write_step(sample_step(step));
    writer.write_exit({0, "done", ""});
  }
  const std::string straight = read("metrics.jsonl");
  fs::remove(directory_ + "/metrics.jsonl");
  {
    MetricsWriter writer(directory_, 0, EventFiles::off);
    for (int64_t step = 1; step <= 6; ++step) writer.write_step(sample_step(step));
    writer.write_exit({75, "SIGTERM", "cambium train --resume"});
  }
  append("metrics.jsonl", "{\"step\":7,\"lo");  // torn
  {
    MetricsWriter writer(directory_, 4, EventFiles::off);
    EXPECT_EQ(read_run_history(directory_).steps.size(), 4u);
    EXPECT_FALSE(read_run_history(directory_).exit.has_value());
    for (int64_t step = 5; step <= 9; ++step) writer.write_step(sample_step(step));
    writer.write_exit({0, "done", ""});
  }
  EXPECT_EQ(read("metrics.jsonl"), straight);
}

TEST_F(RunDirectory, EveryTornLastLineIsDropped) {
  { MetricsWriter(directory_, 0, EventFiles::off).write_step(sample_step(1)); }
  const std::string line = read("metrics.jsonl");
  for (size_t length = 0; length < line.size(); ++length) {
    fs::remove(directory_ + "/metrics.jsonl");
    append("metrics.jsonl", line + line.substr(0, length));
    MetricsWriter writer(directory_, 1, EventFiles::off);
    ASSERT_EQ(read("metrics.jsonl"), line) << length;
  }
}

TEST_F(RunDirectory, StepsMayNotGoBack) {
  MetricsWriter writer(directory_, 5, EventFiles::off);
  EXPECT_THROW(writer.write_step(sample_step(5)), Error);
  writer.write_step(sample_step(6));
  EXPECT_THROW(writer.write_step(sample_step(6)), Error);
}

TEST_F(RunDirectory, DigestsOfTheLoadedStepAreCompared) {
  {
    MetricsWriter writer(directory_, 0, EventFiles::off);
    writer.write_digests({0, {{"embedding", "aa"}}});
    writer.write_digests({3, {{"embedding", "bb"}}});
    writer.write_digests({4, {{"embedding", "cc"}}});
  }
  {
    MetricsWriter writer(directory_, 3, EventFiles::off);
    writer.write_digests({3, {{"embedding", "bb"}}});  // as saved: not written twice
    writer.write_digests({4, {{"embedding", "cc"}}});
  }
  const std::vector<StepDigests> all = read_digests(directory_);
  ASSERT_EQ(all.size(), 3u);
  EXPECT_EQ(all[0].step, 0);
  EXPECT_EQ(all[2].digests.at("embedding"), "cc");
  MetricsWriter writer(directory_, 4, EventFiles::off);
  try {
    writer.write_digests({4, {{"embedding", "dd"}}});
    FAIL() << "another digest for a saved step passes";
  } catch (const Error& error) {
    EXPECT_EQ(error.exit_code(), ExitCode::verification_mismatch);
  }
}

TEST_F(RunDirectory, AFullDiskExits31) {
  MetricsWriter writer(directory_, 0, EventFiles::off);
  writer.write_step(sample_step(1));
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  rlimit tight = before;
  tight.rlim_cur = fs::file_size(directory_ + "/metrics.jsonl") + 10;
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &tight), 0);
  ExitCode code = ExitCode::done;
  try {
    writer.write_step(sample_step(2));
  } catch (const Error& error) {
    code = error.exit_code();
  }
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(code, ExitCode::io);
  EXPECT_EQ(read_run_history(directory_).steps.size(), 1u);  // the torn line is not a step
}

TEST_F(RunDirectory, RunRecordReadsBack) {
  RunRecord record;
  record.name = "quickstart";
  record.layout = "dp 8, ep 4";
  record.seed = 0xFFFFFFFFFFFFFFFFull;
  record.ranks = 8;
  record.bigram_loss = 2.25;
  write_run_record(directory_, record);
  const RunRecord got = read_run_record(directory_);
  EXPECT_EQ(got.name, record.name);
  EXPECT_EQ(got.layout, record.layout);
  EXPECT_EQ(got.seed, record.seed);
  EXPECT_EQ(got.ranks, 8);
  EXPECT_FALSE(got.unigram_loss.has_value());
  EXPECT_EQ(got.bigram_loss.value(), 2.25);
}

TEST_F(RunDirectory, ReadersSkipDamageAndRefuseOtherDirectories) {
  append("metrics.jsonl",
         "{\"step\":1,\"loss\":\"high\",\"expert_load\":[1,[\"x\",2]]}\nnull\n[]\n{]\n");
  const RunHistory history = read_run_history(directory_);
  EXPECT_EQ(history.steps.size(), 1u);
  EXPECT_EQ(history.unreadable_lines, 3);
  append("run.json", "{\"name\":");
  EXPECT_EQ(read_run_record(directory_).name, "");
  fs::remove(directory_ + "/metrics.jsonl");
  try {
    read_run_history(directory_);
    FAIL() << "a directory without metrics passes";
  } catch (const Error& error) {
    EXPECT_EQ(error.exit_code(), ExitCode::usage);
  }
}

}  // namespace
}  // namespace cambium
