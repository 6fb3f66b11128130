// Streams and events: ordered queues of ops, as CUDA has them.
//
// On the CPU an op runs after its call returned, when something waits on it: `enqueue` copies the
// args struct into the queue, and the driver (sim/scheduler.cc, or `ImmediateHost` in tests) runs
// the queue's head whenever the waits before it are satisfied. Within a stream, program order.
// Across streams, only events order work: a missing `wait` reads poison or stale data.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <source_location>
#include <string>
#include <type_traits>
#include <vector>

#include "src/base/check.h"
#include "src/base/workers.h"

namespace cambium {

class Stream;

// A point in a stream: complete when every task enqueued before `record()` has run. Copyable.
// A default event is complete. Tickets of collectives are events (src/comm/comm.h).
struct Event {
  const Stream* stream = nullptr;
  uint64_t sequence = 0;
  bool is_complete() const;
};

// A counting gate that several streams pass together: a task holding it runs when all `needed`
// participants' streams have reached theirs. Communicators build collectives from gates.
class Gate {
 public:
  explicit Gate(int needed) : missing_(needed) {}
  void arrive() { missing_.fetch_sub(1, std::memory_order_acq_rel); }
  bool is_open() const { return missing_.load(std::memory_order_acquire) <= 0; }

 private:
  std::atomic<int> missing_;
};

class Stream {
 public:
  // `name` is for reports ("rank 3 compute").
  explicit Stream(std::string name) : name_(std::move(name)) {}
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  const std::string& name() const { return name_; }

  // Runs `run(args, workers)` after everything enqueued before. `op_name` has static lifetime.
  template <class Args>
  void enqueue(const char* op_name, void (*run)(const Args&, Workers&), const Args& args) {
    static_assert(std::is_trivially_copyable_v<Args>, "args structs own nothing");
    Task& task = push(TaskKind::op, op_name);
    task.storage = std::make_unique<std::byte[]>(sizeof(Args) + sizeof(run));
    auto* stored = new (task.storage.get()) Stored<Args>{run, args};
    task.object = stored;
    task.call = [](const void* object, Workers& workers) {
      const auto& call = *static_cast<const Stored<Args>*>(object);
      call.run(call.args, workers);
    };
  }

  // An event that completes when everything enqueued so far has run.
  Event record() const { return Event{this, enqueued_}; }
  // Later tasks of this stream run only after `event` is complete.
  void wait(const Event& event);
  // A task that arrives at every gate of `gates` when it reaches the head, and then runs
  // `call(object, workers)` once all are open. For communicators.
  void enqueue_gated(const char* op_name, std::vector<std::shared_ptr<Gate>> gates,
                     std::shared_ptr<void> object, void (*call)(const void*, Workers&));

  uint64_t completed() const { return completed_.load(std::memory_order_acquire); }
  uint64_t enqueued() const { return enqueued_; }
  bool is_idle() const { return completed() == enqueued_; }

  // Driver side. Runs tasks until the queue is empty, its head must wait, or `most` tasks have run;
  // returns the number run. One thread at a time per stream.
  int64_t drain(Workers& workers, int64_t most = INT64_MAX);
  // What the head waits for, for deadlock reports; empty when idle.
  std::string blocked_on() const;

 private:
  enum class TaskKind { op, wait, gated };
  template <class Args>
  struct Stored {
    void (*run)(const Args&, Workers&);
    Args args;
  };
  struct Task {
    TaskKind kind = TaskKind::op;
    const char* op_name = "";
    std::unique_ptr<std::byte[]> storage;
    const void* object = nullptr;
    void (*call)(const void*, Workers&) = nullptr;
    Event event;
    std::vector<std::shared_ptr<Gate>> gates;
    std::shared_ptr<void> owner;
    bool arrived = false;
  };
  Task& push(TaskKind kind, const char* op_name);
  bool head_is_ready(Task& head) const;

  std::string name_;
  std::deque<Task> tasks_;
  uint64_t enqueued_ = 0;
  std::atomic<uint64_t> completed_{0};
};

inline bool Event::is_complete() const {
  return stream == nullptr || stream->completed() >= sequence;
}

// How a rank's host code waits. The simulator yields the rank's fiber; `ImmediateHost` drains.
class Host {
 public:
  virtual ~Host() = default;
  // Returns when `event` is complete.
  virtual void wait(const Event& event,
                    std::source_location site = std::source_location::current()) = 0;
  // Lets other ranks run: before checkpoint I/O and other long host work.
  virtual void yield(const char* why) = 0;
  // Nanoseconds on this rank's clock: wall time, or virtual time when shapes only are run.
  virtual int64_t now_ns() const = 0;
};

// Host for one rank without a communicator (tests, tools): waiting drains the streams it knows.
class ImmediateHost : public Host {
 public:
  explicit ImmediateHost(Workers& workers) : workers_(workers) {}
  void add(Stream& stream) { streams_.push_back(&stream); }
  void wait(const Event& event, std::source_location site) override;
  void yield(const char*) override {}
  int64_t now_ns() const override;

 private:
  Workers& workers_;
  std::vector<Stream*> streams_;
};

}  // namespace cambium
