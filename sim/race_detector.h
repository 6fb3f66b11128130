// RaceDetector: two accesses of a rank's memory, one of them a write, that nothing orders.
//
// Vector clocks over the timelines of all ranks (host and streams). A task knows what its stream
// knew, what the host knew when it enqueued it, and what it waited for; a transfer that completes
// knows what its peers knew when they arrived. Every task declares the bytes it touches when it is
// enqueued (ops through visit_views, transfers through their buffers); they are checked when it
// starts, before it runs:
//   - against the last write and the last reads of the same bytes (FastTrack), wherever those ran;
//   - against tasks of the rank's other streams that were enqueued earlier and have not started.
// The verdict does not depend on who happened to run first. Memory that was freed and used again is
// the same bytes. A race is an Error with exit code 51 that names both accesses.
//
// A transfer's buffers are touched from its arrival until its ticket completes, by whoever moves
// the data. NOTE: that a peer has read a buffer is known through the ticket alone.
//
// A ticket that was leaked, which the host does not know to be complete when the rank's program
// returns, is an Error with exit code 70 that names its call.
//
// It also counts the waits, tells which of them were implied by others, and can leave one out.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "sim/cluster.h"

namespace cambium::sim {

using VectorClock = std::vector<uint64_t>;  // by timeline; missing entries are 0

class RaceDetector final : public StreamObserver {
 public:
  RaceDetector(int ranks, LeftOutWait left_out_wait);

  void add_stream(const Stream& stream, int rank, const WorkPlace& place);
  void declare(const Task& task) override;
  bool keeps_wait(const Stream& stream, const Event& event, std::source_location site) override;
  void starts(const Stream& stream) override;
  void waited(const Stream& stream, const Event& event) override;

  // A transfer at its stream's head: what the stream knows; and what it learns of a peer's.
  VectorClock arrival(const Stream& stream);
  void learn(const Stream& stream, const VectorClock& clock);

  // The host of `rank`: false when the wait is left out.
  bool keeps_host_wait(int rank, const Event& event, std::source_location site);
  void host_waited(int rank, const Event& event, std::source_location site);
  void host_touches(int rank, const MemoryAccess& access, std::source_location site);
  // The rank's program returned: a ticket that nothing led to the host is an Error.
  void check_tickets(int rank) const;

  RaceReport report() const;

 private:
  // One access, for reports.
  struct Note {
    const char* op_name = "";
    const char* view = "";
    std::source_location site;
    WorkPlace place;  // where the trainer was when it enqueued the task
    std::string timeline;
    Access access = Access::read;
    uint64_t number = 0;  // of the task in its stream
    uintptr_t begin = 0, end = 0;
  };
  struct Epoch {
    int timeline = -1;
    uint64_t tick = 0;
    std::shared_ptr<const Note> note;
  };
  // Bytes with one history.
  struct Cell {
    uintptr_t end = 0;
    Epoch write;
    std::vector<Epoch> reads;  // one per timeline, since the write
  };
  struct Declared {
    uint64_t sequence = 0;
    uint64_t order = 0;  // the rank's program order
    std::vector<std::shared_ptr<const Note>> notes;
  };
  struct RankState;
  struct StreamState {
    const Stream* stream = nullptr;
    RankState* rank = nullptr;
    int timeline = 0;
    VectorClock clock;
    uint64_t seen_host_version = 0;
    std::deque<std::pair<uint64_t, VectorClock>> from_host;   // by the first task that knows it
    std::vector<std::pair<uint64_t, VectorClock>> knowledge;  // `clock` from a task on
    std::deque<Declared> declared;                            // not started
    std::deque<std::pair<uint64_t, WaitSite*>> waits;         // enqueued, not over
    uint64_t last_ticket = 0;                                 // the last transfer's
    std::source_location last_site;
  };
  struct RankState {
    int timeline = 0;
    const WorkPlace* place = nullptr;  // of the trainer's host code
    VectorClock clock;                 // the host's
    uint64_t version = 1;
    uint64_t orders = 0;
    std::map<uintptr_t, Cell> cells;
    std::vector<StreamState*> streams;
  };

  StreamState& state(const Stream& stream) { return *streams_.at(&stream); }
  uint64_t next(const StreamState& s) const { return s.stream->completed() + 1; }
  void note_host(StreamState& s);
  void advance(StreamState& s);
  VectorClock clock_at(const Event& event);
  WaitSite& wait_site(const std::string& waiter, const Event& event, std::source_location site);
  bool leaves_out(const WaitSite& wait, const RankState& rank) const;
  void check_pending(const RankState& rank, const StreamState* own, const Note& note,
                     uint64_t order) const;
  void check_and_record(RankState& rank, const VectorClock& clock, const Epoch& epoch);
  void split(RankState& rank, uintptr_t at);
  [[noreturn]] void report_race(const Note& later, const Note& earlier) const;

  LeftOutWait left_out_wait_;
  mutable std::mutex mutex_;
  int timelines_ = 0;
  std::vector<std::unique_ptr<RankState>> ranks_;
  std::unordered_map<const Stream*, std::unique_ptr<StreamState>> streams_;
  std::map<std::string, WaitSite> wait_sites_;
  int64_t accesses_ = 0;
};

}  // namespace cambium::sim
