// cambium report RUN: writes RUN/report.html and prints its path.
#include <nlohmann/json.hpp>

#include "fmt/format.h"
#include "src/cli/commands.h"
#include "src/train/report.h"

namespace cambium {

int command_report(const InspectOptions& options) {
  write_report(options.path);
  const std::string report = options.path + "/report.html";
  if (options.format == OutputFormat::json) {
    fmt::print("{}\n", nlohmann::json{{"report", report}}.dump());
  } else {
    fmt::print("{}\n", report);
  }
  return 0;
}

}  // namespace cambium
