// Matching: steps of a whole cluster at full shape, without time, to prove that its transfers match
// and cannot deadlock (`cambium check`).
//
// The trainer's host code runs on every rank; ops do nothing, transfers meet without a buffer and
// move nothing. As no receive takes whatever comes first, one such schedule stands for all (Siegel
// and Avrunin). What counts decide is seen twice: the first step routes as `plan.routing` has it,
// the second sends all tokens to a few experts, so that ranks have nothing to send or to compute.
#pragma once

#include <vector>

#include "sim/cluster.h"
#include "src/config/config.h"

namespace cambium::sim {

struct MatchingProof {
  Config config;  // without faults of the trainer, which may touch values
  int64_t steps = 1;
  std::vector<CommFault> faults = {};  // which change what a rank posts
};
// Launches of transfers that were compared between two ranks each. Errors: 22 mismatch, 23 deadlock
// or a hazard of one.
int64_t prove_matching(const MatchingProof& proof);

}  // namespace cambium::sim
