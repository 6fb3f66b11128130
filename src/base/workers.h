// Workers: the worker threads of this process, and the only source of parallelism on the CPU.
//
// Results never depend on the number of workers: callers cut work into chunks by the problem alone,
// chunks write disjoint outputs, and which thread runs a chunk is not observable.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>

namespace cambium {

// Scratch memory of one thread, grown on demand, 64-byte aligned, contents undefined at each call.
class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  // `count` floats; valid until the next call on the same slot. Slots 0..7 are independent.
  float* floats(int slot, int64_t count);

 private:
  struct Slot {
    float* data = nullptr;
    int64_t capacity = 0;
  };
  Slot slots_[8];
};

class Workers {
 public:
  // `threads` >= 1 counts the calling thread; threads - 1 are started.
  explicit Workers(int threads);
  ~Workers();
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;
  int threads() const;

  // Calls body(chunk, scratch) for every chunk in [0, chunks), on any threads, and returns when all
  // are done. Nested calls are allowed: a thread inside a chunk runs what idle threads do not take.
  // The first exception by chunk number is rethrown.
  template <class Body>
  void parallel_for(int64_t chunks, Body&& body) {
    using Stored = std::remove_reference_t<Body>;
    run(chunks, const_cast<void*>(static_cast<const void*>(&body)),
        [](void* stored, int64_t chunk, Scratch& scratch) {
          (*static_cast<Stored*>(stored))(chunk, scratch);
        });
  }

  // Runs chunks of a parallel_for that another thread has in flight, for a thread that would only
  // spin; false when there are none. `seen` is the caller's, 0 at first.
  bool help(uint64_t& seen);

 private:
  struct State;
  using Call = void (*)(void* body, int64_t chunk, Scratch& scratch);
  void run(int64_t chunks, void* body, Call call);
  std::unique_ptr<State> state_;
};

}  // namespace cambium
