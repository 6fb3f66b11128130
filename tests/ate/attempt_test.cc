// `ate run` with the scripted agent through run, grade and report, on a framework and a task made
// here: what succeeds, and every way in which an attempt must not.
#include "ate_bench/attempt.h"

#include <filesystem>

#include "ate_bench/process.h"
#include "ate_bench/prove.h"
#include "ate_bench/report.h"
#include "fmt/core.h"
#include "gtest/gtest.h"
#include "tests/cli/run_binary.h"
#include "tests/tree.h"

namespace ate {
namespace {

namespace fs = std::filesystem;

const std::string kDone = "{\"type\":\"end\"}\n";

struct Bench {
  cambium::ScratchDirectory scratch;
  std::string home = scratch.path() + "/home",
              binary = cambium::build_directory() + std::string("/ate");

  Bench() {
    const std::string real = cambium::source_directory() + std::string("/ate_bench/");
    for (const char* file :
         {"run.sh", "grade_tools.sh", "hidden_test.inc", "questions.py", "preamble.md"}) {
      write_file(home + "/" + file, read_file(real + file));
    }
    write_file(
        home + "/frameworks/cambium/framework.toml",
        "source = \"" + scratch.path() + "/tree\"\ncommit = \"HEAD\"\nhidden = [\"secret\"]\n");
    const std::string task = home + "/tasks/sum/";
    write_file(task + "task.toml",
               "suite = \"operate\"\ntitle = \"t\"\nbudget_s = 60\nframeworks = [\"cambium\"]\n"
               "read_only = [\"fixed\"]\nchecks = [\"number\", \"source\"]\n");
    write_file(task + "task.md", "Write 42.\n");
    write_file(task + "grade/grade.sh",
               ". .ate/grade_tools.sh\n"
               "check number n grep -qx 42 \"$ATE_ANSWER/n\"\n"
               "check source s grep -qx changed code\n");
    write_file(scratch.path() + "/tree/code", "base\n");
    write_file(scratch.path() + "/tree/fixed/file", "base\n");
    write_file(scratch.path() + "/tree/secret", "hidden\n");
    run_shell(
        "git init -q && git add -A && git -c user.name=t -c user.email=t@localhost commit -qm t",
        {}, scratch.path() + "/tree");
  }

