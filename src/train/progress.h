// Progress: what a person sees on stderr while a run goes on.
//
// On a terminal one line is redrawn: bar, step, ETA, loss, tokens/s, expert balance. Elsewhere
// plain lines appear: the first step at once, then every few steps and at least every 10 s, and the
// last.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "src/train/run_record.h"

namespace cambium {

enum class ProgressStyle { bar, lines, silent };
enum class Color { off, on };

// `bar` when stderr is a terminal, else `lines`.
ProgressStyle stderr_progress_style();

// Largest over mean expert load of the worst layer: 1 = even. 0 without MoE layers.
double expert_imbalance(const std::vector<std::vector<int64_t>>& expert_load);

class Progress {
 public:
  struct Options {
    int64_t first_step = 0;  // steps done before this process started
    int64_t total_steps = 0;
    ProgressStyle style = ProgressStyle::lines;
    Color color = Color::off;  // off when NO_COLOR is set; `main` reads the environment
    std::FILE* out = stderr;
  };
  explicit Progress(const Options& options);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void update(const StepMetrics& metrics);
  // A line of its own, above the bar: a checkpoint, a warning, a baseline.
  void note(const std::string& line);
  // Ends the bar's line. Called by the destructor too.
  void finish();

 private:
  using SteadyTime = std::chrono::steady_clock::time_point;
  void draw_bar(const StepMetrics& metrics, SteadyTime now);
  void print_line(const StepMetrics& metrics, SteadyTime now);
  double eta_s(int64_t step, SteadyTime now) const;

  Options options_;
  SteadyTime start_;
  SteadyTime first_step_end_;  // the first step warms caches up and is left out of the ETA
  SteadyTime last_print_;
  int64_t steps_seen_ = 0;
  int64_t last_printed_step_ = 0;
  int64_t bar_columns_ = 0;  // width of the line on the terminal; 0 = none drawn
};

}  // namespace cambium
