// Forked processes that stand for the ranks of a job, and what became of each.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <exception>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "src/comm/job.h"

namespace cambium::process_group {

struct Ending {
  int code = -1;        // exit code; minus the signal that ended it
  std::string message;  // of the Error that `body` threw
  double seconds = 0;   // since all were started
};

inline void sleep_ms(int milliseconds) {
  std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
}

// Runs body(rank) in one process per rank and waits for all of them. Killed is what is still alive
// after `limit_s`, and what is stopped when the rest has ended. An Error ends a process with its
// code.
template <class Body>
std::vector<Ending> run_processes(int ranks, double limit_s, const Body& body) {
  std::vector<pid_t> processes;
  std::vector<int> pipes;
  const int64_t begin_ns = steady_now_ns();
  for (int rank = 0; rank < ranks; ++rank) {
    int ends[2];
    EXPECT_EQ(pipe(ends), 0);
    const pid_t process = fork();
    if (process == 0) {
      ::close(ends[0]);
      dup2(ends[1], STDERR_FILENO);  // what ends a process without an exception says so there
      int code = 0;
      try {
        body(rank);
      } catch (const Error& error) {
        code = static_cast<int>(error.exit_code());
        [[maybe_unused]] const ssize_t sent =
            write(ends[1], error.what(), std::string(error.what()).size());
      }
      _exit(code);
    }
    ::close(ends[1]);
    processes.push_back(process);
    pipes.push_back(ends[0]);
  }
  std::vector<Ending> endings(static_cast<size_t>(ranks));
  std::vector<pid_t> stopped;
  for (size_t open = endings.size(); open > 0; sleep_ms(5)) {
    const double seconds = static_cast<double>(steady_now_ns() - begin_ns) * 1e-9;
    if (open == stopped.size()) {
      for (const pid_t process : stopped) kill(process, SIGKILL);
    }
    for (size_t rank = 0; rank < endings.size(); ++rank) {
      if (processes[rank] == 0) continue;
      if (seconds > limit_s) kill(processes[rank], SIGKILL);
      int status = 0;
      if (waitpid(processes[rank], &status, WNOHANG | WUNTRACED) == 0) continue;
      if (WIFSTOPPED(status)) {
        stopped.push_back(processes[rank]);
        continue;
      }
      endings[rank].code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
      endings[rank].seconds = seconds;
      processes[rank] = 0;
      --open;
    }
  }
  for (size_t rank = 0; rank < endings.size(); ++rank) {
    char text[4096];
    ssize_t count = 0;
    while ((count = read(pipes[rank], text, sizeof text)) > 0) {
      endings[rank].message.append(text, static_cast<size_t>(count));
    }
    ::close(pipes[rank]);
  }
  return endings;
}

// Memory that all processes share, made before they are.
template <class Value>
class Shared {
 public:
  Shared() {
    void* memory =
        mmap(nullptr, sizeof(Value), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    value_ = new (memory) Value();
  }
  ~Shared() { munmap(static_cast<void*>(value_), sizeof(Value)); }
  Value& operator*() const { return *value_; }

 private:
  Value* value_ = nullptr;
};

}  // namespace cambium::process_group
