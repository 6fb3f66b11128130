// The `cambium` binary: hands its arguments to run_cli (cli.h), which returns the exit code.
#include "src/cli/cli.h"

int main(int count, char** values) {
  return cambium::run_cli(std::vector<std::string>(values + 1, values + count));
}
