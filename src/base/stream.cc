#include "src/base/stream.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <new>

namespace cambium {

void ReadyStreams::push(Stream& stream) {
  const std::lock_guard lock(mutex_);
  streams_.push_back(&stream);
  count_.fetch_add(1);
}

Stream* ReadyStreams::pop() {
  const std::lock_guard lock(mutex_);
  if (streams_.empty()) return nullptr;
  Stream* stream = streams_.front();
  streams_.pop_front();
  count_.fetch_sub(1);
  return stream;
}

const Stream* ReadyStreams::at(int64_t index) {
  const std::lock_guard lock(mutex_);
  CHECK_LT(index, std::ssize(streams_));
  return streams_[static_cast<size_t>(index)];
}

Stream* ReadyStreams::take(int64_t index) {
  const std::lock_guard lock(mutex_);
  CHECK_LT(index, std::ssize(streams_));
  Stream* stream = streams_[static_cast<size_t>(index)];
  streams_.erase(streams_.begin() + index);
  count_.fetch_sub(1);
  return stream;
}

Stream::~Stream() {
  for (Chunk* list : {head_, spare_}) {
    while (list != nullptr) {
      Chunk* next = list->next;
      std::free(list);
      list = next;
    }
  }
}

Stream::Chunk* Stream::new_chunk(int64_t bytes) {
  if (spare_ != nullptr && spare_->capacity >= bytes) {
    Chunk* chunk = spare_;
    spare_ = chunk->next;
    chunk->next = nullptr;
    chunk->used = 0;
    return chunk;
  }
  const int64_t capacity = std::max(bytes, kChunkBytes - Chunk::kHeaderBytes);
  void* memory = std::malloc(static_cast<size_t>(Chunk::kHeaderBytes + capacity));
  CHECK(memory != nullptr);
  return new (memory) Chunk{nullptr, 0, capacity};
}

Stream::Task& Stream::push(TaskKind kind, const char* op_name, int64_t payload_bytes) {
  const int64_t bytes = (static_cast<int64_t>(sizeof(Task)) + payload_bytes + kTaskAlignment - 1) /
                        kTaskAlignment * kTaskAlignment;
  if (tail_ == nullptr || tail_->used + bytes > tail_->capacity) {
    Chunk* chunk = new_chunk(bytes);
    (tail_ == nullptr ? head_ : tail_->next) = chunk;
    tail_ = chunk;
  }
  auto* task = new (tail_->data() + tail_->used) Task{kind, static_cast<uint32_t>(bytes), op_name};
  tail_->used += bytes;
  const bool was_idle = is_idle();
  ++enqueued_;
  if (was_idle) wake();
  return *task;
}

Stream::Task& Stream::front() const {
  return *reinterpret_cast<Task*>(head_->data() + head_offset_);
}

// Keeps the invariant of `front`: unless the queue is empty, head_offset_ < head_->used.
void Stream::pop_front() {
  head_offset_ += front().bytes;
  if (head_offset_ < head_->used) return;
  head_offset_ = 0;
  if (head_ == tail_) {
    head_->used = 0;
    return;
  }
  Chunk* chunk = head_;
  head_ = chunk->next;
  chunk->next = spare_;
  spare_ = chunk;
}

// On the device: after all that the other has launched, which is at least what an event stands for.
void Stream::order_after(const Event& event) {
  const Stream& other = *event.stream;
  if (device_ != nullptr && other.device_ != nullptr) device_->wait_for(*other.device_);
  if (clock_ != nullptr) clock_->wait_for(*other.clock_, event.sequence);
}

void Stream::charge(const TimedOp& op) {
  if (is_idle() && clock_->run(op)) return count_launched();
  new (push(TaskKind::timed, op.name, sizeof(TimedOp)).payload()) TimedOp(op);
}

void Stream::wait(const Event& event, std::source_location site) {
  if (event.stream == this || event.stream == nullptr) return;
  const bool is_timed = device_ != nullptr || clock_ != nullptr;
  if (observer_ != nullptr) {
    // An event that happens to be complete still orders what follows.
    if (!observer_->keeps_wait(*this, event, site)) return;
  } else if (event.is_complete() && (!is_timed || launches_at_once())) {
    return order_after(event);
  }
  new (push(TaskKind::wait, "wait", sizeof(Event)).payload()) Event(event);
}

void Stream::enqueue_gated(const char* op_name, GatedTask& gated, Workers* at_once) {
  if (at_once != nullptr && launches_at_once() && gated.advance(*at_once)) {
    count_launched();
    return;
  }
  new (push(TaskKind::gated, op_name, sizeof(GatedTask*)).payload()) GatedTask*(&gated);
}

// Runs the head task; false when it must wait.
bool Stream::run_head(Workers& workers) {
  Task& task = front();
  switch (task.kind) {
    case TaskKind::op:
      if (observer_ != nullptr) observer_->starts(*this);
      task.call(task.payload(), workers);
      return true;
    case TaskKind::gated:
      return (*static_cast<GatedTask**>(task.payload()))->advance(workers);
    case TaskKind::timed:
      return clock_->run(*static_cast<const TimedOp*>(task.payload()));
    case TaskKind::wait: {
      const Event& event = *static_cast<const Event*>(task.payload());
      if (!event.is_complete()) {
        if (ready_ == nullptr || head_waits_) return false;
        head_waits_ = event.stream->add_waiter(event.sequence, *this);
        if (head_waits_) return false;
      }
      order_after(event);
      if (observer_ != nullptr) observer_->waited(*this, event);
      return true;
    }
  }
  return true;
}

int64_t Stream::drain(Workers& workers, int64_t most) {
  int64_t ran = 0;
  uint64_t done = completed_.load(std::memory_order_relaxed);
  while (done != enqueued_ && ran < most && run_head(workers)) {
    head_waits_ = false;
    pop_front();
    ++ran;
    if (clock_ != nullptr) clock_->note_completed();
    // Sequentially consistent with add_waiter: one of the two sides sees the other.
    completed_.store(++done, std::memory_order_seq_cst);
    if (done >= next_waiter_.load(std::memory_order_seq_cst)) wake_waiters(done);
  }
  return ran;
}

int64_t Stream::run_ready(Workers& workers, int64_t most) {
  int64_t ran = 0;
  // Sequentially consistent, as is what tasks wait for: whoever makes it true and then still reads
  // `queued` in wake() is seen by the task that reads it after this store.
  state_.store(State::running);
  while (true) {
    ran += drain(workers, most - ran);
    if (ran == most && !is_idle()) {
      state_.store(State::queued, std::memory_order_release);
      ready_->push(*this);
      return ran;
    }
    State expected = State::running;
    if (state_.compare_exchange_strong(expected, State::parked, std::memory_order_acq_rel)) {
      return ran;
    }
    state_.store(State::running);  // woken meanwhile
  }
}

void Stream::wake() {
  if (ready_ == nullptr) return;
  State state = state_.load();
  while (state == State::parked || state == State::running) {
    const State next = state == State::parked ? State::queued : State::notified;
    if (state_.compare_exchange_weak(state, next, std::memory_order_acq_rel)) {
      if (next == State::queued) ready_->push(*this);
      return;
    }
  }
}

bool Stream::add_waiter(uint64_t sequence, Stream& stream) const {
  const std::lock_guard lock(waiters_mutex_);
  const uint64_t previous = next_waiter_.load(std::memory_order_relaxed);
  next_waiter_.store(std::min(previous, sequence), std::memory_order_seq_cst);
  if (completed_.load(std::memory_order_seq_cst) >= sequence) {
    next_waiter_.store(previous, std::memory_order_relaxed);
    return false;
  }
  waiters_.push_back({sequence, &stream});
  return true;
}

void Stream::wake_waiters(uint64_t completed) {
  const std::lock_guard lock(waiters_mutex_);
  uint64_t next = UINT64_MAX;
  std::erase_if(waiters_, [&](const Waiter& waiter) {
    if (waiter.sequence <= completed) {
      waiter.stream->wake();
      return true;
    }
    next = std::min(next, waiter.sequence);
    return false;
  });
  next_waiter_.store(next, std::memory_order_seq_cst);
}

Stream::Head Stream::head() const {
  if (is_idle()) return {};
  const Task& task = front();
  Head head{task.op_name, {}, nullptr};
  if (task.kind == TaskKind::wait) head.event = *static_cast<const Event*>(task.payload());
  if (task.kind == TaskKind::gated) head.gated = *static_cast<GatedTask* const*>(task.payload());
  return head;
}

std::string Stream::blocked_on() const {
  if (is_idle()) return "";
  const Head head = this->head();
  if (head.event.stream != nullptr) {
    return fmt::format("stream '{}' waits for an event of stream '{}'", name_,
                       head.event.stream->name());
  }
  return fmt::format("stream '{}' is at '{}'", name_, head.op_name);
}

void ImmediateHost::wait(const Event& event, std::source_location site) {
  while (!event.is_complete()) {
    int64_t ran = 0;
    for (Stream* stream : streams_) ran += stream->drain(workers_);
    if (ran == 0) {
      fail(ExitCode::deadlock, "{}:{}: nothing can run: {}", site.file_name(), site.line(),
           event.stream->blocked_on());
    }
  }
  event.synchronize_device();
}

int64_t ImmediateHost::now_ns() const {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace cambium
