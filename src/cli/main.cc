// The `cambium` binary: hands its arguments and environment to run_cli (cli.h), which returns the
// exit code.
#include <unistd.h>

#include "src/cli/cli.h"

int main(int count, char** values) {
  const std::vector<std::string> arguments(values + 1, values + count);
  return cambium::run_cli(arguments, cambium::read_environment(environ));
}
