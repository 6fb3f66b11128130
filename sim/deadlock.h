// The deadlock report: what each rank waits for, who is missing, and why.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "sim/scheduler.h"
#include "sim/sim_communicator.h"

namespace cambium::sim {

// The message of exit code 23 for a scheduler that can do nothing more. Its first line names the
// cause: a participant that is missing for good, an event that nothing records, or a cycle.
std::string describe_deadlock(const Scheduler& scheduler, const std::vector<const Group*>& groups,
                              const std::vector<int64_t>& steps);

}  // namespace cambium::sim