  // Runs one session; the attempt's directory is `name`.
  AttemptRecord run(const std::string& name, const std::string& session, double limit_s = 30) {
    AttemptSpec spec;
    spec.task = load_task(home, "sum");
    spec.framework = load_framework(home, "cambium");
    spec.agent = {"scripted", "", scratch.write(name + ".session", session)};
    spec.home = home;
    spec.ate_binary = binary;
    spec.directory = attempt(name);
    spec.limit_s = limit_s;
    const AttemptRecord record = run_attempt(spec);
    grade_attempt(home, spec.directory);
    return record;
  }
  std::string attempt(const std::string& name) const { return scratch.path() + "/out/" + name; }
  Grade grade(const std::string& name) const { return load_grade(attempt(name)); }
};

std::string exec(const std::string& command) {
  return "{\"type\":\"turn\",\"input_tokens\":50,\"output_tokens\":5}\n"
         "{\"type\":\"exec\",\"command\":\"" +
         command + "\"}\n";
}

const std::string kRight = "echo 42 > .ate/answer/n; echo changed > code; .ate/run true";

TEST(AteAttempt, RightAnswerSucceedsThroughCommandLineAndReport) {
  Bench bench;
  const std::string session =
      bench.scratch.write("s", exec(kRight) +
                                   "{\"type\":\"turn\",\"input_tokens\":50,\"cached_tokens\":20,"
                                   "\"output_tokens\":5,\"model\":\"m\"}\n" +
                                   kDone);
  const std::string prices =
      bench.scratch.write("p", "[m]\ninput = 2000\ncached_input = 500\noutput = 10000\n");
  // Inside a repository: the grading copy's diff must not be taken for the surrounding tree's.
  const std::string out = bench.scratch.path() + "/tree/runs";
  run_shell(
      "\"$1\" --home \"$2\" run sum --agent scripted --command \"$3\" --repeat 2 --out \"$4\"; "
      "\"$1\" --home \"$2\" report \"$4\" --prices \"$5\"; \"$1\" --home \"$2\" grade "
      "\"$4/sum-cambium-scripted-1\"",
      {bench.binary, bench.home, session, out, prices}, "/");
  const auto attempts = collect_attempts(out, {});
  ASSERT_EQ(attempts.size(), 2u);
  EXPECT_TRUE(attempts[1].grade.success);
  EXPECT_EQ(attempts[1].record.outcome, "finished");
  EXPECT_EQ(attempts[1].measures.lines_changed, 2);
  EXPECT_EQ(attempts[1].measures.agent_turns, 2);
  EXPECT_GT(attempts[1].measures.cpu_simulated_s + attempts[1].measures.active_gpu_s, 0);
  EXPECT_NE(
      read_file(out + "/report.md").find("| sum | cambium | scripted m | 2/2 | 2 | 50 | 10 |"),
      std::string::npos);
  EXPECT_NE(read_file(out + "/report.csv").find("finished,1,1,2,50,10,"), std::string::npos);
  // 80 tokens at 2000, 20 cached at 500, 10 written at 10000 dollars a million.
  EXPECT_NE(read_file(out + "/report.csv").find(",2,0.27,0,2,2,\n"), std::string::npos)
      << read_file(out + "/report.csv");
  const std::string html = read_file(out + "/report.html");
  const size_t chart = html.find("<h2>Cost</h2><svg");
  ASSERT_NE(chart, std::string::npos);
  const std::string bars = html.substr(chart, html.find("</svg>", chart) - chart);
  EXPECT_NE(bars.find("sum, cambium, scripted m</text>"), std::string::npos) << bars;
  EXPECT_NE(bars.find("width='380.0'"), std::string::npos) << "the longest bar";
  EXPECT_NE(bars.find(">0.27</text>"), std::string::npos) << bars;
  EXPECT_EQ(html.find("http"), std::string::npos) << "the page needs nothing else";
}

TEST(AteAttempt, GradesAreOfTheCommitThatTheAgentWorkedOn) {
  Bench bench;
  const AttemptRecord record = bench.run("early", exec(kRight) + kDone);
  EXPECT_EQ(record.commit.size(), 40u) << record.commit;
  run_shell(
      "echo moved > code; git -c user.name=t -c user.email=t@localhost commit -qam moved; "
      "[ $(git rev-parse HEAD^) = \"$1\" ]",
      {record.commit}, bench.scratch.path() + "/tree");
  EXPECT_TRUE(grade_attempt(bench.home, bench.attempt("early")).success);
}

TEST(AteAttempt, WrongAnswersFailByCheck) {
  Bench bench;
  EXPECT_EQ(
      bench.run("wrong", exec("echo 41 > .ate/answer/n; echo changed > code") + kDone).outcome,
      "finished");
  const Grade grade = bench.grade("wrong");
  EXPECT_TRUE(grade.graded);
  EXPECT_FALSE(grade.success);
  EXPECT_FALSE(grade.checks.at(0).passed);
  EXPECT_TRUE(grade.checks.at(1).passed);
  bench.run(
      "committed",
      exec(kRight + "; git add -A; git -c user.name=a -c user.email=a@b commit -qm c") + kDone);
  EXPECT_TRUE(bench.grade("committed").success) << "a commit of the agent's is part of its work";
}

TEST(AteAttempt, TimeoutCrashNetworkLossAndReadOnlyAreNoSuccess) {
  Bench bench;
  EXPECT_EQ(bench.run("slow", exec(kRight) + "{\"type\":\"sleep\",\"s\":60}\n" + kDone, 2).outcome,
            "timeout");
  EXPECT_EQ(bench.run("crash", exec(kRight) + "{\"type\":\"exit\",\"code\":3}\n").outcome, "crash");
  EXPECT_EQ(bench.run("torn", exec(kRight) + "{\"type\":\"en").outcome, "crash");
  EXPECT_EQ(bench
                .run("lost", exec(kRight) +
                                 "{\"type\":\"end\",\"error\":\"connection reset: ECONNRESET\"}\n")
                .outcome,
            "network_loss");
  const AttemptRecord dropped =
      bench.run("dropped", exec(kRight + "; echo 'Error: getaddrinfo ENOTFOUND' >&2") +
                               "{\"type\":\"exit\",\"code\":1}\n");
  EXPECT_EQ(dropped.outcome, "network_loss") << dropped.detail;
  const AttemptRecord edited = bench.run("edited", exec(kRight + "; echo x >> fixed/file") + kDone);
  EXPECT_EQ(edited.outcome, "edited_read_only");
  EXPECT_EQ(edited.detail, "fixed/file");
  for (const char* name : {"slow", "crash", "torn", "lost", "dropped", "edited"}) {
    EXPECT_FALSE(bench.grade(name).success) << name;
    EXPECT_TRUE(bench.grade(name).checks.at(0).passed) << name << ": its work was right";
  }
  EXPECT_EQ(collect_attempts(bench.scratch.path() + "/out", {}).size(), 6u);
}

TEST(AteAttempt, WhatAnAgentDoesToItsCopyLosesNoAttempt) {
  Bench bench;
  bench.run("no_git", exec(kRight + "; rm -rf .git") + kDone);
  EXPECT_TRUE(bench.grade("no_git").success) << "the base is kept apart";
  const AttemptRecord moved = bench.run(
      "moved_base", exec(kRight + "; echo x >> fixed/file; git add -A; git -c user.name=a "
                                  "-c user.email=a@b commit -qm c; git tag -f ate-base") +
                        kDone);
  EXPECT_EQ(moved.outcome, "edited_read_only");
  const AttemptRecord gone = bench.run("gone", exec(kRight + "; rm -rf $PWD") + kDone);
  EXPECT_EQ(gone.outcome, "crash");
  EXPECT_FALSE(bench.grade("gone").success);
  EXPECT_FALSE(bench.grade("gone").graded);
}

TEST(AteAttempt, FrameworkOutOfReachIsRecordedAndEndsWith31) {
  Bench bench;
  write_file(bench.home + "/frameworks/cambium/framework.toml",
             "source = \"file:///nowhere/at/all.git\"\ncommit = \"main\"\n");
  const std::string session = bench.scratch.write("s", kDone);
  run_shell(
      "status=0; \"$1\" --home \"$2\" run sum --agent scripted --command \"$3\" --repeat 1 --out "
      "\"$4\" || status=$?; [ $status = 31 ]",
      {bench.binary, bench.home, session, bench.scratch.path() + "/out"}, "/");
  const AttemptRecord record = load_attempt(bench.attempt("sum-cambium-scripted-1"));
  EXPECT_EQ(record.outcome, "prepare_failed");
  EXPECT_NE(record.detail.find("no network"), std::string::npos) << record.detail;
  EXPECT_FALSE(load_grade(bench.attempt("sum-cambium-scripted-1")).success);
}

// Two GPUs that this nvidia-smi says are busy for 50 % and 100 %.
TEST(AteAttempt, RunScriptMeasuresGpuRuns) {
  Bench bench;
  bench.scratch.write("nvidia-smi",
                      "#!/bin/sh\n[ \"$1\" = -L ] && exit 0\n"
                      "while :; do echo 50; echo 100; sleep 1; done\n");
  run_shell("chmod +x \"$1\"", {bench.scratch.path() + "/nvidia-smi"}, "/");
  bench.run("gpu", exec(kRight + "; export PATH=" + bench.scratch.path() +
                        ":$PATH; .ate/run sleep 1.5; (.ate/run sleep 60 & run=$!; sleep 1; kill "
                        "$run; wait $run) || true") +
                       kDone);
  const auto attempts = collect_attempts(bench.scratch.path() + "/out", {});
  ASSERT_EQ(attempts.size(), 1u);
  const double active_s = attempts[0].measures.active_gpu_s;
  EXPECT_TRUE(active_s > 2.0 && active_s < 20) << active_s << ": the stopped run counts too";
  EXPECT_NEAR(attempts[0].measures.gpu_busy_s, 0.75 * active_s, 0.01 * active_s);
  EXPECT_TRUE(attempts[0].grade.success);
}

TEST(AteAttempt, SessionsFromElsewhereHaveAReport) {
  Bench bench;
  const std::string out = bench.scratch.path() + "/elsewhere";
  run_shell("\"$1\" session \"$2\" --agent claude --out \"$3\"",
            {bench.binary,
             cambium::source_directory() + std::string("/tests/ate/transcripts/claude.jsonl"), out},
            "/");
  const std::string csv = read_file(out + "/session-claude/report.csv");
  EXPECT_NE(csv.find("claude,claude-x,recorded,0,0,3,2020,120,"), std::string::npos) << csv;
  // Another agent's file has no turns, which is no report of zeros.
  run_shell(
      "status=0; \"$1\" session \"$2\" --agent codex --out \"$3\" || status=$?; [ $status = 2 ]",
      {bench.binary,
       cambium::source_directory() + std::string("/tests/ate/transcripts/claude.jsonl"), out},
      "/");
}

TEST(AteAttempt, PriceTablesWithHolesAreRefused) {
  Bench bench;
  for (const char* text : {"[m]\ninput = 1\noutput = 2\n", "m = 3\n"}) {
    EXPECT_THROW(load_prices(bench.scratch.write("p", text)), std::runtime_error) << text;
  }
}

TEST(AteAttempt, AgentsNeverSeeHiddenPathsNorTheGrader) {
  Bench bench;
  bench.run("look",
            exec("ls -aR . .. > .ate/answer/n; git log --all --stat >> .ate/answer/n") + kDone);
  const std::string seen = read_file(bench.attempt("look") + "/answer/n");
  EXPECT_NE(seen.find("code"), std::string::npos);
  EXPECT_EQ(seen.find("secret"), std::string::npos);
  EXPECT_EQ(seen.find("grade.sh"), std::string::npos);
}

TEST(AteAttempt, FailedPrepareAndDyingGraderAreRecorded) {
  Bench bench;
  write_file(bench.home + "/tasks/sum/grade/grade.sh", "echo CHECK number PASS; exit 9\n");
  bench.run("dies", exec(kRight) + kDone);
  EXPECT_FALSE(bench.grade("dies").graded);
  EXPECT_FALSE(bench.grade("dies").success);
  EXPECT_EQ(bench.grade("dies").checks.at(1).detail, kNeverReached);
  write_file(bench.home + "/tasks/sum/grade/grade.sh",
             ". .ate/grade_tools.sh\ncheck number n true\ncheck source s true\nsleep 60\n");
  const std::string toml = read_file(bench.home + "/tasks/sum/task.toml");
  write_file(bench.home + "/tasks/sum/task.toml", toml + "grade_limit_s = 1\n");
  bench.run("hangs", exec(kRight) + kDone);
  EXPECT_TRUE(bench.grade("hangs").checks.at(1).passed);
  EXPECT_FALSE(bench.grade("hangs").success) << "a grader that does not end has not judged";
  write_file(bench.home + "/tasks/sum/prepare.sh", "echo no luck; exit 1\n");
  const AttemptRecord record = bench.run("unprepared", kDone);
  EXPECT_EQ(record.outcome, "prepare_failed");
  EXPECT_NE(record.detail.find("no luck"), std::string::npos);
}

TEST(AteAttempt, ProofNeedsRejectedNearMisses) {
  Bench bench;
  const std::string solutions = bench.home + "/tasks/sum/grade/solutions/";
  const ProofSpec spec = {bench.home, bench.binary, bench.scratch.path() + "/p1", "cambium"};
  write_file(solutions + "right.sh", kRight + "\n");
  write_file(solutions + "wrong_a.sh", "echo 41 > .ate/answer/n\n");
  EXPECT_FALSE(prove_task(load_task(bench.home, "sum"), spec)) << "one near-miss is too few";
  write_file(solutions + "wrong_b.sh", "echo 42 > .ate/answer/n\n");
  ProofSpec again = spec;
  again.out = bench.scratch.path() + "/p2";
  EXPECT_TRUE(prove_task(load_task(bench.home, "sum"), again));
  write_file(solutions + "wrong_b.sh", kRight + "\n");
  again.out = bench.scratch.path() + "/p3";
  EXPECT_FALSE(prove_task(load_task(bench.home, "sum"), again)) << "a near-miss was accepted";
}

TEST(AteTasks, EveryTaskOfTheTreeIsWhole) {
  const std::string home = cambium::source_directory() + std::string("/ate_bench");
  int extend = 0, operate = 0, questions = 0;
  for (const Task& task : list_tasks(home)) {
    EXPECT_TRUE(fs::exists(task.directory + "/task.md")) << task.name;
    EXPECT_TRUE(fs::exists(task.directory + "/grade/grade.sh")) << task.name;
    const std::vector<std::string> solutions = list_solutions(task);
    EXPECT_GE(solutions.size(), 3u) << task.name;
    EXPECT_EQ(std::count(solutions.begin(), solutions.end(), "right"), 1) << task.name;
    const std::string instruction = read_file(task.directory + "/task.md");
    if (task.suite == "questions") {
      for (const std::string& check : task.checks) {
        EXPECT_NE(instruction.find("`" + check + "`"), std::string::npos) << task.name << check;
      }
      questions += static_cast<int>(task.checks.size());
    }
    // An extension is graded by training with it, in two layouts.
    if (task.suite == "extend") {
      for (const char* check : {"trainer", "layout"}) {
        EXPECT_EQ(std::count(task.checks.begin(), task.checks.end(), check), 1) << task.name;
      }
    }
    extend += task.suite == "extend";
    operate += task.suite == "operate";
  }
  EXPECT_GE(extend, 5);
  EXPECT_GE(operate, 5);
  EXPECT_GE(questions, 10);
}

// Their edits name the lines they change: who moves those lines learns it here, not from the proof,
// which compiles for minutes.
TEST(AteTasks, SolutionsOfExtensionsFitTheTree) {
  const std::string tree = cambium::source_directory();
  if (!fs::exists(tree + "/.git")) GTEST_SKIP() << "skipped: no git history to copy from";
  for (const Task& task : list_tasks(tree + "/ate_bench")) {
    if (task.suite != "extend") continue;
    for (const std::string& solution : list_solutions(task)) {
      const cambium::ScratchDirectory copy;
      const std::string script = task.directory + "/grade/solutions/" + solution + ".sh";
      const std::string command = fmt::format(
          "cd '{}' && git ls-files -z CMakeLists.txt src kernels reference | tar --null -T - -cf - "
          "| tar -xf - -C '{}' && cd '{}' && "
          "mkdir .ate && bash -eu '{}' >.ate/log 2>&1 || {{ tail -3 .ate/log; exit 1; }}",
          tree, copy.path(), copy.path(), script);
      EXPECT_EQ(std::system(command.c_str()), 0) << task.name << "/" << solution;
    }
  }
}

// The commit tier's sample: tasks that need no compilation, with the binary built here. All of
// them: scripts/test.sh --full.
TEST(AteTasks, GradersAcceptSolutionsAndRejectNearMisses) {
  const std::string tree = cambium::source_directory();
  if (!fs::exists(tree + "/.git")) GTEST_SKIP() << "skipped: no git history to copy from";
  setenv("ATE_CAMBIUM", cambium::cambium_binary(), 1);
  const cambium::ScratchDirectory scratch;
  const ProofSpec spec = {tree + "/ate_bench", cambium::build_directory() + std::string("/ate"),
                          scratch.path(), "cambium"};
  for (const Task& task : list_tasks(spec.home)) {
    if (task.suite == "extend") continue;
    EXPECT_TRUE(prove_task(task, spec)) << task.name;
  }
}

}  // namespace
}  // namespace ate
