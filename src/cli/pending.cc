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

// A wrong configuration is answered as ever, before it is said that the command does not exist.
void validate(const ConfigSource& source, const Environment& environment) {
  const Config config = load_config(source.path, source.sets);
  const Derived derived = derive(config);
  resolve_transport(environment, config, static_cast<int>(derived.ranks));
}

}  // namespace

int command_plan(const PlanOptions& options) {
  validate(options.config, Environment{});
  not_built("plan");
}
int command_calibrate(const CalibrateOptions&) { not_built("calibrate"); }

}  // namespace cambium
