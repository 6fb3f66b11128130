// A FileSystem that counts its calls and strikes at the k-th: ends the process, fails with an
// errno, shortens transfers, or interrupts.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdint>
#include <string>
#include <vector>

#include "src/base/io.h"

namespace cambium {

enum class FaultKind {
  none,
  kill,        // SIGKILL just before call k
  torn_kill,   // a write k loses its tail, and the process is killed at the next call
  fail_once,   // call k fails with `error`
  fail_after,  // call k and all later calls that change anything fail with `error`
  trickle,     // every transfer moves one byte in five and every call is interrupted once
};

struct Fault {
  FaultKind kind = FaultKind::none;
  int64_t at_call = -1;
  int error = 0;
};

class FaultyFileSystem : public FileSystem {
 public:
  explicit FaultyFileSystem(Fault fault) : fault_(fault) {}
  int64_t calls() const { return calls_; }
  const std::vector<std::string>& trace() const { return trace_; }

 protected:
  int before(FileCall& call) override {
    const int64_t index = calls_++;
    trace_.push_back(std::string(file_op_name(call.op)) + " " + call.path);
    switch (fault_.kind) {
      case FaultKind::none:
        return 0;
      case FaultKind::kill:
        if (index == fault_.at_call) ::kill(::getpid(), SIGKILL);
        return 0;
      case FaultKind::torn_kill:
        if (index > fault_.at_call) ::kill(::getpid(), SIGKILL);
        if (index == fault_.at_call && call.op == FileOp::write) call.bytes = 1 + call.bytes / 2;
        return 0;
      case FaultKind::fail_once:
        return index == fault_.at_call ? fault_.error : 0;
      case FaultKind::fail_after:
        return index >= fault_.at_call && changes(call.op) ? fault_.error : 0;
      case FaultKind::trickle:
        call.bytes = 1 + call.bytes / 5;
        interrupt_ = !interrupt_;
        return interrupt_ ? EINTR : 0;
    }
    return 0;
  }

 private:
  static bool changes(FileOp op) {
    return op != FileOp::open && op != FileOp::read && op != FileOp::stat && op != FileOp::list &&
           op != FileOp::free_space;
  }

  Fault fault_;
  int64_t calls_ = 0;
  bool interrupt_ = false;
  std::vector<std::string> trace_;
};

}  // namespace cambium
