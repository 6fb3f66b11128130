// The simulated communicator: rendezvous of all ranks' calls in one process.
//
// A call becomes a Transfer in its stream. Collectives meet in a Meeting, keyed (group, n-th call);
// messages of `exchange` meet in a Mail, keyed (group, source, destination, n-th message). The
// signature is compared when a call is posted, before anything runs; the first difference is an
// Error with exit code 22. Data moves in stages: a stage starts when all members have reached it
// (zero-buffer, as on a network without eager messages), and every member writes its own side only,
// so members work in parallel. The last stage only waits, so a ticket completes when every peer has
// read this rank's buffers. Messages of one exchange progress independently of each other.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "sim/cluster.h"

namespace cambium::sim {

class Group;
class SimCommunicator;
class FaultInjector;
class OrderHazards;
class RaceDetector;
struct Meeting;
struct Mail;

// A rank's device: how many more transfers it can hold, and the streams that wait for room.
struct DeviceSlots {
  int free = 0;
  std::vector<Stream*> waiting;
};

class Scheduler;

// How long a transfer stands at its stream's head before it starts (injected faults).
struct Delay {
  int64_t ns = 0;
  const char* why = "";
  Scheduler* scheduler = nullptr;
};

// One rank's posted call: a task of its stream.
class Transfer final : public GatedTask {
 public:
  bool advance(Workers& workers) override;

  CollectiveCall call;
  Group* group = nullptr;
  int member = 0;
  uint64_t sequence = 0;         // of a collective in its group
  uint64_t launch_position = 0;  // among its rank's, from 1 (OrderHazards)
  Meeting* meeting = nullptr;    // collectives
  std::vector<Mail*> sends;      // exchange, as in call.sends
  std::vector<Mail*> recvs;
  bool started = false;  // reached its stream's head
  bool done = false;
  int arrival_number = 0;  // among the members of its meeting
  Delay delay;
  std::vector<uint64_t> arrival_clock;  // what its stream knew when it started (race detection)
  // Virtual time: posted, at its stream's head, peers there, done; and the trainer's place then.
  int64_t issue_ns = 0, ready_ns = 0, moves_from_ns = 0, end_ns = 0;
  WorkPlace place;

 private:
  void note_completed();
  bool take_slot();
  bool is_delayed();
  bool advance_collective(Workers& workers);
  bool advance_exchange(Workers& workers);
  void run_stage(int stage, Workers& workers);
  void poison_receive_side(Workers& workers);

  int stage_ = 0;
  bool arrived_ = false;
  bool holds_slot_ = false;
  int64_t delayed_until_ns_ = 0;

  friend class Group;
};

constexpr int kMostStages = 3;
// Stages of a collective: all_reduce reduces, gathers, waits; a barrier only waits.
int stages_of(CollectiveKind kind);

// The n-th collective of a group.
struct Meeting {
  std::vector<Transfer*> transfers;  // by member; null until posted
  int posted = 0;
  std::array<std::atomic<int>, kMostStages> missing;  // members that have not reached the stage
  std::atomic<int> arrivals{0};                       // members that have started
  std::atomic<int> left{0};                           // members that have completed
};

struct Channel;

// The n-th message from one member to another.
struct Mail {
  Channel* channel = nullptr;
  Transfer* send = nullptr;
  Transfer* recv = nullptr;
  Message sent;  // as the sender described it
  Message received;
  std::atomic<int> missing{2};  // sides that have not reached their stream's head
  std::atomic<bool> copied{false};
  int closed_sides = 0;  // sides whose transfer was taken back
};

// All messages from one member to another, in order.
struct Channel {
  std::deque<Mail> mails;
  uint64_t first = 0;  // number of mails.front()
  uint64_t sends = 0;
  uint64_t recvs = 0;
};

// A communicator's state shared by its members. Posting happens on the scheduler's thread only.
class Group {
 public:
  Group(std::string name, std::vector<int> members, const ClusterOptions& options, Workers& workers,
        RaceDetector* races, OrderHazards* order_hazards, std::vector<DeviceSlots>& slots);
  const std::string& name() const { return name_; }
  const std::vector<int>& members() const { return members_; }
  int ranks() const { return static_cast<int>(members_.size()); }
  // Members that this run simulates: all, but for folded ranks.
  int participants() const { return participants_; }
  VirtualTime* time() const { return time_; }
  ReductionOrder order() const { return order_; }
  Poison poison() const { return poison_; }
  bool moves_data() const { return moves_data_; }
  Workers& workers() const { return workers_; }
  RaceDetector* races() const { return races_; }
  // Of a member's device; null when any number of transfers fits.
  DeviceSlots* slots(int member) const {
    return slots_.empty() ? nullptr
                          : &slots_[static_cast<size_t>(members_[static_cast<size_t>(member)])];
  }

  // Makes room for a call; `bind` then gives it its place and checks it against its peers.
  Transfer& new_transfer(int member);
  void bind(Transfer& transfer, CollectiveCall call);

  // For reports.
  bool joined(int member) const { return joined_[static_cast<size_t>(member)]; }
  void join(int member) { joined_[static_cast<size_t>(member)] = true; }
  uint64_t posted(int member) const { return posted_[static_cast<size_t>(member)]; }
  // The member's posted collective, null when not posted or completed by all.
  const Transfer* find(int member, uint64_t sequence) const;
  std::string describe() const;  // 'dp' [0,1,2]

 private:
  void bind_collective(Transfer& transfer);
  void bind_exchange(Transfer& transfer);
  Mail& mail(Channel& channel, uint64_t number);
  void retire();
  void compare(const Transfer& transfer, const Transfer& peer) const;
  std::string hint(const Transfer& transfer, const Transfer& peer) const;

  std::string name_;
  std::vector<int> members_;
  ReductionOrder order_;
  Poison poison_;
  bool moves_data_;
  Workers& workers_;
  RaceDetector* races_;
  OrderHazards* order_hazards_;  // null when races are not looked for
  std::vector<DeviceSlots>& slots_;
  VirtualTime* time_;
  int participants_ = 0;
  std::vector<bool> joined_;
  std::vector<uint64_t> posted_;
  std::deque<std::unique_ptr<Meeting>> meetings_;  // numbers first_ ...
  uint64_t first_ = 0;
  std::vector<std::unique_ptr<Meeting>> spare_meetings_;
  std::map<std::pair<int, int>, Channel> channels_;  // (source, destination)
  std::deque<Transfer*> exchanges_;                  // oldest first
  std::vector<std::unique_ptr<Transfer>> transfers_;
  std::vector<Transfer*> spare_transfers_;
};

class SimCommunicator final : public Communicator {
 public:
  struct Hooks {
    FaultInjector* injector = nullptr;  // null when no fault strikes this rank
    Scheduler* explored = nullptr;      // not null: draws how late a transfer starts
  };
  SimCommunicator(Group& group, int member, const Hooks& hooks)
      : Communicator(group.name(), member, group.ranks()), group_(group), hooks_(hooks) {}
  Ticket post(CollectiveCall call) override;
  // `post` without faults.
  Ticket submit(CollectiveCall call, Delay delay = {});
  Group& group() const { return group_; }

 private:
  Group& group_;
  Hooks hooks_;
};

}  // namespace cambium::sim
