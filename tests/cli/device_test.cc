// What a machine without a GPU, or with too small a one, answers to run.device = cuda.
#include <gtest/gtest.h>

#include "kernels/cuda_stream.h"
#include "src/cli/launch.h"
#include "src/config/derive.h"
#include "tests/cli/run_binary.h"

namespace cambium {

namespace {

bool has_gpu() {
  if constexpr (kHasCuda) return cuda::device_count() > 0;
  return false;
}

TEST(Device, WithoutAGpuItIsRefusedBeforeAnythingIsMade) {
  if (has_gpu()) GTEST_SKIP() << "this machine has a GPU";
  ScratchDirectory scratch;
  const std::string out = scratch.path() + "/run";
  const BinaryRun run =
      run_binary({"train", "configs/tiny.toml", "--set", "run.device=cuda", "--out", out});
  EXPECT_EQ(run.exit_code, 2) << run.output;
  const char* reason = kHasCuda ? "no GPU is visible" : "this build has no CUDA kernels";
  EXPECT_NE(run.output.find(reason), std::string::npos) << run.output;
  EXPECT_NE(run.output.find("next: "), std::string::npos) << run.output;
  EXPECT_NE(run_binary({"compare", out, out}).exit_code, 0) << "the run directory was made";
}

// A library that cannot be loaded stands for one that is not there.
TEST(Device, WithoutCudnnItIsRefused) {
  ScratchDirectory scratch;
  scratch.write("libcudnn.so.9", "");
  std::vector<std::string> arguments{"train", "configs/tiny.toml"};
  for (const char* assignment : {"run.device=cuda", "numerics.attention=cudnn",
                                 "numerics.reduction=fast", "data.document_mask=false"}) {
    arguments.insert(arguments.end(), {"--set", assignment});
  }
  const BinaryRun run = run_binary(arguments, {"LD_LIBRARY_PATH=" + scratch.path()});
  EXPECT_EQ(run.exit_code, 2) << run.output;
  const char* reason = kHasCuda ? "cuDNN" : "this build has no CUDA kernels";
  EXPECT_NE(run.output.find(reason), std::string::npos) << run.output;
  EXPECT_NE(run.output.find("next: "), std::string::npos) << run.output;
}

TEST(Device, MemoryThatIsMissingIsNamedWithExit40) {
  require_memory(1000, 1000);
  try {
    require_memory(56'000'000'000, 48'000'000'000);
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.exit_code(), ExitCode::out_of_memory);
    EXPECT_NE(std::string(error.what()).find("need 56.0 GB"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("48.0 GB free"), std::string::npos) << error.what();
  }
}

// 3.1 B parameters: fp32 weights, gradients and two moments, and the bf16 copy.
TEST(Device, StateBytesCountWhatARunKeeps) {
  Config config = parse_config(
      "[model]\npreset = \"qwen3-30b-a3b\"\nlayers = 4\n[train]\nsequence_length = 4096\n"
      "[run]\ndevice = \"cuda\"\n",
      "x", {});
  config.run.device = DeviceKind::cpu;  // derive() refuses cuda in a build without kernels
  const Derived derived = derive(config);
  EXPECT_EQ(config.numerics.compute, ComputeType::bf16);
  EXPECT_EQ(derived.state_bytes, 18 * derived.parameters);
  config.optimizer.state_dtype = ComputeType::bf16;
  EXPECT_EQ(derive(config).state_bytes, 14 * derived.parameters);
  config.optimizer.state_dtype = ComputeType::fp32;
  config.parallel.dp = 4;
  config.parallel.ep = 2;
  const Derived sharded = derive(config);
  const int64_t experts = 4 * 128 * derived.expert_parameters;
  const int64_t held = 4 * (derived.parameters - experts) + 2 * experts;
  EXPECT_EQ(sharded.state_bytes, 10 * held + 8 * derived.parameters);
}

}  // namespace

}  // namespace cambium
