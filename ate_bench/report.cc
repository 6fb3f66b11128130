#include "ate_bench/report.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <sstream>

#include "ate_bench/process.h"
#include "fmt/core.h"
#include "src/train/report_chart.h"

namespace ate {
namespace {

namespace fs = std::filesystem;

struct MeasureColumn {
  const char* name;
  const char* title;
  double (*value)(const AttemptReport&);  // NaN: not known
};

double whole(int64_t count) { return static_cast<double>(count); }
double whole(const std::optional<int64_t>& count) { return count ? whole(*count) : NAN; }

constexpr MeasureColumn kColumns[] = {
    {"agent_turns", "Agent Turns",
     [](const AttemptReport& a) { return whole(a.measures.agent_turns); }},
    {"per_turn_context_tokens", "Per-Turn Context",
     [](const AttemptReport& a) { return a.measures.per_turn_context.value_or(NAN); }},
    {"output_tokens", "Output Tokens",
     [](const AttemptReport& a) { return whole(a.measures.output_tokens); }},
    {"session_duration_s", "Session Duration (s)",
     [](const AttemptReport& a) { return a.measures.session_duration_s; }},
    {"active_gpu_s", "Active GPU Time (s)",
     [](const AttemptReport& a) { return a.measures.active_gpu_s; }},
    {"gpu_busy_s", "GPU busy time (s)",
     [](const AttemptReport& a) { return a.measures.gpu_busy_s; }},
    {"cpu_simulated_s", "CPU-simulated time (s)",
     [](const AttemptReport& a) { return a.measures.cpu_simulated_s; }},
    {"tool_calls", "Tool calls",
     [](const AttemptReport& a) { return whole(a.measures.tool_calls); }},
    {"files_read", "Files read",
     [](const AttemptReport& a) { return whole(a.measures.files_read); }},
    {"lines_changed", "Lines changed",
     [](const AttemptReport& a) { return whole(a.measures.lines_changed); }},
    {"cost", "Cost", [](const AttemptReport& a) { return a.measures.cost.value_or(NAN); }},
};

std::string number_text(double value) {
  if (std::isnan(value)) return "";
  return value == std::floor(value) ? fmt::format("{:.0f}", value) : fmt::format("{:.4g}", value);
}

std::string plain_number(double value) {  // for CSV: all digits that a reader may want
  return std::isnan(value) ? "" : fmt::format("{:.10g}", value);
}

std::string csv_cell(const std::string& text) {
  if (text.find_first_of(",\"\n\r") == std::string::npos) return text;
  std::string cell = "\"";
  for (const char letter : text)
    cell += letter == '"' ? std::string("\"\"") : std::string(1, letter);
  return cell + "\"";
}

std::string failed_checks(const AttemptReport& attempt) {
  std::string names;
  for (const CheckResult& check : attempt.grade.checks) {
    if (!check.passed) names += (names.empty() ? "" : " ") + check.name;
  }
  return names;
}

std::string one_line(std::string text) {
  for (char& letter : text) {
    if (letter == '\n' || letter == '\r' || letter == '|') letter = ' ';
  }
  return text.size() > 160 ? text.substr(0, 157) + "..." : text;
}

struct AttemptGroup {
  std::string task, framework, agent;
  std::vector<const AttemptReport*> attempts;
};

std::vector<AttemptGroup> group_attempts(const std::vector<AttemptReport>& attempts) {
  std::map<std::string, AttemptGroup> groups;
  for (const AttemptReport& attempt : attempts) {
    const AttemptRecord& record = attempt.record;
    const std::string agent = record.agent + (record.model.empty() ? "" : " " + record.model);
    AttemptGroup& group = groups[record.task + "\n" + record.framework + "\n" + agent];
    group.task = record.task;
    group.framework = record.framework;
    group.agent = agent;
    group.attempts.push_back(&attempt);
  }
  std::vector<AttemptGroup> list;
  for (auto& [key, group] : groups) list.push_back(std::move(group));
  return list;
}

int64_t successes(const AttemptGroup& group) {
  return std::count_if(group.attempts.begin(), group.attempts.end(),
                       [](const AttemptReport* attempt) { return attempt->grade.success; });
}

// The median over the group's attempts, failed ones too: what a user waits for and pays.
double group_median(const AttemptGroup& group, const MeasureColumn& column) {
  std::vector<double> values;
  for (const AttemptReport* attempt : group.attempts) {
    const double value = column.value(*attempt);
    if (!std::isnan(value)) values.push_back(value);
  }
  return values.empty() ? NAN : median(values);
}

constexpr const char* kMeanNote =
    "Per-Turn Context of codex exec is a mean: it tells totals alone.";

bool has_mean(const std::vector<AttemptReport>& attempts) {
  return std::any_of(attempts.begin(), attempts.end(),
                     [](const AttemptReport& attempt) { return attempt.measures.context_is_mean; });
}

std::string bars_html(const std::vector<AttemptGroup>& groups, const MeasureColumn& column) {
  double most = 0;
  for (const AttemptGroup& group : groups) {
    const double value = group_median(group, column);
    if (!std::isnan(value)) most = std::max(most, value);
  }
  if (most <= 0) return "";
  std::string html =
      fmt::format("<h2>{}</h2><svg width='900' height='{}'>", column.title, groups.size() * 22 + 4);
  for (size_t row = 0; row < groups.size(); ++row) {
    const AttemptGroup& group = groups[row];
    const double value = group_median(group, column);
    const bool all = successes(group) == static_cast<int64_t>(group.attempts.size());
    html += fmt::format(
        "<text x='0' y='{}'>{}</text><rect x='420' y='{}' width='{:.1f}' height='14' "
        "fill='{}'/><text x='{:.1f}' y='{}'>{}</text>",
        row * 22 + 15, cambium::html_text(group.task + ", " + group.framework + ", " + group.agent),
        row * 22 + 4, std::isnan(value) ? 0 : 380 * value / most, all ? "#3465a4" : "#cc6600",
        426 + (std::isnan(value) ? 0 : 380 * value / most), row * 22 + 15,
        std::isnan(value) ? "not known" : number_text(value));
  }
  return html + "</svg>\n";
}

}  // namespace

std::vector<AttemptReport> collect_attempts(const std::string& directory,
                                            const std::map<std::string, Price>& prices) {
  std::vector<std::string> found;
  for (const auto& entry : fs::recursive_directory_iterator(directory)) {
    if (entry.path().filename() == "attempt.json") found.push_back(entry.path().parent_path());
  }
  std::sort(found.begin(), found.end());
  std::vector<AttemptReport> attempts;
  for (const std::string& path : found) {
    AttemptReport attempt;
    attempt.directory = fs::path(path).filename();
    attempt.record = load_attempt(path);
    std::vector<double> times;
    std::istringstream stream(read_file(path + "/transcript.times"));
    for (double at_s = 0; stream >> at_s;) times.push_back(at_s);
    const Transcript transcript = read_transcript(transcript_format(attempt.record.agent),
                                                  read_file(path + "/transcript.jsonl"), times);
    attempt.measures = measure_transcript(transcript);
    attempt.measures.cost = session_cost(transcript, attempt.record.model, prices);
    attempt.measures.lines_changed = count_changed_lines(read_file(path + "/diff.patch"));
    if (fs::exists(path + "/runs")) {
      for (const auto& log : fs::directory_iterator(path + "/runs")) {
        add_run_log(read_file(log.path()), attempt.measures);
      }
    }
    attempt.grade = load_grade(path);
    attempts.push_back(std::move(attempt));
  }
  return attempts;
}

std::string report_markdown(const std::vector<AttemptReport>& attempts) {
  std::string text = "# ATE-Bench report\n\nMedians over the attempts of a task, failed ones too. ";
  text += "An empty cell is not known.\n\n| task | framework | agent | passed |";
  std::string rule = "|---|---|---|---|";
  for (const MeasureColumn& column : kColumns) {
    text += fmt::format(" {} |", column.title);
    rule += "---|";
  }
  text += "\n" + rule + "\n";
  for (const AttemptGroup& group : group_attempts(attempts)) {
    text += fmt::format("| {} | {} | {} | {}/{} |", group.task, group.framework,
                        one_line(group.agent), successes(group), group.attempts.size());
    for (const MeasureColumn& column : kColumns) {
      text += fmt::format(" {} |", number_text(group_median(group, column)));
    }
    text += "\n";
  }
  text += "\n## Attempts\n\n| attempt | outcome | success | failed checks | detail |\n";
  text += "|---|---|---|---|---|\n";
  for (const AttemptReport& attempt : attempts) {
    text += fmt::format("| {} | {} | {} | {} | {} |\n", attempt.directory, attempt.record.outcome,
                        attempt.grade.success ? "yes" : "no", failed_checks(attempt),
                        one_line(attempt.record.detail));
  }
  if (has_mean(attempts)) text += fmt::format("\n{}\n", kMeanNote);
  return text;
}

std::string report_csv(const std::vector<AttemptReport>& attempts) {
  std::string text = "attempt,task,suite,framework,commit,agent,model,outcome,graded,success";
  for (const MeasureColumn& column : kColumns) text += fmt::format(",{}", column.name);
  text += ",context_is_mean,checks_passed,checks,failed_checks\n";
  for (const AttemptReport& attempt : attempts) {
    const AttemptRecord& record = attempt.record;
    for (const std::string& cell : {attempt.directory, record.task, record.suite, record.framework,
                                    record.commit, record.agent, record.model, record.outcome}) {
      text += csv_cell(cell) + ",";
    }
    text += fmt::format("{:d},{:d}", attempt.grade.graded, attempt.grade.success);
    for (const MeasureColumn& column : kColumns) {
      text += "," + plain_number(column.value(attempt));
    }
    const auto passed = std::count_if(attempt.grade.checks.begin(), attempt.grade.checks.end(),
                                      [](const CheckResult& check) { return check.passed; });
    text += fmt::format(",{:d},{},{},{}\n", attempt.measures.context_is_mean, passed,
                        attempt.grade.checks.size(), csv_cell(failed_checks(attempt)));
  }
  return text;
}

std::string report_html(const std::vector<AttemptReport>& attempts) {
  std::string html =
      "<!doctype html><html lang='en'><meta charset='utf-8'><title>ATE-Bench</title>"
      "<style>body{font:14px sans-serif;margin:2em;max-width:1100px}svg text{font-size:12px}"
      "td,th{padding:2px 8px;border-bottom:1px solid #ccc;text-align:left}</style>"
      "<h1>ATE-Bench report</h1><p>Bars: medians over attempts. Orange: not all of them passed."
      "</p>\n";
  if (has_mean(attempts)) html += fmt::format("<p>{}</p>\n", kMeanNote);
  const std::vector<AttemptGroup> groups = group_attempts(attempts);
  for (const MeasureColumn& column : kColumns) html += bars_html(groups, column);
  html += "<h2>Attempts</h2><table><tr><th>attempt<th>outcome<th>success<th>checks</tr>\n";
  for (const AttemptReport& attempt : attempts) {
    html += fmt::format("<tr><td>{}<td>{}<td>{}<td>", cambium::html_text(attempt.directory),
                        cambium::html_text(attempt.record.outcome),
                        attempt.grade.success ? "yes" : "no");
    for (const CheckResult& check : attempt.grade.checks) {
      html +=
          fmt::format("<div>{} {} {}</div>", check.passed ? "PASS" : "FAIL",
                      cambium::html_text(check.name), cambium::html_text(one_line(check.detail)));
    }
    html += cambium::html_text(one_line(attempt.record.detail)) + "</tr>\n";
  }
  return html + "</table></html>\n";
}

}  // namespace ate
