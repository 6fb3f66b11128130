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
#include <mutex>
#include <source_location>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "src/base/check.h"
#include "src/base/view.h"
#include "src/base/work_place.h"
#include "src/base/workers.h"

namespace cambium {

class Stream;

// A launch as data: the same bytes are the same launch.
struct DeviceLaunch {
  void (*call)(const void* object, Workers&) = nullptr;
  const void* object = nullptr;  // copied by whoever keeps it; padding is zero
  int64_t bytes = 0;
};

// What a stream is on a GPU (kernels/cuda_stream.h). There a task is complete when it has been
// launched: streams are ordered on the device, and the host waits for it in `Host::wait` alone.
class DeviceStream {
 public:
  virtual ~DeviceStream() = default;
  virtual void* native() const = 0;  // a cudaStream_t
  // Takes the launch over, to do it together with others, but before anything that asks for
  // native(), wait_for() or synchronize(). False: it is to be done now.
  virtual bool take_over(const DeviceLaunch&) { return false; }
  // What is launched from now on runs after everything launched so far on `other`.
  virtual void wait_for(const DeviceStream& other) = 0;
  // Returns when everything launched so far is done; reports a failed kernel.
  virtual void synchronize() = 0;
};

// `in_turn`: the driver launches, as it runs tasks on the CPU (schedule exploration).
enum class LaunchOrder : uint8_t { at_once, in_turn };

// A point in a stream: complete when every task enqueued before `record()` has run. Copyable.
// A default event is complete. Tickets of collectives are events (src/comm/comm.h).
struct Event {
  const Stream* stream = nullptr;
  uint64_t sequence = 0;
  bool is_complete() const;
  // Waits until the device has done what was launched on a complete event's stream.
  void synchronize_device() const;
};

// One op of a shape-only run: what it is, when the host issued it, how long it takes alone.
struct TimedOp {
  const char* name = "";
  int64_t issue_ns = 0;
  int64_t duration_ns = 0;
  WorkPlace place;
  enum class Bound : uint8_t { compute, memory } bound = Bound::compute;
};

// A stream's virtual time (sim/virtual_time.h): `now_ns` is when all it has completed was done.
class StreamClock {
 public:
  virtual ~StreamClock() = default;
  // The op at the stream's head. Returns false when its end is not known yet; then it wakes the
  // stream.
  virtual bool run(const TimedOp& op) = 0;
  // The stream waits for task `sequence` of the stream that `other` is of.
  virtual void wait_for(const StreamClock& other, uint64_t sequence) = 0;
  int64_t now_ns() const { return now_ns_; }
  // When task `sequence`, which is complete, was done; tasks count from 1.
  int64_t ended_ns(uint64_t sequence) const {
    return sequence == 0 ? 0 : ended_ns_[static_cast<size_t>(sequence - 1)];
  }
  void note_completed() { ended_ns_.push_back(now_ns_); }

 protected:
  int64_t now_ns_ = 0;
  std::vector<int64_t> ended_ns_;
};

// A task that may have to wait for other streams: what communicators are built from.
class GatedTask {
 public:
  virtual ~GatedTask() = default;
  // Called when the task is at its stream's head, and again after each `wake()` of that stream.
  // Returns true when done. Before it returns false, something that will call `wake()` once more
  // progress is possible is in place.
  virtual bool advance(Workers& workers) = 0;
};

// Bytes that a task or the host touches, and the view that names them.
struct MemoryAccess {
  const void* data = nullptr;
  int64_t bytes = 0;
  Access access = Access::read;
  const char* view = "";
};

// Sees what a stream's tasks touch and wait for (sim/race_detector.h). Calls come from the host's
// program order (`declare`, `keeps_wait`) and from the thread that runs the stream (the others).
class StreamObserver {
 public:
  virtual ~StreamObserver() = default;
  // The next task to be enqueued.
  struct Task {
    const Stream& stream;
    const char* op_name = "";
    std::span<const MemoryAccess> accesses;  // what it touches
    std::source_location site;
    enum class Kind : uint8_t { op, transfer } kind = Kind::op;
  };
  virtual void declare(const Task& task) = 0;
  // False: the wait is left out, to see what it is good for.
  virtual bool keeps_wait(const Stream& stream, const Event& event, std::source_location site) = 0;
  // The task at the head starts, or its wait is over.
  virtual void starts(const Stream& stream) = 0;
  virtual void waited(const Stream& stream, const Event& event) = 0;
};

// The streams that have something to run, oldest first. Shared by a driver's threads.
class ReadyStreams {
 public:
  void push(Stream& stream);
  // The oldest, null when empty.
  Stream* pop();
  // The one at `index` < count(), for a driver that chooses.
  Stream* take(int64_t index);
  const Stream* at(int64_t index);
  // Without the lock: idle threads ask all the time.
  int64_t count() const { return count_.load(std::memory_order_seq_cst); }

