// One rank as one process with one GPU: RankEnvironment over a Job and NCCL.
//
// Each group has an NCCL communicator of its own, whose id travels through the job's store. Tickets
// are points of the stream that carried the call. Every call is posted to the job's log with a mark
// before and behind it, so that the watchdog tells a collective that waits for a peer from one
// whose turn has not come. Zero elements travel nowhere: such a call is complete at once.
//
// In builds with CUDA only.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "src/comm/job.h"
#include "src/comm/rank_environment.h"

namespace cambium {

struct NcclOptions {
  Job* job = nullptr;
  int worker_threads = 1;
  Poison poison = Poison::off;
};

// Runs main(body, environment) as this process's rank, on the GPU that is selected. An error of it
// is announced to the other ranks and thrown on, with the rank and step before its message.
void run_nccl_rank(const NcclOptions& options,
                   void (*main)(void* body, RankEnvironment& environment), void* body);

}  // namespace cambium
