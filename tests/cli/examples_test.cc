// configs/ for GPUs: each fits the machine it is for, as README says, and its layout has one rank's
// bits. The twins of 16 and 64 ranks take longer: scripts/test.sh --full checks them.
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "fmt/format.h"
#include "gtest/gtest.h"
#include "kernels/op.h"
#include "tests/cli/run_binary.h"
#include "tests/tree.h"

namespace cambium {
namespace {

// What README may be off by: its figures are rounded, and a faster step is worth a new row.
constexpr double kReadmeError = 0.02;

struct ReadmeRow {
  int ranks = 0;
  double step_ms = 0, tokens_per_s = 0, peak_gb = 0;
};

// | `file` | ranks | layout | step | tokens/s a GPU | memory a GPU |
ReadmeRow readme_row(const std::string& config) {
  std::ifstream readme(std::string(source_directory()) + "/README.md");
  for (std::string line; std::getline(readme, line);) {
    if (!line.starts_with(fmt::format("| `{}` |", config))) continue;
    std::istringstream fields(line);
    std::string none, ranks, step, tokens, peak;
    ReadmeRow row;
    std::getline(fields, none, '|');
    std::getline(fields, none, '|');
    std::getline(fields, ranks, '|');
    std::getline(fields, none, '|');
    std::getline(fields, step, '|');
    std::getline(fields, tokens, '|');
    std::getline(fields, peak, '|');
    row.ranks = std::stoi(ranks);
    row.step_ms = std::stod(step);
    row.tokens_per_s = std::stod(tokens);
    row.peak_gb = std::stod(peak);
    return row;
  }
  ADD_FAILURE() << "README has no row for " << config;
  return {};
}

void expect_near(double value, double planned, const char* what) {
  EXPECT_LE(std::abs(value - planned), kReadmeError * planned)
      << "README says " << value << " " << what << ", the plan " << planned;
}

std::vector<std::string> gpu_examples() {
  std::vector<std::string> paths;
  const std::string folder = std::string(source_directory()) + "/configs";
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    std::ifstream file(entry.path());
    const std::string text(std::istreambuf_iterator<char>(file), {});
    if (text.find("\ndevice = \"cuda\"") == std::string::npos) continue;
    paths.push_back("configs/" + entry.path().filename().string());
  }
  return paths;
}

TEST(Examples, FitTheirMachineAsReadmeSays) {
  const std::vector<std::string> configs = gpu_examples();
  ASSERT_EQ(configs.size(), 3u);
  for (const std::string& config : configs) {
    SCOPED_TRACE(config);
    const BinaryRun run = run_binary({"plan", config, "--machine", "dgx-h200", "--fold", "--json"});
    ASSERT_EQ(run.exit_code, 0) << run.output;
    const nlohmann::json plan = nlohmann::json::parse(run.output);
    const ReadmeRow row = readme_row(config);
    EXPECT_EQ(plan["ranks"], row.ranks);
    expect_near(row.step_ms, plan["step_ms"], "ms");
    expect_near(row.tokens_per_s, plan["tokens_per_s_per_rank"], "tokens/s");
    expect_near(row.peak_gb, 1e-9 * plan["peak_bytes"].get<double>(), "GB");
    // Uneven loads take more memory and time than the uniform ones planned for.
    EXPECT_LT(plan["peak_bytes"].get<double>(), 0.9 * plan["device_bytes"].get<double>());
  }
}

// A build with kernels would ask for a GPU: there the reference is named.
BinaryRun check_one_host(std::vector<std::string> more) {
  std::vector<std::string> arguments{"check", "configs/qwen3-30b-a3b-1x8.toml", "--seeds", "1"};
  if (kHasCuda) more.insert(more.end(), {"--set", "run.device=cpu"});
  arguments.insert(arguments.end(), more.begin(), more.end());
  return run_binary(arguments);
}

TEST(Examples, TheTwinOfOneHostHasOneRanksBits) {
  const BinaryRun run = check_one_host({});
  EXPECT_EQ(run.exit_code, 0) << run.output;
  EXPECT_NE(run.output.find("a small twin"), std::string::npos) << run.output;
  EXPECT_NE(run.output.find("pp 2, dp 4, cp 1, ep 4"), std::string::npos) << run.output;
  const bool says_reference = run.output.find("no CUDA kernels") != std::string::npos;
  EXPECT_EQ(says_reference, !kHasCuda) << run.output;
}

TEST(Examples, AFaultOfTheTwinIsFoundAndMadeSmaller) {
  const BinaryRun run =
      check_one_host({"--set", "parallel.pp=1", "--set", "faults=[{kind=\"rng_rank\",rank=1}]"});
  EXPECT_EQ(run.exit_code, 51) << run.output;
  EXPECT_NE(run.output.find("--set 'model.layers=1' --schedule fifo"), std::string::npos)
      << run.output;
}

}  // namespace
}  // namespace cambium
