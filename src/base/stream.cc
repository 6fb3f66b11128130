#include "src/base/stream.h"

#include <chrono>

namespace cambium {

Stream::Task& Stream::push(TaskKind kind, const char* op_name) {
  Task& task = tasks_.emplace_back();
  task.kind = kind;
  task.op_name = op_name;
  ++enqueued_;
  return task;
}

void Stream::wait(const Event& event) {
  if (event.stream == this || event.is_complete()) return;
  push(TaskKind::wait, "wait").event = event;
}

void Stream::enqueue_gated(const char* op_name, std::vector<std::shared_ptr<Gate>> gates,
                           std::shared_ptr<void> object, void (*call)(const void*, Workers&)) {
  Task& task = push(TaskKind::gated, op_name);
  task.gates = std::move(gates);
  task.object = object.get();
  task.owner = std::move(object);
  task.call = call;
}

bool Stream::head_is_ready(Task& head) const {
  if (head.kind == TaskKind::wait) return head.event.is_complete();
  if (head.kind == TaskKind::gated) {
    if (!head.arrived) {
      head.arrived = true;
      for (auto& gate : head.gates) gate->arrive();
    }
    for (auto& gate : head.gates) {
      if (!gate->is_open()) return false;
    }
  }
  return true;
}

int64_t Stream::drain(Workers& workers, int64_t most) {
  int64_t ran = 0;
  while (!tasks_.empty() && ran < most) {
    Task& head = tasks_.front();
    if (!head_is_ready(head)) break;
    if (head.call != nullptr) head.call(head.object, workers);
    tasks_.pop_front();
    completed_.fetch_add(1, std::memory_order_acq_rel);
    ++ran;
  }
  return ran;
}

std::string Stream::blocked_on() const {
  if (tasks_.empty()) return "";
  const Task& head = tasks_.front();
  if (head.kind == TaskKind::wait) {
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
}

int64_t ImmediateHost::now_ns() const {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace cambium
