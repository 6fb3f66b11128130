// What this rank has posted on each communicator, and how far it has come: what the watchdog reads.
//
// A communicator posts from the rank's host code; the job's watch thread looks (src/comm/job.h).
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "src/comm/comm.h"
#include "src/comm/stall_report.h"

namespace cambium {

// How far a posted call is; asked from any thread.
class CallProbe {
 public:
  virtual ~CallProbe() = default;
  virtual CallState state() const = 0;
};

// A communicator's transport; asked from any thread.
class TransportProbe {
 public:
  virtual ~TransportProbe() = default;
  // Why the transport has broken down; empty while it works.
  virtual std::string failure() const = 0;
};

struct LogGroup {
  std::string name;
  std::vector<int> members;  // ranks of the job
};

class CollectiveLog {
 public:
  // Returns the group's handle. Until `joined`, the making of the communicator is its outstanding
  // call.
  int add_group(LogGroup group);
  void joined(int group, const TransportProbe& transport);
  // Before the transport goes.
  void remove_group(int group);
  // A call that was handed to the transport; the log shares `probe` until the call is done.
  void post(int group, const CollectiveCall& call, std::shared_ptr<const CallProbe> probe);
  void set_step(int64_t step);

  // Forgets calls that are done and returns how long the oldest of the others has run: since this
  // function first saw it run.
  int64_t longest_running_ns();
  // Adds to every running call's start a time in which this process did not run.
  void postpone(int64_t pause_ns);
  // The first failure of a transport, or empty.
  std::string transport_failure() const;
  RankReport report() const;

 private:
  struct Posted {
    uint64_t number = 0;
    CollectiveCall call;
    std::vector<AwaitedMessage> messages;
    std::shared_ptr<const CallProbe> probe;  // null: runs until the communicator is made
    int64_t running_since_ns = 0;            // 0 = not seen to run
  };
  struct Group {
    LogGroup of;
    const TransportProbe* transport = nullptr;
    bool removed = false;
    uint64_t posted = 0;
    CollectiveCall last;
    std::map<int, ChannelCounts> channels;
    std::deque<Posted> outstanding;
  };
  static CallState state_of(const Posted& posted);
  void number_messages(Group& group, const CollectiveCall& call, Posted* posted);

  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<Group>> groups_;
  int64_t step_ = 0;
};

}  // namespace cambium