 private:
  std::mutex mutex_;
  std::deque<Stream*> streams_;
  std::atomic<int64_t> count_{0};  // streams_.size()
};

class Stream {
 public:
  // `name` is for reports ("rank 3 compute"). With `ready`, the stream puts itself there whenever
  // it has something to run; without, the driver polls.
  explicit Stream(std::string name, ReadyStreams* ready = nullptr)
      : name_(std::move(name)), ready_(ready) {}
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream();
  const std::string& name() const { return name_; }
  // Null on the CPU.
  DeviceStream* device() const { return device_; }
  void* native() const { return device_ == nullptr ? nullptr : device_->native(); }
  void set_device(DeviceStream* device, LaunchOrder order = LaunchOrder::at_once) {
    device_ = device;
    launch_order_ = order;
  }

  // Null unless somebody watches; CPU streams only.
  StreamObserver* observer() const { return observer_; }
  void set_observer(StreamObserver* observer) { observer_ = observer; }
  // Shape-only runs: ops are charged to `clock`, and waits are waits of virtual time.
  void set_clock(StreamClock* clock) { clock_ = clock; }
  StreamClock* clock() const { return clock_; }
  void charge(const TimedOp& op);

  // Runs `run(args, workers)` after everything enqueued before. `op_name` has static lifetime.
  template <class Args>
  void enqueue(const char* op_name, void (*run)(const Args&, Workers&), const Args& args) {
    static_assert(std::is_trivially_copyable_v<Args>, "args structs own nothing");
    static_assert(alignof(Stored<Args>) <= kTaskAlignment);
    Task& task = push(TaskKind::op, op_name, sizeof(Stored<Args>));
    new (task.payload()) Stored<Args>{run, args};
    task.call = [](const void* object, Workers& workers) {
      const auto& call = *static_cast<const Stored<Args>*>(object);
      call.run(call.args, workers);
    };
  }

  // The same for a launcher of kernels on this stream's device: at once when nothing is queued.
  template <class Args>
  void launch(const char* op_name, void (*run)(const Args&, Stream&), const Args& args) {
    static_assert(std::is_trivially_copyable_v<Args>, "args structs own nothing");
    constexpr auto kCall = [](const void* object, Workers&) {
      const auto& call = *static_cast<const StoredLaunch<Args>*>(object);
      call.run(call.args, *call.stream);
    };
    if (launches_at_once()) {
      StoredLaunch<Args> launch{run, this, args};
      __builtin_clear_padding(&launch);
      if (device_ == nullptr || !device_->take_over({kCall, &launch, sizeof launch})) {
        run(args, *this);
      }
      count_launched();
      return;
    }
    Task& task = push(TaskKind::op, op_name, sizeof(StoredLaunch<Args>));
    new (task.payload()) StoredLaunch<Args>{run, this, args};
    task.call = kCall;
  }

  // An event that completes when everything enqueued so far has run.
  Event record() const { return Event{this, enqueued_}; }
  // Later tasks of this stream run only after `event` is complete.
  void wait(const Event& event, std::source_location site = std::source_location::current());
  // `task` in this stream's order; it must live until it is done. For communicators. With `at_once`
  // a device's stream that has nothing queued lets it advance first, by these workers.
  void enqueue_gated(const char* op_name, GatedTask& task, Workers* at_once = nullptr);

  uint64_t completed() const { return completed_.load(std::memory_order_acquire); }
  uint64_t enqueued() const { return enqueued_; }
  bool is_idle() const { return completed() == enqueued_; }

  // Driver side; never at the same time as the calls above. One thread at a time per stream.
  // Runs tasks until the queue is empty, its head must wait, or `most` tasks have run; returns the
  // number run. An op's exception leaves with the op at the head.
  int64_t drain(Workers& workers, int64_t most = INT64_MAX);
  // The same for a stream taken from its `ready` list, to which it returns when woken meanwhile or
  // cut short by `most`.
  int64_t run_ready(Workers& workers, int64_t most = INT64_MAX);
  // The head may be able to run: callable from any thread. No effect without a `ready` list.
  void wake();

