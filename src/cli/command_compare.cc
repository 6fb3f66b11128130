// `cambium compare`: two run directories, step by step, by what they wrote.
//
// Within a step the order is that of cause: the loss and the gradient norm (of the parameters
// before the step), then the digests of the parameters after it. Numbers compare bit for bit.
#include <algorithm>
#include <bit>
#include <optional>

#include "fmt/format.h"
#include "nlohmann/json.hpp"
#include "src/base/error.h"
#include "src/cli/commands.h"
#include "src/train/run_history.h"

namespace cambium {

namespace {

struct ComparedRun {
  std::string path;
  std::map<int64_t, StepMetrics> metrics;
  std::map<int64_t, StepDigests> digests;
  int64_t last_step() const { return metrics.empty() ? 0 : metrics.rbegin()->first; }
};

struct Difference {
  int64_t step = 0;
  std::string tensor;  // or the metric's name
  std::string in_a, in_b;
  int64_t differing = 1;  // tensors that differ at that step
};

struct Comparison {
  std::optional<Difference> difference;
  int64_t digested_steps = 0;  // of both runs, equal
  int64_t metric_steps = 0;
};

ComparedRun read_run(const std::string& path) {
  ComparedRun run;
  run.path = path;
  for (StepMetrics& step : read_run_history(path).steps) run.metrics[step.step] = std::move(step);
  for (StepDigests& step : read_digests(path)) run.digests[step.step] = std::move(step);
  return run;
}

std::optional<Difference> compare_number(int64_t step, const char* name, double in_a, double in_b) {
  if (std::bit_cast<uint64_t>(in_a) == std::bit_cast<uint64_t>(in_b)) return std::nullopt;
  return Difference{.step = step,
                    .tensor = name,
                    .in_a = fmt::format("{}", in_a),
                    .in_b = fmt::format("{}", in_b)};
}

std::optional<Difference> compare_digests(const StepDigests& in_a, const StepDigests& in_b) {
  constexpr const char* kAbsent = "absent";
  std::optional<Difference> first;
  const auto note = [&](const std::string& tensor, const std::string& left,
                        const std::string& right) {
    if (first) {
      ++first->differing;
    } else {
      first = Difference{.step = in_a.step, .tensor = tensor, .in_a = left, .in_b = right};
    }
  };
  for (const auto& [tensor, digest] : in_a.digests) {
    const auto other = in_b.digests.find(tensor);
    const std::string right = other == in_b.digests.end() ? kAbsent : other->second;
    if (digest != right) note(tensor, digest, right);
  }
  for (const auto& [tensor, digest] : in_b.digests) {
    if (in_a.digests.find(tensor) == in_a.digests.end()) note(tensor, kAbsent, digest);
  }
  return first;
}

Comparison compare_runs(const ComparedRun& run_a, const ComparedRun& run_b) {
  Comparison result;
  const int64_t last = std::max(run_a.last_step(), run_b.last_step());
  for (int64_t step = 0; step <= last; ++step) {
    const auto metrics_a = run_a.metrics.find(step), metrics_b = run_b.metrics.find(step);
    if (metrics_a != run_a.metrics.end() && metrics_b != run_b.metrics.end()) {
      const StepMetrics &in_a = metrics_a->second, &in_b = metrics_b->second;
      result.difference = compare_number(step, "loss", in_a.loss, in_b.loss);
      if (!result.difference) {
        result.difference = compare_number(step, "grad_norm", in_a.grad_norm, in_b.grad_norm);
      }
      if (result.difference) return result;
      ++result.metric_steps;
    }
    const auto digests_a = run_a.digests.find(step), digests_b = run_b.digests.find(step);
    if (digests_a == run_a.digests.end() || digests_b == run_b.digests.end()) continue;
    result.difference = compare_digests(digests_a->second, digests_b->second);
    if (result.difference) return result;
    ++result.digested_steps;
  }
  if (run_a.last_step() != run_b.last_step()) {
    result.difference = Difference{.step = std::min(run_a.last_step(), run_b.last_step()) + 1,
                                   .tensor = "last step",
                                   .in_a = fmt::format("{}", run_a.last_step()),
                                   .in_b = fmt::format("{}", run_b.last_step())};
  }
  return result;
}

void print_json(const Comparison& result) {
  nlohmann::ordered_json output;
  output["equal"] = !result.difference.has_value();
  output["digested_steps_equal"] = result.digested_steps;
  output["metric_steps_equal"] = result.metric_steps;
  if (result.difference) {
    output["step"] = result.difference->step;
    output["tensor"] = result.difference->tensor;
    output["a"] = result.difference->in_a;
    output["b"] = result.difference->in_b;
    output["differing"] = result.difference->differing;
  }
  fmt::print("{}\n", output.dump());
}

}  // namespace

int command_compare(const CompareOptions& options) {
  const ComparedRun run_a = read_run(options.run_a);
  const ComparedRun run_b = read_run(options.run_b);
  const Comparison result = compare_runs(run_a, run_b);
  if (!result.difference && result.digested_steps == 0) {
    fail(ExitCode::usage,
         "{} and {} have no digested step in common: set logging.digest_every_steps", options.run_a,
         options.run_b);
  }
  if (options.format == OutputFormat::json) {
    print_json(result);
  } else if (result.difference) {
    const Difference& first = *result.difference;
    fmt::print("first difference: step {}, {}: {} in {}, {} in {}{}\n", first.step, first.tensor,
               first.in_a, run_a.path, first.in_b, run_b.path,
               first.differing > 1
                   ? fmt::format("; {} tensors differ at that step", first.differing)
                   : "");
  } else {
    fmt::print("equal: {} steps of metrics, {} digested steps\n", result.metric_steps,
               result.digested_steps);
  }
  const ExitCode code = result.difference ? ExitCode::verification_mismatch : ExitCode::done;
  return static_cast<int>(code);
}

}  // namespace cambium
