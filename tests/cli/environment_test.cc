// Launcher variables and the transport that run.transport = auto stands for.
#include "src/cli/environment.h"
#include "gtest/gtest.h"
#include "kernels/op.h"
#include "src/base/error.h"

namespace cambium {
namespace {

Environment variables(std::vector<const char*> entries) {
  entries.push_back(nullptr);
  return read_environment(entries.data());
}

// What resolve_transport answers: a transport's name, or the message of the refusal.
std::string resolved(const Environment& environment, const char* transport, int ranks,
                     const char* device = "cuda") {
  const std::vector<std::string> sets = {std::string("run.transport=") + transport,
                                         std::string("run.device=") + device};
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

std::string endpoint(std::vector<const char*> entries) {
  const Environment environment = variables(std::move(entries));
  try {
    return rendezvous_endpoint(environment, *launched_process(environment)).text();
  } catch (const Error& error) {
    EXPECT_EQ(error.exit_code(), ExitCode::usage);
    return error.what();
  }
}

TEST(LaunchEnvironment, KnowsWhereRankZeroIs) {
  EXPECT_EQ(endpoint({"RANK=1", "WORLD_SIZE=2", "MASTER_ADDR=a", "MASTER_PORT=7000"}), "a:7000");
  // torchrun's agent has MASTER_PORT itself.
  EXPECT_EQ(endpoint({"RANK=1", "WORLD_SIZE=2", "MASTER_ADDR=a", "MASTER_PORT=7000",
                      "TORCHELASTIC_USE_AGENT_STORE=True"}),
            "a:7001");
  EXPECT_EQ(endpoint({"OMPI_COMM_WORLD_RANK=1", "OMPI_COMM_WORLD_SIZE=2",
                      "OMPI_COMM_WORLD_LOCAL_SIZE=2"}),
            "127.0.0.1:29500");
  EXPECT_EQ(endpoint({"SLURM_PROCID=1", "SLURM_NTASKS=2", "SLURM_JOB_ID=1234567",
                      "SLURM_JOB_NODELIST=gpu[03-07,12],login1"}),
            "gpu03:24567");
  EXPECT_NE(
      endpoint({"OMPI_COMM_WORLD_RANK=1", "OMPI_COMM_WORLD_SIZE=2", "OMPI_COMM_WORLD_LOCAL_SIZE=1"})
          .find("MASTER_ADDR"),
      std::string::npos);
  EXPECT_NE(endpoint({"RANK=1", "WORLD_SIZE=2", "MASTER_ADDR=a", "MASTER_PORT=70000"})
                .find("another MASTER_PORT"),
            std::string::npos);
}

TEST(LaunchEnvironment, KnowsTheLocalRankAndTheJob) {
  const auto torchrun = launched_process(variables(
      {"RANK=9", "WORLD_SIZE=16", "LOCAL_RANK=1", "TORCHELASTIC_RUN_ID=abc", "SLURM_JOB_ID=5"}));
  EXPECT_EQ(torchrun->local_rank, 1);
  EXPECT_NE(torchrun->job.find("abc"), std::string::npos);
  EXPECT_EQ(launched_process(variables({"RANK=9", "WORLD_SIZE=16"}))->local_rank, -1);
}

TEST(LaunchEnvironment, FirstHostOfSlurmsList) {
  EXPECT_EQ(first_host("node1"), "node1");
  EXPECT_EQ(first_host("node1,node2"), "node1");
  EXPECT_EQ(first_host("gpu[03-07,12]"), "gpu03");
  EXPECT_EQ(first_host("gpu[7,12]"), "gpu7");
  EXPECT_EQ(first_host("gpu[7]"), "gpu7");
  EXPECT_EQ(first_host("rack[1-2]n[01-08]"), "rack1n01");
}

TEST(ResolveTransport, AutoFollowsTheWorldSize) {
  const Environment none = variables({});
  const Environment one = variables({"RANK=0", "WORLD_SIZE=1"});
  const Environment eight = variables({"RANK=0", "WORLD_SIZE=8"});
  EXPECT_EQ(resolved(none, "auto", 8), "sim");
  EXPECT_EQ(resolved(one, "auto", 8), "sim");
  EXPECT_EQ(resolved(one, "auto", 1), "sim");
  EXPECT_EQ(resolved(eight, "sim", 8), "sim");
  if (kHasCuda) {
    EXPECT_EQ(resolved(eight, "auto", 8), "nccl");
    EXPECT_EQ(resolved(none, "nccl", 1), "nccl");
  } else {
    EXPECT_NE(resolved(eight, "auto", 8).find("need NCCL, which this build does not have"),
              std::string::npos);
  }
  EXPECT_NE(resolved(eight, "auto", 8, "cpu").find("but run.device = cpu"), std::string::npos);
  EXPECT_NE(resolved(eight, "auto", 4).find("torchrun started 8 processes, but the layout has 4"),
            std::string::npos);
  EXPECT_NE(resolved(eight, "auto", 1).find("the layout has 1 ranks"), std::string::npos);
  EXPECT_NE(resolved(none, "nccl", 8).find("no launcher started 1 processes"), std::string::npos);
}

}  // namespace
}  // namespace cambium
