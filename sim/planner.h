// Planner: one training step of a whole cluster, shape-only, in virtual time (`cambium plan`).
#pragma once

#include "src/train/plan_report.h"

namespace cambium::sim {

// The trainer's own step on every rank, or with folding on the first rank of every pipeline stage.
// Errors (2): a machine file that is wrong or does not fit the configuration; folding where ranks
// differ. A mismatch or deadlock is found as in any run (22, 23).
PlanReport plan_step(const PlanRun& run);

}  // namespace cambium::sim
