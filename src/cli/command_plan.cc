// cambium plan: step time, memory and exposed communication of a layout on a machine, before any of
// its hours is spent. The trainer's own code runs with shapes alone (sim/planner.h).
#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

#include "src/base/io.h"
#include "src/cli/commands.h"
#include "src/cli/launch.h"
#include "src/train/train_run.h"

namespace cambium {

namespace {

double ms(int64_t ns) { return 1e-6 * static_cast<double>(ns); }
double gb(int64_t bytes) { return 1e-9 * static_cast<double>(bytes); }

std::string place_text(const RankPlan& rank) {
  const WorkPlace& place = rank.peak_place;
  std::string text = work_stage_name(place.stage);
  if (place.layer >= 0) text += fmt::format(" of layer {}", place.layer);
  if (place.micro_batch >= 0) {
    text += fmt::format(", {}, micro-batch {}", work_pass_name(place.pass), place.micro_batch);
  }
  return fmt::format("{}, at '{}'", text, rank.peak_what);
}

// The configuration with parallel.dp, and the batch, scaled to `ranks`.
void scale_ranks(int64_t ranks, Config& config) {
  ParallelConfig& parallel = config.parallel;
  const int64_t others = parallel.pp * parallel.cp;
  if (ranks % others != 0) {
    fail(ExitCode::usage, "--ranks = {} is no multiple of parallel.pp * parallel.cp = {}", ranks,
         others);
  }
  const int64_t dp = ranks / others;
  const int64_t per_rank = config.train.global_batch_sequences / parallel.dp;
  config.train.global_batch_sequences = per_rank * dp;
  parallel.dp = dp;
}

nlohmann::json rank_json(const RankPlan& rank) {
  nlohmann::json memory;
  for (int c = 0; c < kMemoryClasses; ++c) {
    memory[memory_class_name(static_cast<MemoryClass>(c))] = rank.peak_by_class[c];
  }
  return {{"rank", rank.rank},
          {"step_ns", rank.step_ns},
          {"busy_ns", rank.busy_ns},
          {"exposed_ns", rank.exposed_ns},
          {"peers_ns", rank.peers_ns},
          {"pipeline_ns", rank.pipeline_ns},
          {"host_ns", rank.host_ns},
          {"transfer_ns", rank.transfer_ns},
          {"peak_bytes", rank.peak_bytes},
          {"reserved_bytes", rank.reserved_bytes},
          {"peak_by_class", memory},
          {"peak_at", place_text(rank)}};
}

void print_plan_json(const PlanReport& report) {
  nlohmann::json ranks = nlohmann::json::array();
  for (const RankPlan& rank : report.by_rank) ranks.push_back(rank_json(rank));
  nlohmann::json ops = nlohmann::json::array();
  for (const OpShare& share : report.ops()) {
    ops.push_back({{"op", share.op},
                   {"calls", share.totals.calls},
                   {"time_ns", share.time_ns},
                   {"flops", share.totals.flops},
                   {"bytes", share.totals.bytes}});
  }
  const nlohmann::json object{{"machine", report.machine},
                              {"ranks", report.ranks},
                              {"simulated_ranks", report.by_rank.size()},
                              {"step_ms", ms(report.step_ns)},
                              {"tokens_per_s_per_rank", report.tokens_per_s_per_rank},
                              {"mfu", report.mfu},
                              {"exposed_communication", report.exposed_share},
                              {"pipeline_bubble", report.pipeline_share},
                              {"extrapolated", report.extrapolated_share},
                              {"links_extrapolated", report.links_extrapolated},
                              {"peak_bytes", report.fullest().peak_bytes},
                              {"device_bytes", report.device_bytes},
                              {"fits", report.fits()},
                              {"ops", ops},
                              {"by_rank", ranks}};
  fmt::print("{}\n", object.dump());
}

// The most expensive ops: what to look at first.
void print_ops(const PlanReport& report) {
  constexpr int64_t kShown = 5;
  const std::vector<OpShare> ops = report.ops();
  int64_t all_ns = 1;
  for (const OpShare& share : ops) all_ns += share.time_ns;
  for (int64_t i = 0; i < std::min<int64_t>(kShown, std::ssize(ops)); ++i) {
    fmt::print("  {:<16}{:<24}{:5.1f} %, {} calls, {:.3f} ms a rank\n", i == 0 ? "ops' time" : "",
               ops[i].op, 100 * static_cast<double>(ops[i].time_ns) / static_cast<double>(all_ns),
               ops[i].totals.calls,
               ms(ops[i].time_ns) / static_cast<double>(report.by_rank.size()));
  }
}

void print_plan_text(const Config& config, const PlanReport& report) {
  fmt::print("{} on {}, {} ranks ({} simulated), routing {}\n", layout_text(config), report.machine,
             report.ranks, report.by_rank.size(), config.plan.routing);
  fmt::print("  step            {:.3f} ms\n", ms(report.step_ns));
  fmt::print("  tokens/s        {:.0f} a rank, {:.0f} in all\n", report.tokens_per_s_per_rank,
             report.tokens_per_s_per_rank * static_cast<double>(report.ranks));
  fmt::print("  MFU             {:.1f} %\n", 100 * report.mfu);
  fmt::print("  exposed comm    {:.1f} % of the step\n", 100 * report.exposed_share);
  if (config.parallel.pp > 1) {
    fmt::print("  pipeline bubble {:.1f} % of the step\n", 100 * report.pipeline_share);
  }
  if (report.extrapolated_share > 0) {
    fmt::print("  NOTE: {:.1f} % of the ops' time is extrapolated beyond measured shapes\n",
               100 * report.extrapolated_share);
  }
  if (report.links_extrapolated) {
    fmt::print("  NOTE: some transfers are smaller or larger than those measured\n");
  }
  print_ops(report);
  const RankPlan& fullest = report.fullest();
  fmt::print(
      "  memory          {:.3f} GB at the peak of rank {} ({:.3f} with holes), of {:.1f} GB\n",
      gb(fullest.peak_bytes), fullest.rank, gb(fullest.reserved_bytes), gb(report.device_bytes));
  for (int c = 0; c < kMemoryClasses; ++c) {
    if (fullest.peak_by_class[c] == 0) continue;
    fmt::print("    {:<14}{:.3f} GB\n", memory_class_name(static_cast<MemoryClass>(c)),
               gb(fullest.peak_by_class[c]));
  }
  fmt::print("    reached in {}\n", place_text(fullest));
  fmt::print("  {}\n", report.fits() ? "fits" : "DOES NOT FIT");
}

void write_text(const std::string& path, const std::string& text) {
  std::ofstream file(path);
  file << text;
  if (!file.flush()) fail(ExitCode::io, "cannot write '{}'", path);
}

}  // namespace

int command_plan(const PlanOptions& options) {
  PlanRun run{.config = load_config(options.config.path, options.config.sets),
              .machine = options.machine,
              .folding = options.folding};
  Config& config = run.config;
  if (run.machine.empty()) run.machine = config.plan.machine;
  if (run.machine.empty()) {
    fail(ExitCode::usage, "no machine: give --machine NAME or FILE, or plan.machine");
  }
  if (!config.faults.empty()) {
    fail(ExitCode::usage,
         "plan times a step without [[faults]], '{}' is given; next: `check` or "
         "`train` shows what it does, --set 'faults=[]' plans without",
         config.faults.front().kind);
  }
  if (options.ranks > 0) scale_ranks(options.ranks, config);
  Trace trace;
  if (!options.trace.empty() || !options.timeline.empty()) run.trace = &trace;
  const PlanReport report = plan_layout(run);
  if (options.format == OutputFormat::json) {
    print_plan_json(report);
  } else {
    print_plan_text(config, report);
  }
  if (!options.trace.empty()) write_text(options.trace, trace.chrome_json());
  if (!options.timeline.empty()) {
    constexpr double kFrom = 0.46, kTo = 0.54;  // the middle of a pipeline's steady part
    write_text(options.timeline,
               timeline_svg(trace,
                            fmt::format("{} on {}, step {:.1f} ms", layout_text(config),
                                        report.machine, ms(report.step_ns)),
                            kFrom, kTo));
  }
  return static_cast<int>(report.fits() ? ExitCode::done : ExitCode::out_of_memory);
}

}  // namespace cambium
