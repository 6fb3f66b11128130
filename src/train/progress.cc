#include "src/train/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>

#include "src/base/check.h"

namespace cambium {
namespace {

constexpr auto kBarInterval = std::chrono::milliseconds(100);  // no faster than an eye follows
constexpr auto kLineInterval = std::chrono::seconds(10);
constexpr int64_t kLinesPerRun = 20;
constexpr int64_t kBarCells = 20;

int64_t terminal_columns(std::FILE* out) {
  winsize size{};
  if (ioctl(fileno(out), TIOCGWINSZ, &size) != 0 || size.ws_col == 0) return 80;
  return size.ws_col;
}

double seconds_between(std::chrono::steady_clock::time_point begin,
                       std::chrono::steady_clock::time_point end) {
  return std::chrono::duration<double>(end - begin).count();
}

std::string duration_text(double seconds) {
  if (seconds < 0) return "--:--";
  const auto whole = static_cast<int64_t>(seconds + 0.5);
  if (whole < 3600) return fmt::format("{:02}:{:02}", whole / 60, whole % 60);
  return fmt::format("{}:{:02}:{:02}", whole / 3600, whole / 60 % 60, whole % 60);
}

std::string rate_text(double tokens_per_s) {
  if (tokens_per_s < 9'999.5) return fmt::format("{:.0f}", tokens_per_s);
  if (tokens_per_s < 999'950) return fmt::format("{:.1f}k", tokens_per_s / 1e3);
  return fmt::format("{:.2f}M", tokens_per_s / 1e6);
}

std::string figures(const StepMetrics& metrics) {
  std::string text = fmt::format("loss {:.4f}", metrics.loss);
  if (metrics.validation_loss) text += fmt::format("  validation {:.4f}", *metrics.validation_loss);
  text += fmt::format("  {} tokens/s", rate_text(metrics.tokens_per_s));
  const double imbalance = expert_imbalance(metrics.expert_load);
  if (imbalance > 0) text += fmt::format("  experts max/mean {:.2f}", imbalance);
  return text;
}

}  // namespace

ProgressStyle stderr_progress_style() {
  return isatty(STDERR_FILENO) != 0 ? ProgressStyle::bar : ProgressStyle::lines;
}

double expert_imbalance(const std::vector<std::vector<int64_t>>& expert_load) {
  double worst = 0;
  for (const std::vector<int64_t>& layer : expert_load) {
    int64_t sum = 0;
    int64_t most = 0;
    for (const int64_t tokens : layer) {
      sum += tokens;
      most = std::max(most, tokens);
    }
    if (sum == 0) continue;
    const double mean = static_cast<double>(sum) / static_cast<double>(layer.size());
    worst = std::max(worst, static_cast<double>(most) / mean);
  }
  return worst;
}

Progress::Progress(const Options& options)
    : options_(options), start_(std::chrono::steady_clock::now()) {
  CHECK_GE(options_.total_steps, options_.first_step);
  first_step_end_ = start_;
  last_print_ = start_;
}

Progress::~Progress() { finish(); }

double Progress::eta_s(int64_t step, SteadyTime now) const {
  const int64_t left = options_.total_steps - step;
  if (left == 0) return 0;
  if (steps_seen_ < 2) return -1;  // the first step also loads data and touches memory
  const double per_step =
      seconds_between(first_step_end_, now) / static_cast<double>(steps_seen_ - 1);
  return per_step * static_cast<double>(left);
}

void Progress::update(const StepMetrics& metrics) {
  if (options_.style == ProgressStyle::silent) return;
  const SteadyTime now = std::chrono::steady_clock::now();
  if (++steps_seen_ == 1) first_step_end_ = now;
  const bool edge = steps_seen_ == 1 || metrics.step == options_.total_steps;
  if (options_.style == ProgressStyle::bar) {
    if (edge || now - last_print_ >= kBarInterval) draw_bar(metrics, now);
    return;
  }
  const int64_t every = std::max<int64_t>(1, options_.total_steps / kLinesPerRun);
  const bool due = metrics.step - last_printed_step_ >= every || now - last_print_ >= kLineInterval;
  if (edge || due || metrics.validation_loss.has_value()) print_line(metrics, now);
}

void Progress::draw_bar(const StepMetrics& metrics, SteadyTime now) {
  const int64_t total = std::max<int64_t>(1, options_.total_steps);
  const int64_t full = metrics.step * kBarCells / total;
  std::string cells;
  for (int64_t cell = 0; cell < kBarCells; ++cell) cells += cell < full ? "█" : "░";
  const std::string head = fmt::format(" {}/{}  ETA {}  ", metrics.step, options_.total_steps,
                                       duration_text(eta_s(metrics.step, now)));
  std::string rest = head + figures(metrics);
  const int64_t room = std::max<int64_t>(0, terminal_columns(options_.out) - kBarCells - 1);
  if (static_cast<int64_t>(rest.size()) > room) rest.resize(static_cast<size_t>(room));
  if (options_.color == Color::on) cells = "\x1b[32m" + cells + "\x1b[0m";
  const auto columns = kBarCells + static_cast<int64_t>(rest.size());
  const int64_t padding = std::max<int64_t>(0, bar_columns_ - columns);
  fmt::print(options_.out, "\r{}{}{:{}}", cells, rest, "", padding);
  std::fflush(options_.out);
  bar_columns_ = columns;
  last_print_ = now;
}

void Progress::print_line(const StepMetrics& metrics, SteadyTime now) {
  fmt::print(options_.out, "step {}/{}  {}  ETA {}\n", metrics.step, options_.total_steps,
             figures(metrics), duration_text(eta_s(metrics.step, now)));
  std::fflush(options_.out);
  last_printed_step_ = metrics.step;
  last_print_ = now;
}

void Progress::note(const std::string& line) {
  if (options_.style == ProgressStyle::silent) return;
  if (bar_columns_ > 0) fmt::print(options_.out, "\r{:{}}\r", "", bar_columns_);
  bar_columns_ = 0;
  fmt::print(options_.out, "{}\n", line);
  std::fflush(options_.out);
}

void Progress::finish() {
  if (bar_columns_ > 0) fmt::print(options_.out, "\n");
  bar_columns_ = 0;
  std::fflush(options_.out);
}

}  // namespace cambium
