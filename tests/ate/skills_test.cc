// The PASS or FAIL commands of .agents/skills can fail: tidy runs them where they pass.
#include <sys/wait.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "gtest/gtest.h"
#include "tests/cli/run_binary.h"
#include "tests/tree.h"

namespace ate {
namespace {

struct SkillRun {
  int status = 0;
  std::string output;
};

SkillRun run_skill(const std::string& command) {
  const cambium::ScratchDirectory scratch;
  const std::string log = scratch.path() + "/log";
  const std::string line = "cd '" + std::string(cambium::source_directory()) +
                           "/.agents/skills' && { " + command + "\n} > '" + log + "' 2>&1";
  SkillRun run;
  run.status = WEXITSTATUS(system(line.c_str()));
  std::ifstream stream(log);
  run.output.assign(std::istreambuf_iterator<char>(stream), {});
  return run;
}

const std::string kBuild = cambium::build_directory();

TEST(AteSkills, BuildsThatDifferAreToldApart) {
  const cambium::ScratchDirectory scratch;
  const std::string other = scratch.write(
      "other",
      "#!/bin/sh\ncommand=$1\nshift\nif [ $command = train ]; then set -- \"$@\" --set "
      "run.seed=2; fi\nexec " +
          std::string(cambium::cambium_binary()) + " $command \"$@\"\n");
  std::filesystem::permissions(other, std::filesystem::perms::owner_all);
  const SkillRun run =
      run_skill("find-a-numerical-regression/compare_builds.sh " +
                std::string(cambium::cambium_binary()) + " " + other + " configs/tiny.toml 1");
  EXPECT_EQ(run.status, 51) << run.output;
  EXPECT_NE(run.output.find("FAIL: exit 51"), std::string::npos) << run.output;
  EXPECT_NE(run.output.find("step 0"), std::string::npos) << run.output;
}

TEST(AteSkills, AnIncompleteOpFails) {
  const SkillRun run = run_skill("add-an-op/check.sh shared_panel " + kBuild);
  EXPECT_EQ(run.status, 1);
  EXPECT_NE(run.output.find("FAIL: kernels/shared_panel.h is missing"), std::string::npos)
      << run.output;
}

TEST(AteSkills, AChangeThatBreaksCollectivesFails) {
  const cambium::ScratchDirectory scratch;
  std::ifstream stream(cambium::source_directory() + std::string("/configs/tiny.toml"));
  std::string text(std::istreambuf_iterator<char>(stream), {});
  text += "\n[[faults]]\nkind = \"skipped_collective\"\nrank = 1\nstep = 1\n";
  const SkillRun run =
      run_skill("validate-a-change/check.sh " + scratch.write("broken.toml", text) + " " + kBuild);
  EXPECT_TRUE(run.status == 22 || run.status == 23) << run.status << run.output;
  EXPECT_NE(run.output.find("FAIL: exit 2"), std::string::npos) << run.output;
}

TEST(AteSkills, AnUnknownMachineFails) {
  const SkillRun run =
      run_skill("profile-a-step/check.sh configs/quickstart.toml no_such_machine " + kBuild);
  EXPECT_EQ(run.status, 1);
  EXPECT_NE(run.output.find("FAIL: cambium plan"), std::string::npos) << run.output;
}

}  // namespace
}  // namespace ate
