// ate: ATE-Bench. Measures what a coding agent spends to understand, operate and extend a training
// framework, and grades by running hidden checks. Exit 0 done; 2 usage; 31 a framework is out of
// reach; 51 a proof does not hold.
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <stdexcept>

#include "CLI/CLI.hpp"
#include "ate_bench/attempt.h"
#include "ate_bench/process.h"
#include "ate_bench/prove.h"
#include "ate_bench/report.h"
#include "fmt/core.h"

namespace ate {
namespace {

struct Options {
  std::string home = "ate_bench", task, framework = "cambium", out = "runs/ate", prices, target;
  AgentChoice agent;
  int repeat = 3;
  double limit_s = 0;
};

std::string own_binary() { return std::filesystem::read_symlink("/proc/self/exe"); }

int list_command(const Options& options) {
  for (const Task& task : list_tasks(options.home)) {
    const auto solutions = list_solutions(task).size();
    fmt::print("{:10} {:28} {:5.0f} s  {} ({} checks, {} solutions)\n", task.suite, task.name,
               task.budget_s, task.title, task.checks.size(), solutions);
  }
  return 0;
}

int report_command(const Options& options) {
  const auto attempts = collect_attempts(options.target, load_prices(options.prices));
  if (attempts.empty()) throw std::runtime_error("no attempts below " + options.target);
  write_file(options.target + "/report.md", report_markdown(attempts));
  write_file(options.target + "/report.csv", report_csv(attempts));
  write_file(options.target + "/report.html", report_html(attempts));
  fmt::print("{0}/report.md\n{0}/report.csv\n{0}/report.html\n", options.target);
  return 0;
}

int run_command(Options options) {
  const Task task = load_task(options.home, options.task);
  const Framework framework = load_framework(options.home, options.framework);
  if (std::find(task.frameworks.begin(), task.frameworks.end(), framework.name) ==
      task.frameworks.end()) {
    throw std::runtime_error("task " + task.name + " is not for " + framework.name);
  }
  transcript_format(options.agent.name);
  load_prices(options.prices);
  if (options.agent.command.empty() &&
      (options.agent.name == "generic" || options.agent.name == "scripted")) {
    throw std::runtime_error("--agent " + options.agent.name + " needs --command");
  }
  bool prepared = true;
  for (int index = 0; index < options.repeat; ++index) {
    AttemptSpec spec = {task,         framework, options.agent,  options.home,
                        own_binary(), "",        options.limit_s};
    const std::string stem =
        options.out + "/" + task.name + "-" + framework.name + "-" + options.agent.name + "-";
    int number = 1;
    while (std::filesystem::exists(stem + std::to_string(number))) ++number;
    spec.directory = stem + std::to_string(number);
    const AttemptRecord record = run_attempt(spec);
    const Grade grade = grade_attempt(options.home, spec.directory);
    fmt::print("{}: {}, {}\n", spec.directory, record.outcome,
               grade.success ? "success" : "no success");
    prepared = prepared && record.outcome != "prepare_failed";
    if (!prepared) fmt::print(stderr, "{}\n", record.detail);
    for (const CheckResult& check : grade.checks) {
      fmt::print("  {} {} {}\n", check.passed ? "PASS" : "FAIL", check.name, check.detail);
    }
  }
  options.target = options.out;
  report_command(options);
  return prepared ? 0 : 31;
}

int grade_command(const Options& options) {
  const Grade grade = grade_attempt(options.home, options.target);
  for (const CheckResult& check : grade.checks) {
    fmt::print("{} {} {}\n", check.passed ? "PASS" : "FAIL", check.name, check.detail);
  }
  fmt::print("{}\n", grade.success ? "success" : "no success");
  return grade.success ? 0 : 51;
}

// A transcript that was recorded elsewhere, such as a session file of Claude Code: its measures.
int session_command(Options options) {
  const std::string text = read_file(options.target);
  if (text.empty()) throw std::runtime_error("no transcript " + options.target);
  const Transcript transcript = read_transcript(transcript_format(options.agent.name), text, {});
  if (measure_transcript(transcript).agent_turns == 0) {
    throw std::runtime_error(options.target + " has no turn of " + options.agent.name +
                             ": is --agent right?");
  }
  AttemptRecord record;
  record.task = std::filesystem::path(options.target).stem();
  record.suite = record.framework = "none";
  record.agent = options.agent.name;
  record.model = transcript.model.empty() ? options.agent.model : transcript.model;
  record.outcome = "recorded";
  record.detail = transcript.error;
  options.out += "/session-" + record.task;
  write_file(options.out + "/transcript.jsonl", text);
  save_attempt(record, options.out);
  options.target = options.out;
  return report_command(options);
}

int prove_command(const Options& options) {
  const ProofSpec spec = {options.home, own_binary(), options.out, options.framework};
  const std::string framework = load_framework(options.home, options.framework).name;
  bool good = true;
  int count = 0;
  for (const Task& task : list_tasks(options.home)) {
    if (!options.task.empty() && task.name != options.task) continue;
    if (std::count(task.frameworks.begin(), task.frameworks.end(), framework) == 0) continue;
    good = prove_task(task, spec) && good;
    ++count;
  }
  if (count == 0) throw std::runtime_error("no task '" + options.task + "'");
  fmt::print("{} tasks: {}\n", count, good ? "PASS" : "FAIL");
  return good ? 0 : 51;
}

int main_checked(int count, char** values) {
  Options options;
  CLI::App app("ATE-Bench: what a coding agent spends on a training framework");
  app.require_subcommand(1);
  app.add_option("--home", options.home, "the ate_bench directory");
  auto* list = app.add_subcommand("list", "tasks, by suite");
  auto* run = app.add_subcommand("run", "attempts of one task: copy, agent, capture, grade");
  run->add_option("task", options.task)->required();
  run->add_option("--framework", options.framework,
                  "a name in frameworks/, a directory, or NAME=DIR");
  run->add_option("--agent", options.agent.name, "claude, codex, generic, scripted")->required();
  run->add_option("--model", options.agent.model, "passed to the agent");
  run->add_option("--command", options.agent.command,
                  "generic: a shell command, the instruction is $1; scripted: a session file");
  run->add_option("--repeat", options.repeat)->check(CLI::Range(1, 1000));
  run->add_option("--timeout", options.limit_s, "seconds; default the task's budget");
  run->add_option("--out", options.out, "attempts, and the report over all that lie there");
  run->add_option("--prices", options.prices, "of the report");
  auto* grade = app.add_subcommand("grade", "grades an attempt again (exit 51: no success)");
  grade->add_option("attempt", options.target)->required();
  auto* report = app.add_subcommand("report", "report.md, report.csv, report.html of attempts");
  report->add_option("directory", options.target)->required();
  report->add_option("--prices", options.prices,
                     "TOML: [model] input, cached_input, output, cache_write");
  auto* session = app.add_subcommand("session", "the report of a transcript recorded elsewhere");
  session->add_option("transcript", options.target)->required();
  session->add_option("--agent", options.agent.name, "claude, codex, generic")->required();
  session->add_option("--model", options.agent.model, "where the transcript names none");
  session->add_option("--out", options.out);
  session->add_option("--prices", options.prices);
  auto* prove = app.add_subcommand("prove", "each task accepts its solution, rejects near-misses");
  prove->add_option("task", options.task, "default: all");
  prove->add_option("--framework", options.framework);
  prove->add_option("--out", options.out);
  auto* play = app.add_subcommand("play", "the scripted agent");
  play->add_option("session", options.target)->required();
  try {
    app.parse(count, values);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  if (list->parsed()) return list_command(options);
  if (run->parsed()) return run_command(options);
  if (grade->parsed()) return grade_command(options);
  if (report->parsed()) return report_command(options);
  if (session->parsed()) return session_command(options);
  if (prove->parsed()) return prove_command(options);
  return play->parsed() ? play_session(options.target) : 2;
}

}  // namespace
}  // namespace ate

int main(int count, char** values) {
  try {
    return ate::main_checked(count, values);
  } catch (const std::exception& error) {
    fmt::print(stderr, "ate: {}\n", error.what());
    return 2;
  }
}
