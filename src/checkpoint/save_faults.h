// Injected faults of one rank's save ([[faults]] of kinds torn_write, failed_write, disk_full and
// lost_peer): a FileSystem that strikes at its k-th fitting call, k from `#k` of the fault's site.
//
//   failed_write: write k fails, once, with EIO (exit 31).
//   disk_full: write k and all later ones fail with ENOSPC (exit 31).
//   lost_peer: the rank is lost before call k (exit 20), whatever it stood at.
//   torn_write: the k-th file is complete in every answer of the system, but the disk keeps its
//     first half and zeros, as after a power cut without its fsync. Nobody is told: a load finds
//     it.
#pragma once

#include <memory>

#include "src/base/io.h"
#include "src/config/config.h"

namespace cambium {

class SaveFaults final : public FileSystem {
 public:
  explicit SaveFaults(FaultConfig fault);
  // Refuses a place that the save did not reach (exit 2).
  void check_struck() const;

 protected:
  int before(FileCall& call) override;

 private:
  FaultConfig fault_;
  int64_t number_ = 0;  // of the call that is struck
  int64_t calls_ = 0;   // that fit
};

// What rank `rank` saves after `step` through; null without a fault there.
std::unique_ptr<SaveFaults> save_faults(const Config& config, int64_t rank, int64_t step);

}  // namespace cambium
