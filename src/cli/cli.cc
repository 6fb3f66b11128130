#include "src/cli/cli.h"

#include <cstdio>

#include "src/base/error.h"

namespace cambium {

int run_cli(const std::vector<std::string>& arguments) {
  std::fprintf(stderr, "cambium: %zu arguments, no subcommands yet\n", arguments.size());
  return static_cast<int>(ExitCode::usage);
}

}  // namespace cambium
