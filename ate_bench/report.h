// Reports over a directory of attempts: Markdown, CSV, and one HTML file that needs nothing else.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "ate_bench/attempt.h"

namespace ate {

struct AttemptReport {
  std::string directory;  // its name
  AttemptRecord record;
  Measures measures;
  Grade grade;
};

// Every attempt below `directory`, ungraded and failed ones too.
std::vector<AttemptReport> collect_attempts(const std::string& directory,
                                            const std::map<std::string, Price>& prices);
std::string report_markdown(const std::vector<AttemptReport>& attempts);
std::string report_csv(const std::vector<AttemptReport>& attempts);
std::string report_html(const std::vector<AttemptReport>& attempts);

}  // namespace ate