  // What the queue stands at, for reports. All empty when idle.
  struct Head {
    const char* op_name = "";
    Event event;                       // when the head is a wait
    const GatedTask* gated = nullptr;  // when it is a gated task
  };
  Head head() const;
  // What the head waits for, in words; empty when idle.
  std::string blocked_on() const;

 private:
  static constexpr int64_t kTaskAlignment = 16;
  static constexpr int64_t kChunkBytes = 32 << 10;  // about 60 ops
  enum class TaskKind : uint32_t { op, wait, gated, timed };
  enum class State : uint8_t { parked, queued, running, notified };
  template <class Args>
  struct Stored {
    void (*run)(const Args&, Workers&);
    Args args;
  };
  template <class Args>
  struct StoredLaunch {
    void (*run)(const Args&, Stream&);
    Stream* stream;
    Args args;
  };
  struct alignas(kTaskAlignment) Task {
    TaskKind kind = TaskKind::op;
    uint32_t bytes = 0;  // of this header and its payload
    const char* op_name = "";
    void (*call)(const void*, Workers&) = nullptr;
    void* payload() { return this + 1; }
    const void* payload() const { return this + 1; }
  };
  // Tasks lie one after another in chunks, which are used again.
  struct Chunk {
    Chunk* next = nullptr;
    int64_t used = 0;
    int64_t capacity = 0;
    std::byte* data() { return reinterpret_cast<std::byte*>(this) + kHeaderBytes; }
    static constexpr int64_t kHeaderBytes = 32;
  };
  static_assert(sizeof(Chunk) <= Chunk::kHeaderBytes);
  struct Waiter {
    uint64_t sequence = 0;
    Stream* stream = nullptr;
  };

  Task& push(TaskKind kind, const char* op_name, int64_t payload_bytes);
  Chunk* new_chunk(int64_t bytes);
  Task& front() const;
  void pop_front();
  bool run_head(Workers& workers);
  bool launches_at_once() const {
    const bool launches = device_ != nullptr && launch_order_ == LaunchOrder::at_once;
    return (launches || clock_ != nullptr) && is_idle();
  }
  // A task that ran without being queued. NOTE: nobody waits for it, as its number is new.
  void count_launched() {
    if (clock_ != nullptr) clock_->note_completed();
    completed_.store(++enqueued_, std::memory_order_release);
  }
  void order_after(const Event& event);
  // Wakes `stream` when `sequence` completes; false when it has.
  bool add_waiter(uint64_t sequence, Stream& stream) const;
  void wake_waiters(uint64_t completed);

  std::string name_;
  ReadyStreams* ready_ = nullptr;
  DeviceStream* device_ = nullptr;
  StreamObserver* observer_ = nullptr;
  StreamClock* clock_ = nullptr;
  LaunchOrder launch_order_ = LaunchOrder::at_once;
  Chunk* head_ = nullptr;  // oldest chunk
  Chunk* tail_ = nullptr;
  Chunk* spare_ = nullptr;
  int64_t head_offset_ = 0;
  uint64_t enqueued_ = 0;
  std::atomic<uint64_t> completed_{0};
  std::atomic<State> state_{State::parked};
  bool head_waits_ = false;  // the head is registered with the event it waits for
  // Streams that wait for this one; `next_waiter_` is the smallest sequence among them.
  mutable std::mutex waiters_mutex_;
  mutable std::vector<Waiter> waiters_;
  mutable std::atomic<uint64_t> next_waiter_{UINT64_MAX};
};

inline bool Event::is_complete() const {
  return stream == nullptr || stream->completed() >= sequence;
}

inline void Event::synchronize_device() const {
  if (stream != nullptr && stream->device() != nullptr) stream->device()->synchronize();
}

// How a rank's host code waits. The simulator yields the rank's fiber; `ImmediateHost` drains.
class Host {
 public:
  virtual ~Host() = default;
  // Returns when `event` is complete, on the device too.
  virtual void wait(const Event& event,
                    std::source_location site = std::source_location::current()) = 0;
  // The host reads or writes memory that tasks touch too: to be found by race detection.
  virtual void touches(const MemoryAccess&,
                       std::source_location = std::source_location::current()) {}
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
