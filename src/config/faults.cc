#include "src/config/faults.h"

#include <algorithm>
#include <charconv>
#include <iterator>

#include "fmt/format.h"
#include "src/base/check.h"
#include "src/base/philox.h"

namespace cambium {

namespace {

constexpr const char* kFaultNames[] = {
    // Of the communicator.
    "wrong_count", "swapped_collectives", "skipped_collective", "rank_crash", "stuck_rank", "pause",
    "slow_link", "flapping_link",
    // Of the simulator.
    "missing_wait", "slow_rank", "arrival_order_sum",
    // Of a save.
    "torn_write", "failed_write", "disk_full", "lost_peer",
    // Of the trainer.
    "expert_gradient_scale", "rng_rank", "routing_order", "swapped_send", "missing_micro_batch",
    "zigzag_half", "gradient_axis", "out_of_memory", "nan_gradient", "bit_flip"};
constexpr ptrdiff_t kCommunicatorNames = 8, kSimulatorNames = 3, kCheckpointNames = 4;

bool takes_time(const std::string& kind) {
  return kind == "pause" || kind == "slow_link" || kind == "flapping_link";
}

bool saves_at(const Config& config, const Derived& derived, int64_t step) {
  return step == config.train.steps || step % derived.checkpoint_every_steps == 0;
}

void check_place(const FaultConfig& fault, const Config& config, const Derived& derived) {
  if (fault.probability > 0) {
    if (fault.rank == 0 && fault.step == 1) return;
    fail(ExitCode::usage,
         "faults.probability = {} of kind {} draws rank and step from run.seed: leave out "
         "faults.rank = {} and faults.step = {}, or the probability",
         fault.probability, fault.kind, fault.rank, fault.step);
  }
  if (fault.rank >= derived.ranks) {
    fail(ExitCode::usage, "faults.rank = {} of kind {} is not below the layout's {} ranks",
         fault.rank, fault.kind, derived.ranks);
  }
  if (fault_site(fault.kind) == FaultSite::checkpoint && !saves_at(config, derived, fault.step)) {
    fail(
        ExitCode::usage,
        "faults.kind = {} strikes a save, and step {} has none: checkpoints are written every {} "
        "steps and after step {}; nearest: faults.step = {}",
        fault.kind, fault.step, derived.checkpoint_every_steps, config.train.steps,
        std::min((fault.step / derived.checkpoint_every_steps + 1) * derived.checkpoint_every_steps,
                 config.train.steps));
  }
}

}  // namespace

std::span<const char* const> fault_names() { return kFaultNames; }

FaultSite fault_site(const std::string& kind) {
  const auto place = std::ranges::find(kFaultNames, kind) - std::begin(kFaultNames);
  if (place < kCommunicatorNames) return FaultSite::communicator;
  if (place < kCommunicatorNames + kSimulatorNames) return FaultSite::simulator;
  const bool of_save = place < kCommunicatorNames + kSimulatorNames + kCheckpointNames;
  return of_save ? FaultSite::checkpoint : FaultSite::trainer;
}

FaultPlace fault_place(const FaultConfig& fault) {
  const size_t hash = fault.site.rfind('#');
  if (hash == std::string::npos) return {fault.site, 0};
  const char* const end = fault.site.data() + fault.site.size();
  FaultPlace place{fault.site.substr(0, hash), 0};
  const auto [last, error] = std::from_chars(fault.site.data() + hash + 1, end, place.number);
  if (error != std::errc{} || last != end || place.number < 0) {
    fail(ExitCode::usage, "faults.site = '{}': after '#' comes the number of a place, from 0",
         fault.site);
  }
  return place;
}

void check_faults(const Config& config, const Derived& derived) {
  const ParallelConfig& parallel = config.parallel;
  const auto needs = [](const FaultConfig& fault, const char* kind, const char* key,
                        int64_t value) {
    if (fault.kind != kind || value > 1) return;
    fail(ExitCode::usage, "faults.kind = {} finds nothing to strike with {} = {}: at least 2", kind,
         key, value);
  };
  for (const FaultConfig& fault : config.faults) {
    const bool rings = parallel.cp > 1 && parallel.context == ContextExchange::ring;
    if (!rings) needs(fault, "swapped_send", "parallel.pp", parallel.pp);
    needs(fault, "zigzag_half", "parallel.cp", parallel.cp);
    needs(fault, "gradient_axis", "parallel.ep", parallel.ep);
    if (fault.kind == "missing_wait" && fault.site.empty()) {
      fail(ExitCode::usage,
           "faults.kind = missing_wait needs faults.site, part of a wait's place such as "
           "\"qwen3_moe.cc\"");
    }
    const bool in_save = fault_site(fault.kind) == FaultSite::checkpoint;
    if (!fault_place(fault).name.empty() && in_save) {
      fail(
          ExitCode::usage,
          "faults.site = '{}' of kind {}: a save has no communicator; write '#k' for its k-th call",
          fault.site, fault.kind);
    }
    if (fault.seconds != FaultConfig{}.seconds && !takes_time(fault.kind)) {
      fail(ExitCode::usage,
           "faults.seconds = {} is of pause, slow_link and flapping_link, not of {}", fault.seconds,
           fault.kind);
    }
    check_place(fault, config, derived);
  }
}

std::vector<FaultConfig> drawn_faults(const Config& config, StepRange steps) {
  const Derived derived = derive(config, ConfigUse::planned);
  std::vector<FaultConfig> striking;
  for (size_t entry = 0; entry < config.faults.size(); ++entry) {
    FaultConfig fault = config.faults[entry];
    if (fault.probability > 0) {
      const RandomSequence draws{config.run.seed, RandomStream::faults, entry};
      const uint64_t base = 4 * static_cast<uint64_t>(steps.first);
      std::vector<int64_t> candidates;
      const bool in_save = fault_site(fault.kind) == FaultSite::checkpoint;
      for (int64_t step = steps.first + 1; step <= steps.last; ++step) {
        if (!in_save || saves_at(config, derived, step)) candidates.push_back(step);
      }
      if (candidates.empty() || random_uniform(draws, base) >= fault.probability) continue;
      fault.rank =
          static_cast<int64_t>(random_below(static_cast<uint64_t>(derived.ranks), draws, base + 1));
      fault.step = candidates[random_below(candidates.size(), draws, base + 2)];
      fault.probability = 0;
    }
    striking.push_back(std::move(fault));
  }
  return striking;
}

std::string describe_fault(const FaultConfig& fault) {
  return fmt::format("{} on rank {} at step {}", fault.kind, fault.rank, fault.step);
}

}  // namespace cambium
