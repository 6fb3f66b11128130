// cambium check: the cheap proof before GPU time.
//
// First, on the configuration as it is, shapes alone: its ranks' transfers match and cannot
// deadlock. Then, on the configuration, or on its small twin when it is large (same mesh, schedule,
// experts, top-k and layer pattern; reduced widths, vocabulary and sequence), with synthetic
// documents:
//   1. races: every access that an op or a transfer declares is ordered with those it conflicts
//      with, and all ranks launch the transfers that they share in one order
//   2. bits: the layout against one rank, exact mode, poisoned memory: losses, norm, parameters
//   3. no rank computes what another did: FLOPs of all ranks equal one rank's
//   4. threads: 1, 2 and 4 workers give the same bits
//   5. schedules: seeded orders of ranks and streams, transfers late, give the same bits
//   6. the configured reduction mode, when it is `fast`, repeats itself bit for bit
// Every run also proves collective matching and freedom from deadlock for its schedule. Injected
// [[faults]] strike the layout's runs, never the one rank it is compared with. Layouts for GPUs are
// checked before there is a GPU: a build without CUDA kernels takes the reference, and says so.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>

#include "kernels/attention.h"
#include "src/cli/check_shrink.h"
#include "src/cli/commands.h"
#include "src/cli/launch.h"
#include "src/config/derive.h"
#include "src/config/faults.h"
#include "src/optim/lr_schedule.h"
#include "src/train/synthetic.h"
#include "src/train/train_run.h"

