// Fiber: a function on its own stack that suspends and resumes, announced to the sanitizers.
//
// The switch itself is boost.context's; the stack is mmapped with a guard page below it, so an
// overflow faults instead of overwriting a neighbour, and only touched pages cost memory. All
// fibers of a scheduler run on the thread that made them.
#pragma once

#include <cstdint>

namespace cambium::sim {

class Fiber {
 public:
  using Entry = void (*)(void* argument);
  // Nothing runs until the first resume. `entry` lets no exception out.
  Fiber(int64_t stack_bytes, Entry entry, void* argument);
  // The fiber has finished or was never resumed; its stack is not unwound here.
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // From the scheduler: runs the fiber until it suspends or finishes.
  void resume();
  // From inside the fiber: back to the scheduler.
  void suspend();
  bool started() const { return started_; }
  bool finished() const { return finished_; }

 private:
  struct Announcements;  // to the sanitizers
  template <class Transfer>
  static void enter(Transfer transfer);

  Entry entry_;
  void* argument_;
  void* mapping_ = nullptr;
  int64_t mapping_bytes_ = 0;
  void* own_context_ = nullptr;
  void* scheduler_context_ = nullptr;
  bool started_ = false;
  bool finished_ = false;
  // Sanitizers: the scheduler's stack, and handles of both sides.
  const void* scheduler_stack_ = nullptr;
  uint64_t scheduler_stack_bytes_ = 0;
  void* own_fake_stack_ = nullptr;
  void* scheduler_fake_stack_ = nullptr;
  void* own_thread_ = nullptr;
  void* scheduler_thread_ = nullptr;
};

}  // namespace cambium::sim
