#include "ate_bench/attempt.h"

#include <algorithm>
#include <filesystem>
#include <sstream>
#include <stdexcept>

#include "ate_bench/process.h"
#include "nlohmann/json.hpp"

namespace ate {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

// $1 source, $2 commit, $3 target, $4 `none` for a copy without git, then hidden paths. A local
// repository's objects are read where they lie; the copy's own history is one commit, so that
// nothing hidden is found in it.
constexpr const char* kCopyScript = R"(
source=$1 commit=$2 target=$3 history=$4; shift 4
mkdir -p "$target"
if [ -d "$source" ]; then
  found=$(git -C "$source" rev-parse "$commit^{commit}")
  git -C "$source" archive --format=tar "$found" | tar -x -C "$target"
else
  git init -q --bare "$target.git"
  if ! git -C "$target.git" fetch -q --depth 1 "$source" "$commit"; then
    rm -rf "$target.git"
    echo "cannot fetch $commit of $source: no network, or it moved" >&2
    echo "next: clone it where there is one, and give --framework NAME=DIR" >&2
    exit 31
  fi
  found=$(git -C "$target.git" rev-parse FETCH_HEAD^{commit})
  git -C "$target.git" archive --format=tar "$found" | tar -x -C "$target"
  rm -rf "$target.git"
fi
cd "$target"
for hidden in "$@"; do rm -rf "./$hidden"; done
mkdir -p .ate/runs .ate/answer
echo "$found" > .ate/commit
if [ "$history" = none ]; then exit 0; fi
git init -q .
echo '/.ate/' > .git/info/exclude
git add -A -f
git -c user.name=ate -c user.email=ate@localhost commit -q --no-gpg-sign -m base
)";

// Against a copy of the base's repository: the agent may have done anything to its own.
constexpr const char* kDiffScript = R"(
export GIT_DIR="$1/base.git" GIT_WORK_TREE=.
git add -A
git -c core.quotepath=off diff --cached --binary ate-base > "$1/diff.patch"
git -c core.quotepath=off diff --cached --name-only --no-renames ate-base > "$1/changed_paths"
cp -r .ate/answer "$1/answer"
cp -r .ate/runs "$1/runs"
)";

void copy_framework(const AttemptRecord& record, const std::string& target, const char* history) {
  std::vector<std::string> arguments = {record.source, record.commit, target, history};
  arguments.insert(arguments.end(), record.hidden.begin(), record.hidden.end());
  run_shell(kCopyScript, arguments, "/");
}

std::vector<std::string> agent_arguments(const AttemptSpec& spec, const std::string& instruction) {
  const AgentChoice& agent = spec.agent;
  if (agent.name == "scripted") return {spec.ate_binary, "play", fs::absolute(agent.command)};
  if (agent.name == "generic") return {"bash", "-c", agent.command, "agent", instruction};
  std::vector<std::string> arguments = {"codex", "exec", "--json", "--sandbox", "workspace-write"};
  if (agent.name == "claude") {
    arguments = {"claude",           "-p",        "--output-format",
                 "stream-json",      "--verbose", "--permission-mode",
                 "bypassPermissions"};
  }
  if (!agent.model.empty()) arguments.insert(arguments.end(), {"--model", agent.model});
  arguments.push_back(instruction);
  return arguments;
}

bool lies_under(const std::string& path, const std::string& folder) {
  return path == folder || path.rfind(folder + "/", 0) == 0;
}

std::string edited_read_only(const std::string& changed_paths,
                             const std::vector<std::string>& read_only) {
  std::istringstream stream(changed_paths);
  for (std::string path; std::getline(stream, path);) {
    for (const std::string& folder : read_only) {
      if (lies_under(path, folder)) return path;
    }
  }
  return "";
}

std::string last_line(const std::string& text) {
  std::istringstream stream(text);
  std::string last;
  for (std::string line; std::getline(stream, line);) {
    if (!line.empty()) last = line;
  }
  return last;
}

