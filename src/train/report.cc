#include "src/train/report.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>
#include <vector>

#include "src/base/check.h"
#include "src/base/io.h"
#include "src/train/progress.h"
#include "src/train/report_chart.h"
#include "src/train/report_page.h"
#include "src/train/run_history.h"

namespace cambium {
namespace {

constexpr size_t kMostSampleBytes = 20'000;
constexpr size_t kSmoothedPoints = 60;  // windows of the smoothed loss along a run

std::string read_text_file(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  std::ostringstream text;
  text << stream.rdbuf();
  return text.str();
}

template <class Get>
ChartSeries make_series(const RunHistory& history, const char* name, const char* color, Get get) {
  ChartSeries series{name, color, SeriesMark::line, {}, {}};
  for (const StepMetrics& metrics : history.steps) {
    const std::optional<double> value = get(metrics);
    if (!value.has_value()) continue;
    series.x.push_back(static_cast<double>(metrics.step));
    series.y.push_back(*value);
  }
  return series;
}

// Mean over the neighbours on both sides, so that a curve does not lag behind its points;
// non-finite values are left out.
ChartSeries smoothed_series(const ChartSeries& raw, const char* name) {
  ChartSeries series = raw;
  series.name = name;
  const size_t count = raw.y.size();
  const size_t reach = count / kSmoothedPoints;
  for (size_t index = 0; index < count; ++index) {
    const size_t side = std::min({reach, index, count - 1 - index});  // even to both sides
    const size_t begin = index - side;
    const size_t end = index + side + 1;
    double sum = 0;
    double finite = 0;
    for (size_t near = begin; near < end; ++near) {
      if (!std::isfinite(raw.y[near])) continue;
      sum += raw.y[near];
      finite += 1;
    }
    series.y[index] = finite > 0 ? sum / finite : std::numeric_limits<double>::quiet_NaN();
  }
  return series;
}

std::string loss_chart(const RunHistory& history, const RunRecord& record) {
  ChartSpec chart{"Loss", "nats per token, mean over the global batch", ChartFloor::data, {}, {}};
  ChartSeries raw = make_series(history, "each step", "blue", [](const StepMetrics& metrics) {
    return std::optional<double>(metrics.loss);
  });
  chart.series.push_back(raw);
  chart.series[0].mark = SeriesMark::faint_line;
  chart.series.push_back(smoothed_series(raw, "training, smoothed"));
  ChartSeries validation = make_series(history, "validation", "orange",
                                       [](const auto& metrics) { return metrics.validation_loss; });
  validation.mark = SeriesMark::points;
  if (!validation.x.empty()) chart.series.push_back(validation);
  if (record.unigram_loss) chart.levels.push_back({"unigram", *record.unigram_loss});
  if (record.bigram_loss) chart.levels.push_back({"bigram", *record.bigram_loss});
  return chart_html(chart);
}

std::string small_charts(const RunHistory& history) {
  const auto one = [&](const char* title, const char* note, const char* color, auto get) {
    ChartSpec chart{title, note, ChartFloor::zero, {make_series(history, title, color, get)}, {}};
    return chart.series[0].x.empty() ? std::string() : chart_html(chart);
  };
  using Value = std::optional<double>;
  std::string html;
  html += one("Learning rate", "after warm-up and decay", "violet",
              [](const StepMetrics& metrics) { return Value(metrics.lr); });
  html += one("Gradient norm", "global, before clipping", "green",
              [](const StepMetrics& metrics) { return Value(metrics.grad_norm); });
  html += one("Throughput", "tokens per second", "blue",
              [](const StepMetrics& metrics) { return Value(metrics.tokens_per_s); });
  html += one("Expert imbalance", "largest over mean load, worst layer; 1 is even", "orange",
              [](const StepMetrics& metrics) {
                const double imbalance = expert_imbalance(metrics.expert_load);
                return imbalance > 0 ? Value(imbalance) : Value();
              });
  html += one("Balance loss", "times its weight, summed over the layers", "violet",
              [](const StepMetrics& metrics) { return metrics.balance_loss; });
  return html;
}

// Load summed over steps [begin, end) of the history; empty without MoE layers.
std::vector<std::vector<double>> load_between(const RunHistory& history, size_t begin, size_t end) {
  std::vector<std::vector<double>> sum;
  for (size_t index = begin; index < end; ++index) {
    const auto& load = history.steps[index].expert_load;
    sum.resize(std::max(sum.size(), load.size()));
    for (size_t layer = 0; layer < load.size(); ++layer) {
      sum[layer].resize(std::max(sum[layer].size(), load[layer].size()));
      for (size_t expert = 0; expert < load[layer].size(); ++expert) {
        sum[layer][expert] += static_cast<double>(load[layer][expert]);
      }
    }
  }
  const bool any =
      std::any_of(sum.begin(), sum.end(), [](const auto& row) { return !row.empty(); });
  return any ? sum : std::vector<std::vector<double>>();
}

std::string heat_maps(const RunHistory& history) {
  if (history.steps.empty()) return "";
  const size_t count = history.steps.size();
  const size_t window = std::max<size_t>(1, count / 10);
  const auto map = [&](const char* title, size_t begin, size_t end) {
    HeatMapSpec spec{title, "", load_between(history, begin, end)};
    spec.note = fmt::format("tokens over the layer's mean, steps {} to {}; columns are experts",
                            history.steps[begin].step, history.steps[end - 1].step);
    return spec.load.empty() ? std::string() : heat_map_html(spec);
  };
  std::string html = map("Expert load, last steps", count - window, count);
  if (count > 1) html += map("Expert load, first steps", 0, window);
  return html;
}

std::string tile(const char* label, const std::string& value, const std::string& detail) {
  if (value.empty()) return "";
  return fmt::format("<div class='tile'><span>{}</span><strong>{}</strong><em>{}</em></div>", label,
                     html_text(value), html_text(detail));
}

double median_tokens_per_s(const RunHistory& history) {
  std::vector<double> rates;
  for (const StepMetrics& metrics : history.steps) rates.push_back(metrics.tokens_per_s);
  if (rates.empty()) return 0;
  const auto middle = rates.begin() + static_cast<ptrdiff_t>(rates.size() / 2);
  std::nth_element(rates.begin(), middle, rates.end());
  return *middle;
}

std::string duration_words(double seconds) {
  if (seconds < 120) return fmt::format("{:.1f} s", seconds);
  if (seconds < 7200) return fmt::format("{:.1f} min", seconds / 60);
  return fmt::format("{:.1f} h", seconds / 3600);
}

std::string baseline_detail(double loss, const RunRecord& record) {
  if (!record.bigram_loss) return "nats per token, held-out text";
  const double gain = *record.bigram_loss - loss;
  return fmt::format("{:.3f} {} the bigram model", std::abs(gain), gain >= 0 ? "below" : "above");
}

std::string tiles(const RunHistory& history, const RunRecord& record) {
  std::string html = "<div class='tiles'>";
  double tokens = 0;
  double busy_ms = 0;
  std::optional<double> validation;
  for (const StepMetrics& metrics : history.steps) {
    tokens += static_cast<double>(metrics.tokens);
    busy_ms += metrics.step_ms;
    if (metrics.validation_loss) validation = metrics.validation_loss;
  }
  if (!history.steps.empty()) {
    const StepMetrics& last = history.steps.back();
    html += tile("Training loss", fmt::format("{:.4f}", last.loss),
                 fmt::format("step {}", count_text(static_cast<double>(last.step))));
  }
  if (validation) {
    html += tile("Validation loss", fmt::format("{:.4f}", *validation),
                 baseline_detail(*validation, record));
  }
  html += tile("Tokens", count_text(tokens), fmt::format("in {}", duration_words(busy_ms / 1000)));
  html += tile("Tokens per second", count_text(median_tokens_per_s(history)), "median step");
  if (record.parameters > 0) {
    html += tile("Parameters", count_text(static_cast<double>(record.parameters)),
                 count_text(static_cast<double>(record.active_parameters)) + " active per token");
  }
  if (record.ranks > 0) {
    html += tile("Ranks", fmt::format("{}", record.ranks), record.transport);
  }
  return html + "</div>\n";
}

// How the run ended, as a badge: class and words.
std::string status_badge(const RunHistory& history) {
  if (!history.exit.has_value()) {
    return "<span class='badge open'>no exit event: running, or killed</span>";
  }
  const ExitEvent& exit = *history.exit;
  if (exit.code == 0) return "<span class='badge good'>finished</span>";
  return fmt::format("<span class='badge bad'>exit {}: {}</span>", exit.code,
                     html_text(exit.reason));
}

std::string fact_row(const char* name, const std::string& value) {
  if (value.empty()) return "";
  return fmt::format("<tr><th>{}</th><td>{}</td></tr>", name, html_text(value));
}

std::string facts(const RunHistory& history, const RunRecord& record) {
  std::string rows;
  rows += fact_row("Layout", record.layout);
  rows += fact_row("Transport", record.transport);
  rows += fact_row("Device", record.device);
  rows += fact_row("Reduction", record.reduction);
  rows += fact_row("Machine", record.machine);
  rows += fact_row("Build", record.build);
  rows += fact_row("Config hash", record.config_hash);
  rows += fact_row("Seed", fmt::format("{}", record.seed));
  rows += fact_row("Started", record.start_time);
  if (!history.steps.empty()) rows += fact_row("Last digest", history.steps.back().digest);
  if (history.exit) {
    rows += fact_row("Exit", fmt::format("{} {}", history.exit->code, history.exit->reason));
    rows += fact_row("Go on with", history.exit->resume);
  }
  if (history.unreadable_lines > 0) {
    rows += fact_row("Unreadable lines", fmt::format("{}", history.unreadable_lines));
  }
  return "<section class='card'><h2>Run</h2><table class='facts'>" + rows + "</table></section>\n";
}

std::string text_card(const char* title, const std::string& text, const char* css) {
  if (text.empty()) return "";
  return fmt::format("<section class='card wide'><h2>{}</h2><pre class='{}'>{}</pre></section>\n",
                     title, css, html_text(text));
}

}  // namespace

void write_report(const std::string& run_directory) {
  const RunHistory history = read_run_history(run_directory);
  const RunRecord record = read_run_record(run_directory);
  std::string samples = read_text_file(run_directory + "/samples.txt");
  if (samples.size() > kMostSampleBytes) samples.resize(kMostSampleBytes);
  std::string name = record.name;
  if (name.empty()) name = std::filesystem::path(run_directory).filename().string();

  std::string html = "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>";
  html += "<meta name='viewport' content='width=device-width,initial-scale=1'>";
  html += fmt::format("<title>{} - Cambium</title><style>{}</style></head><body>\n",
                      html_text(name), kReportStyle);
  html += fmt::format("<header><h1>{}</h1>{}<p>{}</p></header>\n", html_text(name),
                      status_badge(history), html_text(record.layout));
  html += "<main>" + tiles(history, record);
  if (history.steps.empty()) {
    html += "<section class='card wide'><p>No step has finished.</p></section>\n";
  } else {
    html += "<div class='wide'>" + loss_chart(history, record) + "</div>";
    html += "<div class='grid'>" + heat_maps(history) + "</div>\n";
    html += "<div class='grid'>" + small_charts(history) + "</div>\n";
  }
  html += text_card("Sample", samples, "sample");
  html += "<div class='grid'>" + facts(history, record) + "</div>";
  const std::string config = read_text_file(run_directory + "/config.resolved.toml");
  if (!config.empty()) {
    html += "<details class='card wide'><summary>Resolved configuration</summary><pre>" +
            html_text(config) + "</pre></details>\n";
  }
  html += fmt::format("</main><script>{}</script></body></html>\n", kReportScript);
  FileSystem files;
  files.write_file_atomic(run_directory + "/report.html", html);
}

}  // namespace cambium
