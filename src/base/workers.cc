#include "src/base/workers.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "src/base/check.h"

namespace cambium {

Scratch::Scratch() = default;

Scratch::~Scratch() {
  for (Slot& slot : slots_) std::free(slot.data);
}

float* Scratch::floats(int slot, int64_t count) {
  CHECK(slot >= 0 && slot < 8);
  Slot& chosen = slots_[slot];
  if (chosen.capacity < count) {
    std::free(chosen.data);
    const int64_t bytes = (count * 4 + 4095) / 4096 * 4096;
    chosen.data = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(bytes)));
    CHECK(chosen.data != nullptr);
    chosen.capacity = bytes / 4;
  }
  return chosen.data;
}

namespace {

// One parallel_for in flight. Chunks are claimed by an atomic counter.
struct Job {
  void* body = nullptr;
  void (*call)(void*, int64_t, Scratch&) = nullptr;
  int64_t chunks = 0;
  std::atomic<int64_t> next{0};
  std::atomic<int> helpers{0};  // threads that may still touch this job
  std::mutex error_mutex;
  int64_t error_chunk = INT64_MAX;
  std::exception_ptr error;

  bool has_work() const { return next.load(std::memory_order_relaxed) < chunks; }
  void work(Scratch& scratch) {
    for (int64_t chunk = next.fetch_add(1); chunk < chunks; chunk = next.fetch_add(1)) {
      try {
        call(body, chunk, scratch);
      } catch (...) {
        const std::lock_guard lock(error_mutex);
        if (chunk < error_chunk) {
          error_chunk = chunk;
          error = std::current_exception();
        }
      }
    }
  }
};

constexpr int kSpins = 4000;  // about 10 us: ops follow each other closely within a step

}  // namespace

struct Workers::State {
  std::mutex mutex;
  std::condition_variable wake;
  std::vector<Job*> jobs;            // with unclaimed chunks, newest last
  std::atomic<uint64_t> version{0};  // bumped when a job is added
  std::vector<std::unique_ptr<Scratch>> spare;
  bool stop = false;
  std::vector<std::thread> threads;

  std::unique_ptr<Scratch> take_scratch() {
    const std::lock_guard lock(mutex);
    if (spare.empty()) return std::make_unique<Scratch>();
    auto scratch = std::move(spare.back());
    spare.pop_back();
    return scratch;
  }
  void return_scratch(std::unique_ptr<Scratch> scratch) {
    const std::lock_guard lock(mutex);
    spare.push_back(std::move(scratch));
  }
  // The newest job with work, entered; null if none. Requires `mutex`.
  Job* enter_job() {
    for (auto it = jobs.rbegin(); it != jobs.rend(); ++it) {
      if ((*it)->has_work()) {
        (*it)->helpers.fetch_add(1);
        return *it;
      }
    }
    return nullptr;
  }
  void helper_loop();
};

void Workers::State::helper_loop() {
  Scratch scratch;
  uint64_t seen = 0;
  while (true) {
    for (int spin = 0; spin < kSpins && version.load(std::memory_order_acquire) == seen; ++spin) {
      __builtin_ia32_pause();
    }
    Job* job = nullptr;
    {
      std::unique_lock lock(mutex);
      wake.wait(lock, [&] { return stop || version.load() != seen; });
      if (stop) return;
      job = enter_job();
      if (job == nullptr) seen = version.load();
    }
    if (job == nullptr) continue;
    job->work(scratch);
    job->helpers.fetch_sub(1, std::memory_order_acq_rel);
  }
}

Workers::Workers(int threads) : state_(std::make_unique<State>()) {
  CHECK_GE(threads, 1);
  for (int i = 1; i < threads; ++i) {
    state_->threads.emplace_back([this] { state_->helper_loop(); });
  }
}

Workers::~Workers() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->stop = true;
    state_->version.fetch_add(1);
  }
  state_->wake.notify_all();
  for (std::thread& thread : state_->threads) thread.join();
}

int Workers::threads() const { return static_cast<int>(state_->threads.size()) + 1; }

bool Workers::help(uint64_t& seen) {
  if (state_->version.load(std::memory_order_acquire) == seen) return false;
  Job* job = nullptr;
  {
    const std::lock_guard lock(state_->mutex);
    job = state_->enter_job();
    if (job == nullptr) seen = state_->version.load();
  }
  if (job == nullptr) return false;
  auto scratch = state_->take_scratch();
  job->work(*scratch);
  state_->return_scratch(std::move(scratch));
  job->helpers.fetch_sub(1, std::memory_order_acq_rel);
  return true;
}

void Workers::run(int64_t chunks, void* body, Call call) {
  if (chunks <= 0) return;
  Job job;
  job.body = body;
  job.call = call;
  job.chunks = chunks;
  const bool shared = chunks > 1 && !state_->threads.empty();
  if (shared) {
    {
      const std::lock_guard lock(state_->mutex);
      state_->jobs.push_back(&job);
      state_->version.fetch_add(1, std::memory_order_release);
    }
    state_->wake.notify_all();
  }
  auto scratch = state_->take_scratch();
  job.work(*scratch);
  state_->return_scratch(std::move(scratch));
  if (shared) {
    {
      const std::lock_guard lock(state_->mutex);
      std::erase(state_->jobs, &job);
    }
    while (job.helpers.load(std::memory_order_acquire) != 0) __builtin_ia32_pause();
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace cambium
