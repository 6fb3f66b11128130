// Commands that are declared but not built yet: they say so and exit 70. Whoever builds one
// deletes its line here.
#include "src/base/error.h"
#include "src/cli/commands.h"
#include "src/config/derive.h"

namespace cambium {

namespace {

[[noreturn]] void not_built(const char* command) {
  fail(ExitCode::internal, "cambium {}: not built yet", command);
}

}  // namespace

int command_calibrate(const CalibrateOptions&) { not_built("calibrate"); }

}  // namespace cambium
