// Launcher variables and the transport that run.transport = auto stands for.
#include "src/cli/environment.h"
#include "gtest/gtest.h"
#include "src/base/error.h"

namespace cambium {
namespace {

Environment variables(std::vector<const char*> entries) {
  entries.push_back(nullptr);
  return read_environment(entries.data());
}

// What resolve_transport answers: a transport's name, or the message of the refusal.
std::string resolved(const Environment& environment, const char* transport, int ranks) {
  const std::vector<std::string> sets = {std::string("run.transport=") + transport};
  const Config config = parse_config("model = \"tiny\"\n", "x.toml", sets);
  try {
    return choice_name(resolve_transport(environment, config, ranks));
  } catch (const Error& error) {
    EXPECT_EQ(error.exit_code(), ExitCode::usage);
    return error.what();
  }
}

TEST(LaunchEnvironment, KeepsOnlyWhatIsHeeded) {
  const Environment environment = variables({"RANK=3", "HOME=/root", "NO_COLOR=1", "NONSENSE"});
  EXPECT_EQ(environment.variables.size(), 2u);
  EXPECT_EQ(environment.get("RANK"), "3");
  EXPECT_EQ(environment.get("HOME"), "");
}

TEST(LaunchEnvironment, KnowsTheLaunchers) {
  EXPECT_FALSE(launched_process(variables({})).has_value());
  EXPECT_FALSE(launched_process(variables({"RANK=1"})).has_value());
  EXPECT_FALSE(launched_process(variables({"SLURM_JOB_ID=7"})).has_value());
  const auto torchrun = launched_process(variables({"RANK=3", "WORLD_SIZE=8"}));
  ASSERT_TRUE(torchrun.has_value());
  EXPECT_EQ(torchrun->launcher, "torchrun");
  EXPECT_EQ(torchrun->rank, 3);
  EXPECT_EQ(torchrun->world_size, 8);
  const auto mpirun =
      launched_process(variables({"OMPI_COMM_WORLD_RANK=0", "OMPI_COMM_WORLD_SIZE=2"}));
  EXPECT_EQ(mpirun->launcher, "mpirun");
  EXPECT_EQ(launched_process(variables({"PMI_RANK=1", "PMI_SIZE=2"}))->rank, 1);
  const auto srun = launched_process(variables({"SLURM_PROCID=5", "SLURM_NTASKS=16"}));
  EXPECT_EQ(srun->launcher, "srun");
  EXPECT_EQ(srun->world_size, 16);
  // torchrun inside srun: the inner launcher numbers the processes.
  const auto nested =
      launched_process(variables({"SLURM_PROCID=0", "SLURM_NTASKS=2", "RANK=9", "WORLD_SIZE=16"}));
  EXPECT_EQ(nested->world_size, 16);
}

TEST(LaunchEnvironment, NonsenseIsRefused) {
  for (const auto& entries :
       std::vector<std::vector<const char*>>{{"RANK=x", "WORLD_SIZE=8"},
                                             {"RANK=-1", "WORLD_SIZE=8"},
                                             {"RANK=8", "WORLD_SIZE=8"},
                                             {"RANK=0", "WORLD_SIZE=99999999999999999999"},
                                             {"SLURM_PROCID=0", "SLURM_NTASKS=8(x2)"}}) {
    EXPECT_THROW(launched_process(variables(entries)), Error) << entries[0];
  }
}

TEST(ResolveTransport, AutoFollowsTheWorldSize) {
  const Environment none = variables({});
  const Environment one = variables({"RANK=0", "WORLD_SIZE=1"});
  const Environment eight = variables({"RANK=0", "WORLD_SIZE=8"});
  EXPECT_EQ(resolved(none, "auto", 8), "sim");
  EXPECT_EQ(resolved(one, "auto", 8), "sim");
  EXPECT_EQ(resolved(one, "auto", 1), "sim");
  EXPECT_EQ(resolved(eight, "sim", 8), "sim");
  EXPECT_NE(resolved(eight, "auto", 8).find("need NCCL, which this build does not have"),
            std::string::npos);
  EXPECT_NE(resolved(eight, "auto", 4).find("torchrun started 8 processes, but the layout has 4"),
            std::string::npos);
  EXPECT_NE(resolved(eight, "auto", 1).find("the layout has 1 ranks"), std::string::npos);
  EXPECT_NE(resolved(none, "nccl", 8).find("no launcher started 1 processes"), std::string::npos);
}

}  // namespace
}  // namespace cambium
