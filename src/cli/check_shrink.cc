#include "src/cli/check_shrink.h"

#include <algorithm>

#include "fmt/format.h"

namespace cambium {

namespace {

constexpr int64_t kSeedsOfACandidate = 8;
constexpr int64_t kMostRuns = 200;  // checks of the part that failed, alone

using Sets = std::vector<std::string>;

std::vector<std::string> split_tape(const std::string& tape) {
  std::vector<std::string> parts;
  if (tape == "fifo") return parts;
  for (size_t at = 0; at <= tape.size();) {
    const size_t comma = std::min(tape.find(',', at), tape.size());
    parts.push_back(tape.substr(at, comma - at));
    at = comma + 1;
  }
  return parts;
}

std::string joined(const std::vector<std::string>& parts) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : ",") + part;
  return text;
}

std::string join_tape(const std::vector<std::string>& parts) {
  return parts.empty() ? "fifo" : joined(parts);
}

// Without what is the default anyway.
std::string fault_table(const FaultConfig& fault) {
  const FaultConfig defaults;
  std::string text = fmt::format("{{kind=\"{}\"", fault.kind);
  const auto add = [&](const char* key, const auto& value, const auto& usual, const char* quote) {
    if (value != usual) text += fmt::format(",{}={}{}{}", key, quote, value, quote);
  };
  add("rank", fault.rank, defaults.rank, "");
  add("step", fault.step, defaults.step, "");
  add("site", fault.site, defaults.site, "\"");
  add("probability", fault.probability, defaults.probability, "");
  add("seconds", fault.seconds, defaults.seconds, "");
  return text + "}";
}

std::string faults_set(const std::vector<FaultConfig>& faults) {
  std::vector<std::string> tables;
  for (const FaultConfig& fault : faults) tables.push_back(fault_table(fault));
  return "faults=[" + joined(tables) + "]";
}

class Shrinker {
 public:
  explicit Shrinker(const ShrinkRequest& request) : request_(request) {
    repro_.schedule = request.failed.schedule;
  }

  Repro run() {
    repro_.reproduces = fails({}, 0, repro_.schedule);
    if (repro_.reproduces) {
      while (reduce_config()) continue;
      reduce_schedule();
    }
    return std::move(repro_);
  }

 private:
  Config config_with(const Sets& added) const {
    Sets sets = request_.sets;
    sets.insert(sets.end(), repro_.sets.begin(), repro_.sets.end());
    sets.insert(sets.end(), added.begin(), added.end());
    return load_config(request_.path, sets);
  }

  // Whether it still fails alike; then `schedule_` is a schedule that does. A reduction that is no
  // valid configuration does not.
  bool fails(const Sets& added, int64_t seeds, const std::string& schedule) {
    if (++repro_.runs > kMostRuns) return false;
    try {
      const CheckReport report = request_.verdict({.config = config_with(added),
                                                   .seeds = seeds,
                                                   .schedule = schedule,
                                                   .only = request_.failed.part});
      schedule_ = report.schedule;
      return report.exit_code == request_.failed.exit_code;
    } catch (const Error&) {
      return false;
    }
  }

  // With fewer ranks: faults of ranks that are gone strike others.
  static void keep_faults(const Config& now, int64_t ranks, Sets& sets) {
    std::vector<FaultConfig> faults = now.faults;
    for (FaultConfig& fault : faults) fault.rank %= ranks;
    if (std::ranges::any_of(now.faults, [&](const auto& fault) { return fault.rank >= ranks; })) {
      sets.push_back(faults_set(faults));
    }
  }

  std::vector<Sets> candidates() const {
    const Config now = config_with({});
    const ParallelConfig& parallel = now.parallel;
    std::vector<Sets> all;
    for (size_t i = 0; now.faults.size() > 1 && i < now.faults.size(); ++i) {
      std::vector<FaultConfig> fewer = now.faults;
      fewer.erase(fewer.begin() + static_cast<int64_t>(i));
      all.push_back({faults_set(fewer)});
    }
    const auto set = [](const char* key, int64_t value) {
      return fmt::format("{}={}", key, value);
    };
    if (parallel.shard_ranks > 0) all.push_back({set("parallel.shard_ranks", 0)});
    for (const int64_t divisor : {4, 2}) {
      for (const auto& [key, value] :
           {std::pair("parallel.pp", parallel.pp), std::pair("parallel.dp", parallel.dp),
            std::pair("parallel.cp", parallel.cp)}) {
        if (value % divisor != 0) continue;
        Sets fewer{set(key, value / divisor)};
        keep_faults(now, parallel.pp * parallel.dp * parallel.cp / divisor, fewer);
        all.push_back(fewer);
        for (int64_t ep = parallel.ep; ep % 2 == 0;) {
          ep /= 2;
          all.push_back(fewer);
          all.back().push_back(set("parallel.ep", ep));
        }
      }
      if (parallel.ep % divisor == 0) all.push_back({set("parallel.ep", parallel.ep / divisor)});
    }
    for (const int64_t layers : {int64_t{1}, now.model.layers / 2, now.model.layers - 1}) {
      if (layers >= 1 && layers < now.model.layers) all.push_back({set("model.layers", layers)});
    }
    return all;
  }

  bool reduce_config() {
    for (const Sets& candidate : candidates()) {
      if (!fails(candidate, kSeedsOfACandidate, "")) continue;
      repro_.sets.insert(repro_.sets.end(), candidate.begin(), candidate.end());
      repro_.schedule = schedule_;
      return true;
    }
    return false;
  }

  // ddmin: drops ever smaller runs of deviations.
  void reduce_schedule() {
    std::vector<std::string> tape = split_tape(repro_.schedule);
    if (fails({}, 0, "fifo")) tape.clear();
    for (size_t length = (tape.size() + 1) / 2; length >= 1 && !tape.empty();) {
      bool dropped = false;
      for (size_t first = 0; first < tape.size();) {
        std::vector<std::string> fewer = tape;
        const size_t end = std::min(first + length, tape.size());
        fewer.erase(fewer.begin() + static_cast<int64_t>(first),
                    fewer.begin() + static_cast<int64_t>(end));
        if (fails({}, 0, join_tape(fewer))) {
          tape = std::move(fewer);
          dropped = true;
        } else {
          first += length;
        }
      }
      if (length == 1 && !dropped) break;
      length = std::max<size_t>(1, length / 2);
    }
    repro_.schedule = join_tape(tape);
  }

  const ShrinkRequest& request_;
  Repro repro_;
  std::string schedule_;
};

}  // namespace

std::vector<std::string> last_assignments(const std::vector<std::string>& sets) {
  std::vector<std::string> last;
  for (size_t i = 0; i < sets.size(); ++i) {
    const std::string key = sets[i].substr(0, sets[i].find('=') + 1);
    const auto sets_it_again = [&](const std::string& later) { return later.starts_with(key); };
    const auto after = sets.begin() + static_cast<int64_t>(i) + 1;
    if (std::none_of(after, sets.end(), sets_it_again)) last.push_back(sets[i]);
  }
  return last;
}

Repro shrink(const ShrinkRequest& request) { return Shrinker(request).run(); }

}  // namespace cambium
