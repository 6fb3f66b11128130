// The command line as a function, so that tests can call it in-process.
#pragma once

#include <string>
#include <vector>

namespace cambium {

// Runs `cambium ARGUMENTS...`; returns the exit code (error.h). `environment` is read by `main`.
int run_cli(const std::vector<std::string>& arguments);

}  // namespace cambium
