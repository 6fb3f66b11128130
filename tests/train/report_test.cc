// report.html of finished, running, damaged and empty runs: whole, escaped and self-contained.
#include "src/train/report.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>

#include "src/base/check.h"
#include "src/train/metrics_writer.h"
#include "src/train/report_chart.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;

class Report : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "cambium-report-XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    directory_ = pattern;
  }
  void TearDown() override { fs::remove_all(directory_); }
  void append(const char* name, const std::string& text) const {
    std::ofstream(directory_ + "/" + name, std::ios::app) << text;
  }
  void write_steps(int64_t steps) const {
    MetricsWriter writer(directory_, 0, EventFiles::off);
    StepMetrics metrics;
    metrics.expert_load = {{10, 30}, {}, {20, 20}};
    metrics.tokens = 1024;
    for (metrics.step = 1; metrics.step <= steps; ++metrics.step) {
      metrics.loss = 1.0 + 4.0 / static_cast<double>(metrics.step);
      metrics.validation_loss.reset();
      if (metrics.step % 10 == 0) metrics.validation_loss = metrics.loss + 0.5;
      writer.write_step(metrics);
    }
  }
  std::string report() const {
    write_report(directory_);
    std::ifstream stream(directory_ + "/report.html");
    std::ostringstream text;
    text << stream.rdbuf();
    const std::string html = text.str();
    EXPECT_EQ(html.rfind("</body></html>\n"), html.size() - 15);
    EXPECT_EQ(html.find("://"), std::string::npos) << "asks for something outside the file";
    EXPECT_EQ(html.find("nan"), std::string::npos);
    return html;
  }
  std::string directory_;
};

size_t count_of(const std::string& text, const std::string& part) {
  size_t count = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

TEST_F(Report, FinishedRunShowsEveryPart) {
  write_steps(40);
  append("metrics.jsonl", "{\"event\":\"exit\",\"code\":0,\"reason\":\"done\",\"resume\":null}\n");
  RunRecord record;
  record.name = "quickstart";
  record.layout = "dp 8, ep 4";
  record.unigram_loss = 3.0;
  record.bigram_loss = 2.5;
  write_run_record(directory_, record);
  append("samples.txt", "It is a truth");
  append("config.resolved.toml", "[model]\nlayers = 4\n");
  const std::string html = report();
  EXPECT_EQ(count_of(html, "<section class='card chart'>"), 5u);
  EXPECT_EQ(count_of(html, "<table class='heat roomy'>"), 2u);
  for (const char* part : {"finished", "quickstart", "dp 8, ep 4", "unigram 3.000", "bigram 2.500",
                           "It is a truth", "layers = 4", "1.50 of the mean", "validation"}) {
    EXPECT_NE(html.find(part), std::string::npos) << part;
  }
}

TEST_F(Report, RunningAndTornRunsAreShownAsFarAsTheyWent) {
  write_steps(7);
  append("metrics.jsonl", "{\"step\":8,\"loss\":1.2");
  const std::string html = report();
  EXPECT_NE(html.find("no exit event"), std::string::npos);
  EXPECT_NE(html.find("step 7"), std::string::npos);
  EXPECT_NE(html.find("Unreadable lines"), std::string::npos);
}

TEST_F(Report, FailedRunShowsWhy) {
  write_steps(3);
  append("metrics.jsonl",
         "{\"event\":\"exit\",\"code\":50,\"reason\":\"<b>loss\",\"resume\":\"cambium train\"}\n");
  const std::string html = report();
  EXPECT_NE(html.find("exit 50: &lt;b&gt;loss"), std::string::npos);
  EXPECT_NE(html.find("cambium train"), std::string::npos);
}

TEST_F(Report, RunWithoutStepsAndWithoutOtherFiles) {
  write_steps(0);
  const std::string html = report();
  EXPECT_NE(html.find("No step has finished."), std::string::npos);
}

TEST_F(Report, NonFiniteValuesLeaveAGap) {
  {
    MetricsWriter writer(directory_, 0, EventFiles::off);
    StepMetrics metrics;
    for (metrics.step = 1; metrics.step <= 5; ++metrics.step) {
      metrics.loss = metrics.step == 3 ? std::numeric_limits<double>::infinity() : 2.0;
      writer.write_step(metrics);
    }
  }
  const std::string html = report();
  EXPECT_EQ(html.find("inf\""), std::string::npos);
  EXPECT_NE(html.find("null"), std::string::npos);
}

TEST_F(Report, TextOfTheModelCannotBecomeMarkup) {
  write_steps(1);
  append("samples.txt", "</pre><script>alert('x')</script>&\x01");
  const std::string html = report();
  EXPECT_EQ(html.find("<script>alert"), std::string::npos);
  EXPECT_NE(html.find("&lt;/pre&gt;&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;<"),
            std::string::npos);
}

TEST_F(Report, OtherDirectoriesExit2) {
  try {
    write_report(directory_);
    FAIL() << "a directory without metrics passes";
  } catch (const Error& error) {
    EXPECT_EQ(error.exit_code(), ExitCode::usage);
  }
}

TEST(ReportChart, LongSeriesKeepTheirSpikes) {
  ChartSeries series{"loss", "blue", SeriesMark::line, {}, {}};
  for (int step = 0; step < 100'000; ++step) {
    series.x.push_back(step);
    series.y.push_back(step == 54'321 ? 97.5 : 1.0);
  }
  const std::string html = chart_html({"Loss", "", ChartFloor::data, {series}, {}});
  EXPECT_NE(html.find("97.5"), std::string::npos);
  EXPECT_LT(html.size(), 60'000u);
}

TEST(ReportChart, CountsReadWell) {
  EXPECT_EQ(count_text(0), "0");
  EXPECT_EQ(count_text(999), "999");
  EXPECT_EQ(count_text(1234), "1,234");
  EXPECT_EQ(count_text(-307'200), "-307,200");
  EXPECT_EQ(count_text(1'300'000), "1.3 M");
  EXPECT_EQ(count_text(2.5e9), "2.5 G");
}

}  // namespace
}  // namespace cambium
