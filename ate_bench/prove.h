// Proves graders: the reference solution is accepted, every near-miss is rejected.
#pragma once

#include <string>

#include "ate_bench/attempt.h"

namespace ate {

struct ProofSpec {
  std::string home, ate_binary;
  std::string out;        // attempts go to out/<task>-<solution>
  std::string framework;  // a directory or a name
};

// Runs each grade/solutions/*.sh as a scripted session; prints a line each. True when all hold:
// `right` succeeds; each `wrong_*` finishes, is graded to the grader's end, and does not succeed.
bool prove_task(const Task& task, const ProofSpec& spec);

}  // namespace ate
