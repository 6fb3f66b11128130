// What progress prints where stderr is not a terminal, and the balance figure.
#include "src/train/progress.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace cambium {
namespace {

std::string printed(std::FILE* file) {
  std::rewind(file);
  std::string text;
  for (int letter = 0; (letter = std::fgetc(file)) != EOF;) text += static_cast<char>(letter);
  return text;
}

StepMetrics step_at(int64_t step) {
  StepMetrics metrics;
  metrics.step = step;
  metrics.loss = 2.5;
  metrics.tokens_per_s = 12'345;
  metrics.expert_load = {{10, 30}, {20, 20}};
  return metrics;
}

TEST(Progress, ImbalanceIsThatOfTheWorstLayer) {
  EXPECT_EQ(expert_imbalance({{10, 30}, {20, 20}}), 1.5);
  EXPECT_EQ(expert_imbalance({{0, 0, 0, 8}}), 4.0);
  EXPECT_EQ(expert_imbalance({{}, {0, 0}}), 0.0);
  EXPECT_EQ(expert_imbalance({}), 0.0);
}

TEST(Progress, FirstStepPrintsAtOnceInPlainText) {
  std::FILE* file = std::tmpfile();
  Progress::Options options;
  options.total_steps = 100;
  options.out = file;
  Progress progress(options);
  progress.update(step_at(1));
  EXPECT_EQ(printed(file),
            "step 1/100  loss 2.5000  12.3k tokens/s  experts max/mean 1.50  ETA --:--\n");
  std::fclose(file);
}

TEST(Progress, LinesAreFewAndTheLastIsThere) {
  std::FILE* file = std::tmpfile();
  Progress::Options options;
  options.total_steps = 1000;
  options.out = file;
  Progress progress(options);
  for (int64_t step = 1; step <= 1000; ++step) progress.update(step_at(step));
  progress.note("samples");
  const std::string text = printed(file);
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 22);  // 1, 51, ..., 951, 1000, the note
  EXPECT_EQ(text.find('\x1b'), std::string::npos);
  EXPECT_EQ(text.find('\r'), std::string::npos);
  EXPECT_NE(text.find("step 1000/1000"), std::string::npos);
  EXPECT_NE(text.find("ETA 00:00\nsamples\n"), std::string::npos);
  std::fclose(file);
}

TEST(Progress, SilentPrintsNothing) {
  std::FILE* file = std::tmpfile();
  Progress::Options options;
  options.total_steps = 2;
  options.style = ProgressStyle::silent;
  options.out = file;
  Progress progress(options);
  progress.update(step_at(1));
  progress.note("note");
  progress.finish();
  EXPECT_EQ(printed(file), "");
  std::fclose(file);
}

TEST(Progress, BarIsOneLineThatIsDrawnOver) {
  std::FILE* file = std::tmpfile();
  Progress::Options options;
  options.total_steps = 2;
  options.style = ProgressStyle::bar;
  options.out = file;
  Progress progress(options);
  progress.update(step_at(1));
  progress.update(step_at(2));
  progress.finish();
  const std::string text = printed(file);
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1);
  EXPECT_EQ(std::count(text.begin(), text.end(), '\r'), 2);
  EXPECT_EQ(text.find('\x1b'), std::string::npos);
  EXPECT_EQ(text.back(), '\n');
  std::fclose(file);
}

}  // namespace
}  // namespace cambium
