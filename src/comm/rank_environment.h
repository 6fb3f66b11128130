// RankEnvironment: everything one rank gets from the process that runs it.
//
// The trainer's per-rank `main(RankEnvironment&)` takes its streams, communicators, host waits and
// worker threads from here and from nowhere else, so the same code runs as one of N fibers of the
// simulator (sim/cluster.h) or as one process of an NCCL job. One virtual level, no other state.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/op.h"
#include "src/base/arena.h"
#include "src/base/stream.h"
#include "src/base/workers.h"
#include "src/comm/comm.h"

namespace cambium {

// What a shape-only run gives a rank in place of values: ops charge their cost to virtual time, and
// the host counts of stage 1 come from a routing model, the same at both ends.
struct DispatchCounts {
  std::vector<int64_t> send_tokens, send_rows, recv_tokens, recv_rows;  // by rank of the group
};
class ShapeOnlyRun : public OpCharge {
 public:
  virtual DispatchCounts dispatch_counts(const WorkPlace& place) = 0;
};

class RankEnvironment {
 public:
  virtual ~RankEnvironment() = default;

  virtual int rank() const = 0;   // this rank's number in the job, 0 .. ranks() - 1
  virtual int ranks() const = 0;  // ranks of the job
  virtual Host& host() = 0;
  virtual Workers& workers() = 0;
  // Whether fresh and undefined memory is filled with NaN; for the rank's arenas.
  virtual Poison poison() const = 0;

  // A new stream of this rank, owned by the environment and valid until it ends. Reports show
  // `name` as "rank 3 <name>".
  virtual Stream& make_stream(const std::string& name) = 0;

  // This rank's membership in the group `members` (ranks of the job; this rank's index in the group
  // is its place in the list). Every member calls it with the same name and list, the n-th call
  // with that name and list meeting the n-th of the others; disjoint groups may share a name. A
  // group of one works too. Destroy it only after its tickets completed.
  virtual std::unique_ptr<Communicator> make_communicator(const std::string& name,
                                                          const std::vector<int>& members) = 0;

  // Declares the training step that follows: for error messages and injected faults.
  virtual void set_step(int64_t step) = 0;
  virtual int64_t step() const = 0;

  // Not null when this run computes nothing (`cambium plan`).
  virtual ShapeOnlyRun* shape_only() { return nullptr; }
  // Where the trainer is; it says so, stage by stage.
  WorkPlace place;
};

}  // namespace cambium