namespace cambium {

namespace {

constexpr int64_t kCheckSteps = 2;
// A run of one rank below this many FLOPs a step is checked as it is.
constexpr double kSmallStepFlops = 3e9;

// What one run leaves, for comparison.
struct Trace {
  std::vector<std::map<std::string, Digest128>> digests;  // [0] = initial
  std::vector<std::map<std::string, std::vector<float>>> gradients;
  std::vector<StepResult> steps;
  std::map<std::string, int64_t> flops;  // by op, over all ranks
};

struct CheckRun {
  Config config;
  int64_t workers = 1;
  uint64_t schedule_seed = 0;
  RaceReport* races = nullptr;  // not null: look for races
  std::string schedule = {};    // not empty: replays it
};

void check_rank(RankEnvironment& environment, const Config& config, const Derived& derived,
                const SequenceSource& source, Trace& trace) {
  Rank rank(config, environment);
  TrainStep step(rank, config.model);
  step.model().initialize(config.run.seed);
  const auto initial = step.digests();
  if (rank.is_first()) trace.digests.push_back(initial);
  trace.gradients.resize(kCheckSteps);
  for (int64_t now = 1; now <= kCheckSteps; ++now) {
    rank.step = now;
    environment.set_step(now);
    step.accumulate(source, now - 1);
    for (const auto& [name, part] : step.owned_gradients()) {
      std::vector<float>& whole = trace.gradients[now - 1][name];
      whole.resize(part.size());
      for (size_t i = 0; i < part.size(); ++i) whole[i] += part[i];
    }
    const StepResult result =
        step.update(now, learning_rate(config, derived, now), WithDigests::yes);
    if (!rank.is_first()) continue;
    trace.digests.push_back(result.digests);
    trace.steps.push_back(result);
  }
  for (const auto& [op, totals] : rank.totals) trace.flops[op] += totals.flops;
}

Trace run_trace(const CheckRun& run, std::string* schedule_taken = nullptr) {
  const Derived derived = derive(run.config);
  const SyntheticSequences source(run.config);
  Trace trace;
  launch_ranks({.ranks = derived.ranks,
                .device = run.config.run.device,
                .workers = run.workers,
                .schedule_seed = run.schedule_seed,
                .schedule = run.schedule,
                .schedule_taken = schedule_taken,
                // Fresh memory is used again at once where races are looked for.
                .poison = run.races == nullptr ? Poison::on : Poison::off,
                .races = run.races,
                .faults = run.config.faults,
                .fast_order = run.config.numerics.fast_order,
                .watchdog_s = run.config.run.watchdog_s},
               [&](RankEnvironment& environment) {
                 check_rank(environment, run.config, derived, source, trace);
               });
  return trace;
}

// Why two gradients of one tensor differ, as far as their values tell.
std::string gradient_cause(const std::vector<float>& value, const std::vector<float>& want) {
  double ratio = 0, largest = 0, gap = 0;
  bool constant = true;
  for (size_t i = 0; i < std::min(value.size(), want.size()); ++i) {
    largest = std::max(largest, std::abs(static_cast<double>(want[i])));
    gap = std::max(gap, std::abs(static_cast<double>(value[i]) - want[i]));
    if (want[i] == 0) continue;
    const double here = static_cast<double>(value[i]) / want[i];
    if (ratio == 0) ratio = here;
    constant = constant && std::abs(here - ratio) <= 1e-5 * std::abs(ratio);
  }
  if (constant && ratio != 0 && std::abs(ratio - 1) > 1e-5) {
    return fmt::format("its gradient is {:.6g} times that of one rank: a wrong gradient scale",
                       ratio);
  }
  if (gap <= 1e-3 * largest) {
    return fmt::format(
        "its gradient differs by {:.1e} of its largest value: the same terms in another order, as "
        "from a routing sort that is not stable or a sum outside the canonical tree",
        gap / largest);
  }
  return "its gradient has other terms: tokens lost, repeated or sent to the wrong place";
}

// The first difference, with its cause; empty when the bits are equal.
std::string first_difference(const Trace& one, const Trace& other) {
  for (const auto& [name, digest] : one.digests.front()) {
    if (other.digests.front().at(name) != digest) {
      return fmt::format(
          "step 0, tensor '{}': the initial weights differ: a rank draws from another random "
          "stream "
          "(run.seed, stream init)",
          name);
    }
  }
  for (size_t i = 0; i < one.steps.size(); ++i) {
    for (const auto& [name, want] : one.gradients[i]) {
      const std::vector<float>& value = other.gradients[i].at(name);
      if (std::memcmp(value.data(), want.data(), 4 * want.size()) != 0) {
        return fmt::format("step {}, tensor '{}': {}", i + 1, name, gradient_cause(value, want));
      }
    }
    if (one.steps[i].loss != other.steps[i].loss) {
      return fmt::format("step {}: loss {} against {} of one rank, with equal gradients", i + 1,
                         other.steps[i].loss, one.steps[i].loss);
    }
    if (one.steps[i].grad_norm != other.steps[i].grad_norm) {
      return fmt::format("step {}: gradient norm {} against {} of one rank, with equal gradients",
                         i + 1, other.steps[i].grad_norm, one.steps[i].grad_norm);
    }
    for (const auto& [name, digest] : one.digests[i + 1]) {
      if (other.digests[i + 1].at(name) != digest) {
        return fmt::format(
            "step {}, tensor '{}': parameters differ after equal gradients: the "
            "optimizer or the gathering of its shards",
            i + 1, name);
      }
    }
  }
  return "";
}

// Of a model with dense layers: its first layers' kinds, and at least one of each.
void keep_layer_pattern(const ModelConfig& given, ModelConfig& twin) {
  if (given.dense_layers.empty()) return;
  std::erase_if(twin.dense_layers, [&](int64_t layer) { return layer >= twin.layers; });
  if (twin.dense_layers.empty()) twin.dense_layers = {0};
  if (twin.expert_layers() == 0 && given.expert_layers() > 0) twin.dense_layers.pop_back();
  twin.dense_hidden = 56;
}

// The rule-made small twin: a configuration whose step one core does in well under a second.
Config small_twin(const Config& config) {
  Config twin = config;
  ModelConfig& model = twin.model;
  const ParallelConfig& parallel = config.parallel;
  const int64_t stages =
      parallel.pp * schedule_chunks(parallel.schedule, parallel.pp, parallel.virtual_stages);
  model.layers = std::min(model.layers, std::max<int64_t>(2, stages));
  keep_layer_pattern(config.model, model);
  const int64_t groups = model.heads / model.kv_heads;
  model.kv_heads = std::min<int64_t>(model.kv_heads, 2);
  model.heads = model.kv_heads * std::min<int64_t>(groups, 2);
  model.head_dim = 16;
  model.hidden = 48;
  model.expert_hidden = 40;
  if (model.shared_expert_hidden > 0) model.shared_expert_hidden = 56;
  model.vocab = std::min<int64_t>(model.vocab, 211);
  twin.data.train.clear();  // no text is read: the tokenizer has no say in the vocabulary
  twin.numerics.block_tokens = 16;
  const bool has_tiles = kHasCuda && config.run.device == DeviceKind::cuda && parallel.cp > 1;
  twin.train.sequence_length = (has_tiles ? 2 * kAttentionTile : 32) * parallel.cp;
  // At least one micro-batch more than ranks need, so that accumulation is exercised.
  const int64_t per_rank =
      config.train.global_batch_sequences / config.parallel.dp / config.train.micro_batch_sequences;
  twin.train.micro_batch_sequences = 1;
  const MicroBatchNeed need = schedule_need(parallel.schedule, parallel.pp);
  const int64_t enough = std::max<int64_t>(3, need.least) / need.multiple * need.multiple;
  twin.train.global_batch_sequences =
      parallel.dp * std::min(per_rank, std::max(enough, need.least));
  twin.model.max_positions = std::max(model.max_positions, twin.train.sequence_length);
  twin.balance.routing = RoutingChoice::learned;  // a trace, or a rotation, is of the given sizes
  twin.balance.routing_file.clear();
  return twin;
}

void refuse_save_faults(const Config& config) {
  for (const FaultConfig& fault : config.faults) {
    if (fault_site(fault.kind) != FaultSite::checkpoint) continue;
    fail(ExitCode::usage,
         "faults.kind = {} strikes a save, and `check` makes none; next: `train` with "
         "run.allow_faults = true",
         fault.kind);
  }
}

Config checked_config(const Config& given, const Derived& derived, std::string& what) {
  const double step_flops =
      derived.training_flops_per_token * static_cast<double>(derived.tokens_per_step);
  Config config = given;
  what = "the configuration itself";
  if (step_flops > kSmallStepFlops) {
    config = small_twin(given);
    what = fmt::format(
        "a small twin: layers {}, hidden {}, heads {}/{} of {}, expert width {}, vocabulary {}, "
        "sequences {} of {}; experts {}, top-k {} and the layout as given, routing learned",
        config.model.layers, config.model.hidden, config.model.heads, config.model.kv_heads,
        config.model.head_dim, config.model.expert_hidden, config.model.vocab,
        config.train.global_batch_sequences, config.train.sequence_length, config.model.experts,
        config.model.top_k);
  }
  if (config.run.device == DeviceKind::cuda && !kHasCuda) {
    config.run.device = DeviceKind::cpu;
    config.run.transport = Transport::sim;
    config.numerics.attention = AttentionKernel::own;
    what += ", on the CPU's reference as this build has no CUDA kernels";
  }
  config.train.steps = std::max(config.train.steps, kCheckSteps);
  config.faults = drawn_faults(config, {0, kCheckSteps});
  return config;
}

Config one_rank(const Config& config) {
  Config one = config;
  one.parallel = ParallelConfig{};
  one.faults.clear();
  return one;
}

void expect_equal(const Trace& want, const CheckRun& run, const std::string& what,
                  CheckReport& report) {
  if (!report.failure.empty()) return;
  const std::string difference = first_difference(want, run_trace(run, &report.schedule));
  if (difference.empty()) {
    report.passed.push_back(what);
    return;
  }
  report.failure = fmt::format("{}: {}", what, difference);
  report.exit_code = ExitCode::verification_mismatch;
}

// Explored schedules, or the requested one, against `want`.
void explore(const Trace& want, const Config& config, const CheckRequest& request,
             CheckReport& report) {
  const std::string mode = choice_name(config.numerics.reduction);
  if (!request.schedule.empty()) {
    return expect_equal(want, {.config = config, .workers = 2, .schedule = request.schedule},
                        fmt::format("{}, schedule {}", mode, request.schedule), report);
  }
  for (int64_t seed = 1; seed <= request.seeds && report.failure.empty(); ++seed) {
    const size_t passed = report.passed.size();
    expect_equal(want, {config, 2, static_cast<uint64_t>(seed)},
                 fmt::format("{}, schedule seed {}", mode, seed), report);
    report.passed.resize(passed);
  }
  if (report.failure.empty() && request.seeds > 0) {
    report.passed.push_back(
        fmt::format("{}: {} explored schedules, random and PCT, give the same "
                    "bits",
                    mode, request.seeds));
  }
}

// First, as a race explains what differs later.
void find_races(const Config& exact, CheckReport& report) {
  RaceReport races;
  run_trace({exact, 2, 0, &races});
  report.passed.push_back(fmt::format("no race and no leaked ticket in {} accesses; {} places wait",
                                      races.accesses, races.waits.size()));
  if (races.launches > 0) {
    report.passed.push_back(fmt::format(
        "every pair of ranks launches its {} shared transfers in one order", races.launches));
  }
  for (const WaitSite& wait : races.waits) {
    if (wait.implied < wait.count) continue;
    report.passed.push_back(fmt::format("(all waits implied by others: {})", wait.name));
  }
}

// Of steps of the configuration as it is given, whatever its size.
void match_full_shape(const Config& given, CheckReport& report) {
  Config config = given;
  config.faults = drawn_faults(config, {0, kCheckSteps});
  const int64_t launches = match_layout(config, kCheckSteps);
  report.passed.push_back(fmt::format(
      "at full shape {} steps of all {} ranks match, cannot deadlock, and launch {} "
      "shared transfers in one order (layers {}, hidden {}, sequences {} of {})",
      kCheckSteps, derive(config, ConfigUse::planned).ranks, launches, config.model.layers,
      config.model.hidden, config.train.global_batch_sequences, config.train.sequence_length));
}

void compare_bits(const Trace& one, const Config& exact, CheckReport& report) {
  const Trace layout = run_trace({exact, 2, 0});
  report.exit_code = ExitCode::verification_mismatch;
  const std::string difference = first_difference(one, layout);
  if (!difference.empty()) {
    report.failure = fmt::format("bits against one rank: {}", difference);
    return;
  }
  report.passed.push_back(fmt::format("bits of {} steps equal one rank's", kCheckSteps));
  const Derived derived = derive(exact);
  if (exact.parallel.sharding != Sharding::none || derived.data_ranks == 1) {
    for (const auto& [op, flops] : one.flops) {
      // Every rank folds the same few norm partials into one scale; every copy updates its state.
      const int64_t times = op == "adamw" ? derived.copies : 1;
      if (op == "clip_scale" || layout.flops.at(op) == times * flops) continue;
      report.failure = fmt::format(
          "op '{}': FLOPs of all ranks are {}, of one rank {}: a rank computes what another did",
          op, layout.flops.at(op), times * flops);
      return;
    }
    report.passed.push_back(
        derived.copies == 1
            ? "FLOPs of all ranks equal one rank's"
            : fmt::format("FLOPs of all ranks equal one rank's, AdamW's {} times", derived.copies));
  }
  report.exit_code = ExitCode::done;
}

// With bits of its own for every layout.
Config exact_config(const Config& config, CheckReport& report) {
  Config exact = config;
  exact.numerics.reduction = ReductionMode::exact;
  exact.numerics.fast_order = FastOrder::rank;
  exact.numerics.attention = AttentionKernel::own;
  const BalanceLoss loss = config.balance.loss;
  if (loss == BalanceLoss::global_batch || loss == BalanceLoss::micro_batch) {
    // These depend on the layout by definition: exact mode refuses them.
    exact.balance.loss = BalanceLoss::sequence;
    report.passed.push_back(
        "(balance.loss = sequence stands in for a loss that depends on layout)");
  }
  return exact;
}

void run_checks(const Config& config, const CheckRequest& request, CheckReport& report) {
  const auto begins = [&](CheckPart part) {
    if (!report.failure.empty()) return false;
    if (request.only != CheckPart::all && request.only != part) return false;
    report.part = part;
    return true;
  };
  if (begins(CheckPart::full_shape)) match_full_shape(request.config, report);
  const Config exact = exact_config(config, report);
  if (config.run.device == DeviceKind::cpu && begins(CheckPart::races)) find_races(exact, report);
  const bool compares_to_one = request.only == CheckPart::all || request.only == CheckPart::bits ||
                               request.only == CheckPart::threads ||
                               request.only == CheckPart::exact_schedules;
  if (compares_to_one) {
    const Trace one = run_trace({one_rank(exact), 1, 0});
    if (begins(CheckPart::bits)) compare_bits(one, exact, report);
    if (request.schedule.empty() && begins(CheckPart::threads)) {
      for (const int64_t workers : {1, 4}) {
        expect_equal(one, {exact, workers, 0}, fmt::format("{} worker threads", workers), report);
      }
    }
    if (begins(CheckPart::exact_schedules)) explore(one, exact, request, report);
  }
  if (config.numerics.reduction == ReductionMode::fast && begins(CheckPart::fast_schedules)) {
    explore(run_trace({config, 2, 0}), config, request, report);
  }
}

CheckReport check_config(const CheckRequest& request) {
  std::string what;
  refuse_save_faults(request.config);
  const Derived derived = derive(request.config, ConfigUse::planned);
  const Config config = checked_config(request.config, derived, what);
  CheckReport report;
  report.checked = fmt::format("{} ({})", what, layout_text(config));
  for (const FaultConfig& fault : config.faults) {
    report.passed.push_back(fmt::format("(fault: {})", describe_fault(fault)));
  }
  try {
    run_checks(config, request, report);
  } catch (const Error& error) {
    const ExitCode code = error.exit_code();
    constexpr ExitCode kOwn[] = {ExitCode::peer_lost,           ExitCode::watchdog,
                                 ExitCode::collective_mismatch, ExitCode::deadlock,
                                 ExitCode::out_of_memory,       ExitCode::non_finite};
    const bool own_code = std::ranges::find(kOwn, code) != std::end(kOwn);
    if (code == ExitCode::usage) throw;
    report.failure = error.what();
    report.exit_code = own_code ? code : ExitCode::verification_mismatch;
  }
  return report;
}

// The command that fails alike with as little as possible.
std::string repro_line(const CheckOptions& options, const CheckReport& report) {
  const Repro repro = shrink({.path = options.config.path,
                              .sets = options.config.sets,
                              .failed = report,
                              .verdict = check_config});
  std::string line = fmt::format("REPRO: cambium check {}", options.config.path);
  std::vector<std::string> sets = options.config.sets;
  sets.insert(sets.end(), repro.sets.begin(), repro.sets.end());
  for (const std::string& set : last_assignments(sets)) line += fmt::format(" --set '{}'", set);
  // Failures that depend on the number of threads have no schedule.
  return line + (repro.reproduces ? fmt::format(" --schedule {}", repro.schedule)
                                  : fmt::format(" --seeds {}", options.seeds));
}

}  // namespace

int command_check(const CheckOptions& options) {
  const CheckReport report =
      check_config({.config = load_config(options.config.path, options.config.sets),
                    .seeds = options.seeds,
                    .schedule = options.schedule});
  const bool pass = report.failure.empty();
  const std::string repro = pass ? "" : repro_line(options, report);
  if (options.format == OutputFormat::json) {
    const nlohmann::json object{{"pass", pass},
                                {"checked", report.checked},
                                {"passed", report.passed},
                                {"failure", report.failure},
                                {"repro", repro}};
    fmt::print("{}\n", object.dump());
  } else {
    fmt::print("checked {}\n", report.checked);
    for (const std::string& line : report.passed) fmt::print("  ok  {}\n", line);
    fmt::print("{}", pass ? "PASS\n" : fmt::format("FAIL: {}\n{}\n", report.failure, repro));
  }
  return static_cast<int>(report.exit_code);
}

}  // namespace cambium
