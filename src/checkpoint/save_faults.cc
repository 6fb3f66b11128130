#include "src/checkpoint/save_faults.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "src/base/check.h"
#include "src/config/faults.h"

namespace cambium {

namespace {

// The second half of a file becomes zeros.
void tear(const char* path) {
  struct stat status {};
  const bool torn = ::stat(path, &status) == 0 && ::truncate(path, status.st_size / 2) == 0 &&
                    ::truncate(path, status.st_size) == 0;
  if (!torn) fail(ExitCode::io, "cannot tear '{}' for the fault torn_write", path);
}

}  // namespace

SaveFaults::SaveFaults(FaultConfig fault)
    : fault_(std::move(fault)), number_(fault_place(fault_).number) {}

int SaveFaults::before(FileCall& call) {
  if (fault_.kind == "lost_peer") {
    if (calls_++ != number_) return 0;
    fail(ExitCode::peer_lost,  // FAULT: lost_peer
         "this rank is lost in a save, before it could {} '{}'; its peers wait for it; next: train "
         "--resume goes on from the last checkpoint",
         file_op_name(call.op), call.path);
  }
  if (fault_.kind == "torn_write") {
    if (call.op == FileOp::close && calls_++ == number_) tear(call.path);  // FAULT: torn_write
    return 0;
  }
  if (call.op != FileOp::write) return 0;
  const int64_t index = calls_++;
  if (fault_.kind == "failed_write") return index == number_ ? EIO : 0;  // FAULT: failed_write
  return index >= number_ ? ENOSPC : 0;                                  // FAULT: disk_full
}

void SaveFaults::check_struck() const {
  if (calls_ > number_) return;
  fail(ExitCode::usage,
       "fault {} found no call to strike: the save of this rank makes {} that fit, counted from 0",
       describe_fault(fault_), calls_);
}

std::unique_ptr<SaveFaults> save_faults(const Config& config, int64_t rank, int64_t step) {
  for (const FaultConfig& fault : config.faults) {
    if (fault_site(fault.kind) != FaultSite::checkpoint) continue;
    if (fault.rank == rank && fault.step == step) return std::make_unique<SaveFaults>(fault);
  }
  return nullptr;
}

}  // namespace cambium
