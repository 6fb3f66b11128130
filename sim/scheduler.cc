#include "sim/scheduler.h"

#include <algorithm>
#include <deque>
#include <thread>
#include <utility>

#include "fmt/format.h"
#include "sim/virtual_time.h"

namespace cambium::sim {

namespace {

constexpr uint64_t kDecisionsBetweenChanges = 2000;  // a step of a small model on eight ranks
constexpr uint64_t kTransfersOfALate = 16;           // of so many transfers, one starts late
constexpr uint64_t kLatencies = 8;                   // 0 to 7 units: enough to change places
constexpr int64_t kLatencyUnitNs = 10'000;
constexpr int kSpinsBeforeYield = 2000;  // about 5 us: phases are hundreds of tasks long

// SplitMix64 of (seed, counter): the schedule's own stream of draws.
uint64_t mix(uint64_t seed, uint64_t counter) {
  uint64_t z = seed + (counter + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

}  // namespace

Scheduler::Scheduler(int ranks, Workers& workers, uint64_t seed, VirtualTime* time)
    : tasks_(static_cast<size_t>(ranks)), workers_(workers), seed_(seed), time_(time) {}

void Scheduler::leave_out(int rank) {
  task(rank).state = RankState::finished;
  ++finished_;
}

std::vector<Scheduler::StreamRank>::const_iterator Scheduler::find_stream(
    const Stream& stream) const {
  return std::ranges::find(stream_ranks_, &stream, &StreamRank::stream);
}

int Scheduler::rank_of(const Stream& stream) const {
  const auto found = find_stream(stream);
  return found == stream_ranks_.end() ? -1 : found->rank;
}

uint64_t Scheduler::random(uint64_t bound) { return mix(seed_, draws_++) % bound; }

// Candidates are the ready fibers, then the ready streams, oldest first. An actor is a rank's fiber
// (rank) or a stream (ranks + its place), the same in every run of a seed.
int64_t Scheduler::choose(const std::vector<int>& ready) {
  const auto fibers = std::ssize(ready);
  const int64_t candidates = fibers + ready_streams_.count();
  int64_t choice = 0;
  if (exploration_->replay != nullptr) {
    choice = replayed_choice() % candidates;
  } else {
    std::vector<int64_t> actors, among;
    const auto slow = [&](int rank) {
      return std::ranges::find(exploration_->slow_ranks, rank) != exploration_->slow_ranks.end();
    };
    for (int64_t i = 0; i < candidates; ++i) {
      const Stream* stream = i < fibers ? nullptr : ready_streams_.at(i - fibers);
      const auto place = stream == nullptr ? stream_ranks_.end() : find_stream(*stream);
      const int rank = stream == nullptr ? ready[static_cast<size_t>(i)] : place->rank;
      actors.push_back(stream == nullptr ? rank : ranks() + (place - stream_ranks_.begin()));
      if (!slow(rank)) among.push_back(i);
    }
    if (among.empty()) {
      for (int64_t i = 0; i < candidates; ++i) among.push_back(i);
    }
    choice = exploration_->exploration == Exploration::pct
                 ? choose_by_priority(actors, among)
                 : among[random(static_cast<uint64_t>(among.size()))];
  }
  decide(choice);
  return choice;
}

// The tape's choice of the decision at hand; 0 where it has none.
int64_t Scheduler::replayed_choice() {
  const ScheduleTape& tape = *exploration_->replay;
  if (replayed_ >= tape.size() || tape[replayed_].decision != decisions_) return 0;
  return tape[replayed_++].choice;
}

void Scheduler::decide(int64_t choice) {
  const uint64_t decision = decisions_++;
  if (choice == 0 || exploration_->record == nullptr) return;
  exploration_->record->push_back({decision, static_cast<uint32_t>(choice)});
}

// A late transfer starts when nothing else can go on, and those that are late in the order of their
// latencies: completions change places with any that was posted later.
int64_t Scheduler::drawn_latency_ns() {
  int64_t units = 0;
  if (exploration_->replay != nullptr) {
    units = replayed_choice() % static_cast<int64_t>(kLatencies);
  } else if (random(kTransfersOfALate) == 0) {
    units = static_cast<int64_t>(random(kLatencies));
  }
  decide(units);
  return units * kLatencyUnitNs;
}

// An actor's priority is drawn when it is first seen.
int64_t Scheduler::priority(int64_t actor) {
  const auto known = priorities_.find(actor);
  if (known != priorities_.end()) return known->second;
  return priorities_[actor] = static_cast<int64_t>(random(uint64_t{1} << 40));
}

int64_t Scheduler::choose_by_priority(const std::vector<int64_t>& actors,
                                      const std::vector<int64_t>& among) {
  const auto leader = [&] {
    return *std::ranges::max_element(
        among, {}, [&](int64_t i) { return priority(actors[static_cast<size_t>(i)]); });
  };
  // Where the leader changes: about twice in a run of this many decisions.
  if (random(kDecisionsBetweenChanges) == 0) {
    priorities_[actors[static_cast<size_t>(leader())]] = -static_cast<int64_t>(decisions_);
  }
  return leader();
}

bool Scheduler::run() {
  if (time_ != nullptr) return run_in_time_order();
  return exploration_ == nullptr ? run_in_rank_order() : run_explored();
}

// A stream gives way after every task: what the task woke may take part in its next one's time.
bool Scheduler::run_in_time_order() {
  std::deque<int> ready;
  for (int rank = 0; rank < ranks(); ++rank) {
    if (task(rank).state == RankState::ready) ready.push_back(rank);
  }
  while (!all_finished()) {
    if (!ready.empty()) {
      const int rank = ready.front();
      ready.pop_front();
      run_fiber(rank);
      if (task(rank).state == RankState::yielded) ready.push_back(rank);
    } else if (Stream* stream = ready_streams_.pop()) {
      run_stream(*stream, 1);
      const int rank = static_cast<const VirtualStream*>(stream->clock())->rank().rank();
      RankTask& waiting = task(rank);
      if (waiting.state == RankState::waiting && waiting.event.is_complete()) {
        waiting.state = RankState::ready;
        ready.push_back(rank);
      }
    } else if (!time_->advance()) {
      return false;
    }
    if (failed_rank_ >= 0) return false;
  }
  return true;
}

void Scheduler::run_fiber(int rank) {
  RankTask& current = task(rank);
  current.state = RankState::running;
  ++report_.fiber_switches;
  current.fiber->resume();
  if (!current.fiber->finished()) return;
  current.state = current.error == nullptr ? RankState::finished : RankState::failed;
  ++finished_;
  if (current.error != nullptr && failed_rank_ < 0) failed_rank_ = rank;
}

bool Scheduler::run_in_rank_order() {
  while (true) {
    int ran = 0;
    for (int rank = 0; rank < ranks(); ++rank) {
      RankTask& next = task(rank);
      if (next.state == RankState::waiting && next.event.is_complete()) {
        next.state = RankState::ready;
      }
      if (next.state != RankState::ready && next.state != RankState::yielded) continue;
      run_fiber(rank);
      ++ran;
      if (failed_rank_ >= 0) return false;
    }
    if (all_finished()) return true;
    std::vector<int> woken;
    if (ran == 0 && ready_streams_.count() == 0 && !advance_clock(woken)) return false;
    compute_phase();
    if (failed_rank_ >= 0) return false;
  }
}

bool Scheduler::run_explored() {
  std::vector<int> ready(tasks_.size());
  for (int rank = 0; rank < ranks(); ++rank) ready[static_cast<size_t>(rank)] = rank;
  std::vector<int> waiting;
  while (!all_finished()) {
    const int64_t streams = ready_streams_.count();
    const auto fibers = std::ssize(ready);
    if (streams + fibers == 0) {
      if (!advance_clock(ready)) return false;
      continue;
    }
    const int64_t choice = choose(ready);
    if (choice < fibers) {
      const int rank = ready[static_cast<size_t>(choice)];
      ready.erase(ready.begin() + choice);
      run_fiber(rank);
      if (task(rank).state == RankState::yielded) {
        ready.push_back(rank);
        priorities_[rank] = -static_cast<int64_t>(decisions_);  // or it would yield for ever
      }
      if (task(rank).state == RankState::waiting) waiting.push_back(rank);
    } else {
      run_stream(*ready_streams_.take(choice - fibers), 1);
      std::erase_if(waiting, [&](int rank) {
        if (!task(rank).event.is_complete()) return false;
        ready.push_back(rank);
        return true;
      });
    }
    if (failed_rank_ >= 0) return false;
  }
  return true;
}

void Scheduler::run_stream(Stream& stream, int64_t most) {
  try {
    tasks_run_.fetch_add(stream.run_ready(workers_, most), std::memory_order_relaxed);
  } catch (...) {
    // The stream stays at the failed task. All others go on, so that the same failures happen
    // whatever the threads do, and the lowest rank's is reported.
    const std::lock_guard lock(failure_mutex_);
    const int rank = rank_of(stream);
    const auto place = find_stream(stream) - stream_ranks_.cbegin();
    if (failed_rank_ < 0 || std::pair(rank, place) < std::pair(failed_rank_, failed_stream_)) {
      failed_rank_ = rank;
      failed_stream_ = place;
      task(rank).error = std::current_exception();
    }
  }
}

// NOTE: draining_ counts threads that may run a stream, never ones that only look: with many idle
// threads somebody always looks, and nobody would see zero.
void Scheduler::drain_ready() {
  uint64_t seen = 0;
  int spins = 0;
  while (true) {
    if (ready_streams_.count() > 0) {
      draining_.fetch_add(1);
      Stream* stream = ready_streams_.pop();
      if (stream != nullptr) run_stream(*stream, INT64_MAX);
      draining_.fetch_sub(1);
      if (stream != nullptr) spins = 0;
      continue;
    }
    if (draining_.load() == 0 && ready_streams_.count() == 0) return;
    if (workers_.help(seen)) continue;
    if (++spins < kSpinsBeforeYield) {
      __builtin_ia32_pause();
    } else {
      std::this_thread::yield();
    }
  }
}

void Scheduler::compute_phase() {
  if (ready_streams_.count() == 0) return;
  ++report_.compute_phases;
  if (stream_order_ == StreamOrder::in_turn) return drain_ready();
  workers_.parallel_for(workers_.threads(), [this](int64_t, Scratch&) { drain_ready(); });
}

ClusterReport Scheduler::report() const {
  ClusterReport report = report_;
  report.tasks = tasks_run_.load();
  return report;
}

void Scheduler::suspend(RankTask& current) {
  // A switch inside a handler would mix up the thread's stack of caught exceptions.
  CHECK(std::current_exception() == nullptr);
  current.fiber->suspend();
  if (mode_ == Mode::cancelling) throw Cancelled{};
}

void Scheduler::wait(int rank, const Event& event, std::source_location site) {
  if (event.is_complete()) return;
  // A destructor waits while its rank unwinds: the run is over, nothing will touch its buffers.
  if (std::uncaught_exceptions() > 0) return;
  if (mode_ == Mode::cancelling) throw Cancelled{};
  RankTask& current = task(rank);
  current.state = RankState::waiting;
  current.event = event;
  current.site = site;
  suspend(current);
}

void Scheduler::pause(int rank, int64_t delay_ns, const char* why, std::source_location site) {
  task(rank).state = RankState::paused;
  task(rank).site = site;
  sleepers_.push_back({now_ns_ + delay_ns, rank, nullptr, why});
  suspend(task(rank));
}

int64_t Scheduler::delay(Stream& stream, int rank, int64_t delay_ns, const char* why) {
  const std::lock_guard lock(sleepers_mutex_);
  sleepers_.push_back({now_ns_ + delay_ns, rank, &stream, why});
  return sleepers_.back().end_ns;
}

// NOTE: threads add sleepers in any order, so all that wake now wake together, in rank order.
bool Scheduler::advance_clock(std::vector<int>& woken) {
  if (sleepers_.empty()) return false;
  std::ranges::sort(sleepers_, {}, [](const Sleeper& s) { return std::pair(s.end_ns, s.rank); });
  const int64_t next_ns = sleepers_.front().end_ns;
  std::vector<uint64_t> completed(tasks_.size());
  for (const StreamRank& entry : stream_ranks_) {
    completed[static_cast<size_t>(entry.rank)] += entry.stream->completed();
  }
  for (int rank = 0; rank < ranks(); ++rank) {
    RankTask& waiting = task(rank);
    const uint64_t now = completed[static_cast<size_t>(rank)];
    if (std::exchange(waiting.completed, now) != now) waiting.since_ns = now_ns_;
    if (waiting.state != RankState::waiting || next_ns - waiting.since_ns <= watchdog_ns_) continue;
    overdue_rank_ = rank;
    return false;
  }
  now_ns_ = next_ns;
  report_.virtual_ns = now_ns_;
  while (!sleepers_.empty() && sleepers_.front().end_ns == now_ns_) {
    const Sleeper awake = sleepers_.front();
    sleepers_.erase(sleepers_.begin());
    if (awake.stream != nullptr) {
      awake.stream->wake();
    } else {
      task(awake.rank).state = RankState::ready;
      woken.push_back(awake.rank);
    }
  }
  return true;
}

std::string Scheduler::overdue_cause() const {
  const Sleeper& first = sleepers_.front();
  return fmt::format("rank {} {} until {:.6g} s", first.rank, first.why,
                     1e-9 * static_cast<double>(first.end_ns));
}

void Scheduler::hang(int rank, std::source_location site) {
  task(rank).state = RankState::stuck;
  task(rank).site = site;
  suspend(task(rank));
}

void Scheduler::yield(int rank) {
  if (std::uncaught_exceptions() > 0) return;
  if (mode_ == Mode::cancelling) throw Cancelled{};
  task(rank).state = RankState::yielded;
  suspend(task(rank));
}

void Scheduler::cancel() {
  mode_ = Mode::cancelling;
  for (RankTask& current : tasks_) {
    if (current.fiber == nullptr) continue;
    while (current.fiber->started() && !current.fiber->finished()) current.fiber->resume();
  }
}

}  // namespace cambium::sim