// The session's end, from the strongest evidence to the weakest.
void judge(const AttemptSpec& spec, const ChildResult& child, AttemptRecord& record) {
  const std::string& directory = spec.directory;
  Transcript transcript = read_transcript(transcript_format(spec.agent.name),
                                          read_file(directory + "/transcript.jsonl"), {});
  // An agent that dies may say why on its way out alone.
  if (transcript.error.empty() && child.exit_code != 0) {
    transcript.error = last_line(read_file(directory + "/agent.stderr"));
  }
  const std::string edited =
      edited_read_only(read_file(directory + "/changed_paths"), spec.task.read_only);
  if (!transcript.model.empty()) record.model = transcript.model;
  if (!edited.empty()) {
    record.outcome = "edited_read_only";
    record.detail = edited;
  } else if (child.timed_out) {
    record.outcome = "timeout";
  } else if (!transcript.complete && is_network_error(transcript.error)) {
    record.outcome = "network_loss";
    record.detail = transcript.error;
  } else if (child.exit_code != 0 || !transcript.complete) {
    record.outcome = "crash";
    record.detail = "exit " + std::to_string(child.exit_code) +
                    (transcript.error.empty() ? ", no closing record" : ": " + transcript.error);
  } else {
    record.outcome = "finished";
  }
}

}  // namespace

AttemptRecord run_attempt(const AttemptSpec& spec) {
  const std::string directory = fs::absolute(spec.directory), work = directory + "/work";
  if (fs::exists(directory)) {
    throw std::runtime_error(directory + " exists: choose another --out");
  }
  fs::create_directories(directory);
  AttemptRecord record = {spec.task.name,
                          spec.task.suite,
                          spec.framework.name,
                          spec.framework.source,
                          spec.framework.commit,
                          spec.agent.name,
                          spec.agent.model,
                          "prepare_failed",
                          "",
                          0,
                          spec.framework.hidden};
  save_attempt(record, directory);
  try {
    copy_framework(record, work, "one_commit");
    // HEAD moves: the grade, now or later, is of the commit that the agent worked on.
    record.commit = read_file(work + "/.ate/commit").substr(0, 40);
    fs::copy_file(spec.home + "/run.sh", work + "/.ate/run");
    fs::permissions(work + "/.ate/run", fs::perms::owner_all);
    for (const std::string& from : {spec.framework.directory, spec.task.directory}) {
      if (fs::exists(from + "/prepare.sh")) {
        run_shell("bash \"$1\"", {fs::absolute(from + "/prepare.sh")}, work);
      }
    }
    run_shell(
        "git add -A && (git diff --cached --quiet || git -c user.name=ate "
        "-c user.email=ate@localhost commit -q --no-gpg-sign -m prepared) && git tag ate-base && "
        "cp -r .git \"$1/base.git\"",
        {directory}, work);
  } catch (const std::exception& error) {
    record.detail = error.what();
    save_attempt(record, directory);
    return record;
  }
  ChildSpec child;
  child.arguments = agent_arguments(
      spec, read_file(spec.home + "/preamble.md") + read_file(spec.task.directory + "/task.md"));
  child.directory = work;
  child.environment = {"ATE_WORK=" + work, "ATE_FRAMEWORK=" + record.framework,
                       "CCACHE_BASEDIR=" + work, "CCACHE_NOHASHDIR=1"};
  child.stdout_path = directory + "/transcript.jsonl";
  child.stderr_path = directory + "/agent.stderr";
  child.times_path = directory + "/transcript.times";
  child.limit_s = spec.limit_s > 0 ? spec.limit_s : spec.task.budget_s;
  const ChildResult result = run_child(child);
  record.wall_s = result.wall_s;
  try {
    run_shell(kDiffScript, {directory}, work);
    judge(spec, result, record);
  } catch (const std::exception& error) {  // as where the agent removed its own folder
    record.outcome = "crash";
    record.detail = error.what();
    fs::remove(directory + "/diff.patch");
  }
  save_attempt(record, directory);
  fs::remove_all(work);
  fs::remove_all(directory + "/base.git");
  return record;
}

std::vector<CheckResult> read_checks(const std::vector<std::string>& names,
                                     const std::string& output) {
  std::vector<CheckResult> results;
  for (const std::string& name : names) {
    CheckResult result = {name, false, kNeverReached};
    std::istringstream stream(output);
    bool failed = false;
    for (std::string line; std::getline(stream, line);) {
      std::istringstream words(line);
      std::string mark, found, verdict, detail;
      words >> mark >> found >> verdict;
      if (mark != "CHECK" || found != name || failed) continue;
      std::getline(words >> std::ws, detail);
      failed = verdict != "PASS";
      result = {name, !failed, detail};
    }
    results.push_back(result);
  }
  return results;
}

