// The command line as a function, so that tests can call it in-process.
#pragma once

#include <string>
#include <vector>

#include "src/cli/environment.h"

namespace cambium {

// Runs `cambium ARGUMENTS...` and returns the exit code (error.h). Errors are printed to stderr.
int run_cli(const std::vector<std::string>& arguments, const Environment& environment);

}  // namespace cambium
