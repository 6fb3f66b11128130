// Scheduler: runs the ranks' fibers and their streams to the end, or says why it cannot.
//
// Completion-driven. Fibers run until they wait for an event that is not complete; then a compute
// phase drains every runnable stream, on all worker threads at once, until nothing can run; then
// the fibers whose events completed go on. A phase ends in the same state whatever the number of
// threads: every stream runs until it must wait, and what it waits for does not depend on who runs
// first. With a seed, single fibers and single tasks run in random order on one thread instead.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <source_location>
#include <string>
#include <vector>

#include "sim/cluster.h"
#include "sim/fiber.h"

namespace cambium::sim {

enum class RankState { ready, running, waiting, yielded, paused, stuck, finished, failed };

// One rank as the scheduler sees it.
struct RankTask {
  RankState state = RankState::ready;
  Event event;  // waited for
  std::source_location site;
  // On the scheduler's clock: when its streams last completed anything, as far as they had come.
  int64_t since_ns = 0;
  uint64_t completed = 0;
  std::unique_ptr<Fiber> fiber;
  std::exception_ptr error;
};

class Scheduler {
 public:
  // Thrown through a fiber whose run has ended elsewhere, to unwind its stack. Not a
  // std::exception: a rank's handlers for errors must not take it for one.
  struct Cancelled {};

  // With `time`, streams run one after another, and when nothing can go on, time does.
  Scheduler(int ranks, Workers& workers, uint64_t seed, VirtualTime* time = nullptr);
  // Rank `rank` is not of this run.
  void leave_out(int rank);

  // Explores: every choice is drawn from the seed, or replayed.
  void explore(const ClusterOptions& options) { exploration_ = &options; }
  // One stream after another, in the same order every time; ops still use all threads.
  void run_streams_in_turn() { stream_order_ = StreamOrder::in_turn; }

  // Runs every task's fiber to its end (true), or until a rank failed (false, `failed_rank() >= 0`)
  // or nothing can go on (false: a deadlock).
  bool run();

  RankTask& task(int rank) { return tasks_[static_cast<size_t>(rank)]; }
  const RankTask& task(int rank) const { return tasks_[static_cast<size_t>(rank)]; }
  int ranks() const { return static_cast<int>(tasks_.size()); }
  // Streams of all ranks, with the rank that each belongs to, register here.
  ReadyStreams& ready_streams() { return ready_streams_; }
  void add_stream(const Stream& stream, int rank) { stream_ranks_.push_back({&stream, rank}); }
  // -1 for a stream that is not of this run.
  int rank_of(const Stream& stream) const;

  // From the running fiber: returns when `event` is complete.
  void wait(int rank, const Event& event, std::source_location site);
  // From the running fiber: never goes on (an injected fault).
  void hang(int rank, std::source_location site);
  // From the running fiber: lets the other ranks run.
  void yield(int rank);

  // The clock of runs that compute: it stands while anything can run, and else goes to the next
  // sleeper's end, so that injected delays take virtual time and nothing more. A rank that waits
  // and completes nothing for longer than the watchdog allows ends the run there.
  int64_t now_ns() const { return now_ns_; }
  // From the running fiber (`why` is static): goes on after `delay_ns`.
  void pause(int rank, int64_t delay_ns, const char* why, std::source_location site);
  // From any thread: wakes `stream` after `delay_ns`. Returns when that is.
  int64_t delay(Stream& stream, int rank, int64_t delay_ns, const char* why);
  // Of explored runs: how much later than its turn a transfer starts; mostly not at all.
  int64_t drawn_latency_ns();
  void set_watchdog(int64_t limit_ns) { watchdog_ns_ = limit_ns; }
  // The rank that waited for too long, -1 when none did, and whom it waited for.
  int overdue_rank() const { return overdue_rank_; }
  std::string overdue_cause() const;

  int failed_rank() const { return failed_rank_; }
  // Unwinds every started, unfinished fiber. Waits that a stack makes while unwinding return.
  void cancel();
  ClusterReport report() const;

 private:
  bool run_in_rank_order();
  bool run_explored();
  bool run_in_time_order();
  void run_fiber(int rank);
  void suspend(RankTask& task);
  // Drains until nothing can run; records the failure of the lowest rank.
  void compute_phase();
  void drain_ready();
  void run_stream(Stream& stream, int64_t most);
  // Explored runs: which of the ready fibers and streams goes on.
  int64_t choose(const std::vector<int>& ready);
  int64_t replayed_choice();
  void decide(int64_t choice);
  int64_t choose_by_priority(const std::vector<int64_t>& actors, const std::vector<int64_t>& among);
  int64_t priority(int64_t actor);
  // The ranks that woke; false when nobody sleeps or a rank's wait is overdue.
  bool advance_clock(std::vector<int>& woken);
  bool all_finished() const { return finished_ == ranks(); }
  uint64_t random(uint64_t bound);

  struct StreamRank {
    const Stream* stream = nullptr;
    int rank = 0;
  };
  std::vector<StreamRank>::const_iterator find_stream(const Stream& stream) const;
  struct Sleeper {
    int64_t end_ns = 0;
    int rank = 0;
    Stream* stream = nullptr;  // null: the rank's fiber
    const char* why = "";
  };

  std::vector<RankTask> tasks_;
  Workers& workers_;
  uint64_t seed_;
  const ClusterOptions* exploration_ = nullptr;
  VirtualTime* time_;
  uint64_t draws_ = 0;
  uint64_t decisions_ = 0;
  size_t replayed_ = 0;
  std::map<int64_t, int64_t> priorities_;  // by actor (pct)
  ReadyStreams ready_streams_;
  std::vector<StreamRank> stream_ranks_;
  int finished_ = 0;
  int failed_rank_ = -1;
  int64_t failed_stream_ = INT64_MAX;  // place in stream_ranks_
  enum class StreamOrder { at_once, in_turn } stream_order_ = StreamOrder::at_once;
  enum class Mode { running, cancelling } mode_ = Mode::running;
  std::atomic<int> draining_{0};  // threads that may add to ready_streams_
  std::atomic<int64_t> tasks_run_{0};
  std::mutex failure_mutex_;
  int64_t now_ns_ = 0, watchdog_ns_ = INT64_MAX;
  int overdue_rank_ = -1;
  std::mutex sleepers_mutex_;
  std::vector<Sleeper> sleepers_;
  ClusterReport report_;
};

}  // namespace cambium::sim