Grade grade_attempt(const std::string& home, const std::string& directory_given) {
  const std::string directory = fs::absolute(directory_given), copy = directory + "/grading";
  const AttemptRecord record = load_attempt(directory);
  const Task task = load_task(home, record.task);
  Grade grade;
  fs::remove_all(copy);
  if (fs::exists(directory + "/diff.patch")) {
    copy_framework(record, copy, "none");
    for (const std::string& from : {home + "/frameworks/" + record.framework, task.directory}) {
      if (fs::exists(from + "/prepare.sh")) {
        run_shell("bash \"$1\"", {fs::absolute(from + "/prepare.sh")}, copy);
      }
    }
    run_shell(
        "if [ -s \"$1/diff.patch\" ]; then GIT_CEILING_DIRECTORIES=\"$1\" git apply "
        "--whitespace=nowarn \"$1/diff.patch\"; "
        "fi; cp -r \"$1/answer/.\" .ate/answer; cp -r \"$2\" .ate/grade; "
        "cp \"$3\" \"$4\" \"$5\" .ate/",
        {directory, fs::absolute(task.directory + "/grade"), fs::absolute(home + "/grade_tools.sh"),
         fs::absolute(home + "/hidden_test.inc"), fs::absolute(home + "/questions.py")},
        copy);
    ChildSpec child;
    child.arguments = {"bash", ".ate/grade/grade.sh"};
    child.directory = copy;
    child.environment = {"CCACHE_BASEDIR=" + copy, "CCACHE_NOHASHDIR=1",
                         "ATE_ANSWER=" + copy + "/.ate/answer",
                         "ATE_FRAMEWORK=" + record.framework};
    child.stdout_path = child.stderr_path = directory + "/grade.log";
    child.limit_s = task.grade_limit_s;
    const ChildResult result = run_child(child);
    grade.graded = result.exit_code == 0 && !result.timed_out;
    grade.wall_s = result.wall_s;
  }
  grade.checks = read_checks(task.checks, read_file(directory + "/grade.log"));
  grade.success = record.outcome == "finished" && grade.graded &&
                  std::all_of(grade.checks.begin(), grade.checks.end(),
                              [](const CheckResult& check) { return check.passed; });
  Json checks = Json::array();
  for (const CheckResult& check : grade.checks) {
    checks.push_back({{"name", check.name}, {"passed", check.passed}, {"detail", check.detail}});
  }
  const Json json = {{"checks", checks},
                     {"graded", grade.graded},
                     {"success", grade.success},
                     {"wall_s", grade.wall_s}};
  write_file(directory + "/grade.json", json.dump(1) + "\n");
  fs::remove_all(copy);
  return grade;
}

void save_attempt(const AttemptRecord& record, const std::string& directory) {
  const Json json = {
      {"task", record.task},     {"suite", record.suite},     {"framework", record.framework},
      {"source", record.source}, {"commit", record.commit},   {"agent", record.agent},
      {"model", record.model},   {"outcome", record.outcome}, {"detail", record.detail},
      {"wall_s", record.wall_s}, {"hidden", record.hidden}};
  write_file(directory + "/attempt.json", json.dump(1) + "\n");
}

AttemptRecord load_attempt(const std::string& directory) {
  const Json json = Json::parse(read_file(directory + "/attempt.json"), nullptr, false);
  if (!json.is_object()) {
    throw std::runtime_error(directory + "/attempt.json is missing or torn: is this an attempt?");
  }
  return {json.at("task"),   json.at("suite"),  json.at("framework"), json.at("source"),
          json.at("commit"), json.at("agent"),  json.at("model"),     json.at("outcome"),
          json.at("detail"), json.at("wall_s"), json.at("hidden")};
}

Grade load_grade(const std::string& directory) {
  const Json json = Json::parse(read_file(directory + "/grade.json"), nullptr, false);
  Grade grade;
  if (!json.is_object()) return grade;
  for (const Json& check : json.at("checks")) {
    grade.checks.push_back({check.at("name"), check.at("passed"), check.at("detail")});
  }
  grade.graded = json.at("graded");
  grade.success = json.at("success");
  grade.wall_s = json.at("wall_s");
  return grade;
}

}  // namespace ate
