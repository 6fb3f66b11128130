// Injected communicator faults of one rank (ClusterOptions::faults).
#pragma once

#include <vector>

#include "sim/sim_communicator.h"

namespace cambium::sim {

class Scheduler;

class FaultInjector {
 public:
  FaultInjector(std::vector<CommFault> faults, Scheduler& scheduler, int rank);
  // Posts `call` as the faults have it.
  Ticket post(SimCommunicator& communicator, CollectiveCall call);
  void set_step(int64_t step) { step_ = step; }
  // Ends a swap that found no second call: the first is posted as it was. Before host waits.
  void flush();
  // A fault that has not struck; null when all have.
  const CommFault* unstruck() const;

 private:
  bool strikes(CommFaultKind kind, const SimCommunicator& communicator, const CollectiveCall& call);
  bool fits(const CommFault& fault, const SimCommunicator& communicator,
            const CollectiveCall& call) const;
  Delay link_delay(const SimCommunicator& communicator, const CollectiveCall& call);
  Ticket hold(SimCommunicator& communicator, CollectiveCall call);
  bool swaps_with_held(const SimCommunicator& communicator, const CollectiveCall& call) const;
  Ticket post_swapped(SimCommunicator& communicator, CollectiveCall call);

  // The first of two calls to be swapped. Its place in the stream is taken by an unbound transfer.
  struct Held {
    SimCommunicator* communicator = nullptr;
    CollectiveCall call;
    Transfer* transfer = nullptr;
    CommFault fault;
  };
  Scheduler& scheduler_;
  int rank_;
  std::vector<CommFault> pending_;
  int64_t step_ = 0;
  Held held_;
};

}  // namespace cambium::sim
