// `cambium checkpoint ...` in-process: import, inspect, verify, export give the same bits back.
#include <fstream>

#include "gtest/gtest.h"
#include "src/checkpoint/checkpoint.h"
#include "src/checkpoint/hf_weights.h"
#include "src/cli/commands.h"
#include "tests/checkpoint/checkpoint_testing.h"
#include "tests/checkpoint/hf_samples.h"

namespace cambium {
namespace {

class CheckpointCommands : public ::testing::Test {
 protected:
  std::string at(const char* name) const { return directory_.path() + "/" + name; }
  void make_hf(ModelFamily family) {
    FormulaSource source;
    const ModelConfig model = parse_hf_config(family_config(family).dump(), "config.json");
    export_hf(files_, model, source, HfStorage::f32, at("hf"));
  }
  // Exit code of one command with its output captured.
  Outcome run(CheckpointAction action, const std::string& path, const std::string& out = "",
              const std::string& storage = "fp32") {
    CheckpointOptions options;
    options.action = action;
    options.path = path;
    options.out = out;
    options.storage = storage;
    options.format = OutputFormat::json;
    int code = 0;
    testing::internal::CaptureStdout();
    Outcome outcome = outcome_of([&] { code = command_checkpoint(options); });
    const std::string printed = testing::internal::GetCapturedStdout();
    return outcome.code != 0 ? outcome : Outcome{.code = code, .message = printed};
  }
  std::string weights_of(const char* name) {
    return files_.read_file(at(name) + "/model.safetensors", int64_t{1} << 30, Symlinks::refuse);
  }

  TemporaryDirectory directory_;
  FileSystem files_;
};

TEST_F(CheckpointCommands, ImportThenExportGivesTheSameFile) {
  for (const ModelFamily family : kFamilies) {
    for (const char* name : {"hf", "run", "out", "half"}) files_.remove_tree(at(name));
    make_hf(family);
    ASSERT_EQ(run(CheckpointAction::import_hf, at("hf"), at("run") + "/checkpoints").code, 0);
    const Outcome inspected = run(CheckpointAction::inspect, at("run"));
    EXPECT_EQ(inspected.code, 0);
    EXPECT_EQ(nlohmann::json::parse(inspected.message)["step"], 0);
    EXPECT_EQ(run(CheckpointAction::verify, at("run")).code, 0);
    ASSERT_EQ(run(CheckpointAction::export_hf, at("run"), at("out")).code, 0);
    EXPECT_EQ(weights_of("out"), weights_of("hf"));
    EXPECT_EQ(load_hf_config(at("out")).family, family);
    ASSERT_EQ(run(CheckpointAction::export_hf, at("run"), at("half"), "bf16").code, 0);
    EXPECT_LT(weights_of("half").size(), weights_of("hf").size());
    EXPECT_EQ(run(CheckpointAction::export_hf, at("run"), at("out")).code, 33);
  }
}

TEST_F(CheckpointCommands, VerifyReportsEveryDamagedCheckpoint) {
  make_hf(ModelFamily::qwen3_moe);
  ASSERT_EQ(run(CheckpointAction::import_hf, at("hf"), at("run")).code, 0);
  const std::string manifest = checkpoint_path(at("run"), 0) + "/manifest.json";
  std::ofstream(manifest, std::ios::app) << "x";
  const Outcome outcome = run(CheckpointAction::verify, at("run"));
  EXPECT_EQ(outcome.code, 30);
  EXPECT_NE(outcome.message.find("manifest.json"), std::string::npos);
  EXPECT_EQ(run(CheckpointAction::inspect, at("run")).code, 30);
}

TEST_F(CheckpointCommands, WrongPathsAreUsageErrors) {
  EXPECT_EQ(run(CheckpointAction::inspect, at("none")).code, 2);
  EXPECT_EQ(run(CheckpointAction::verify, at("none")).code, 2);
  EXPECT_EQ(run(CheckpointAction::export_hf, at("none"), at("out")).code, 2);
  EXPECT_EQ(run(CheckpointAction::import_hf, at("none"), at("out")).code, 2);
  EXPECT_EQ(files_.kind(at("out")), EntryKind::missing);
}

}  // namespace
}  // namespace cambium
