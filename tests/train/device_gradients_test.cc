// Loss and gradients of whole models on the GPU against the CPU's in bf16 storage.
//
// Every expert is chosen for every token: with fewer, a token whose router scores lie within
// rounding of each other takes another expert on one of the two, and whole rows of gradients move.
// Then what is left is the order of sums, which the CPU has in many too: the bars are twice what
// it differs from itself in when its blocks are cut otherwise.
#include <gtest/gtest.h>

#include <cmath>

#include "kernels/cuda_stream.h"
#include "tests/train/run_trace.h"

namespace cambium::test {

namespace {

// Of the loss the relative error, of a tensor's gradient relative L2. Other blocks: 6e-6, 1.0e-2.
constexpr double kLossBar = 2e-5, kGradientBar = 2.2e-2;

bool has_gpu() {
  if constexpr (kHasCuda) return cuda::device_count() > 0;
  return false;
}

struct StepGradients {
  double loss = 0;
  std::map<std::string, std::vector<float>> gradients;
};

StepGradients step_gradients(Config config, DeviceKind device) {
  config.run.device = device;
  const SyntheticSequences source(config);
  StepGradients result;
  launch_ranks({.ranks = 1, .device = device, .poison = Poison::on},
               [&](RankEnvironment& environment) {
                 Rank rank(config, environment);
                 TrainStep step(rank, config.model);
                 step.model().initialize(config.run.seed);
                 rank.finish_step();
                 step.accumulate(source, 0);
                 result.gradients = step.owned_gradients();
                 result.loss = step.update(1, 1e-3, WithDigests::no).loss;
               });
  return result;
}

// The quickstart model's shapes; the GPU sums attention in tiles of 128 positions, the CPU in
// blocks.
std::vector<Config> all_expert_models() {
  Config config = parse_config(
      "[model]\npreset = \"quickstart\"\ntop_k = 8\n[train]\nglobal_batch_sequences = 4\n"
      "micro_batch_sequences = 2\nsequence_length = 128\n[numerics]\ncompute = \"bf16\"\n"
      "reduction = \"fast\"\nblock_tokens = 128\n[balance]\nloss = \"sequence\"\n"
      "z_loss_weight = 0.001\n",
      "all_expert_models", {});
  std::vector<Config> models(3, config);
  models[1].model.family = ModelFamily::mixtral;
  models[1].model.qk_norm = QkNorm::none;
  models[2].model.family = ModelFamily::olmoe;
  models[2].model.qk_norm = QkNorm::full_width;
  models[2].model.normalize_top_k = false;
  return models;
}

double relative_l2(const std::vector<float>& actual, const std::vector<float>& want) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double gap = static_cast<double>(actual[i]) - want[i];
    difference += gap * gap;
    norm += static_cast<double>(want[i]) * want[i];
  }
  return std::sqrt(difference / norm);
}

struct GradientGap {
  double loss = 0, gradient = 0;
  std::string worst;
};
GradientGap gap(const StepGradients& actual, const StepGradients& want) {
  GradientGap result{.loss = std::abs(actual.loss / want.loss - 1), .worst = {}};
  CHECK_EQ(actual.gradients.size(), want.gradients.size());
  for (const auto& [name, gradient] : want.gradients) {
    const double error = relative_l2(actual.gradients.at(name), gradient);
    if (!(error <= result.gradient)) result.gradient = error, result.worst = name;
  }
  return result;
}

TEST(DeviceGradients, OtherBlocksOnTheCpuAreWithinHalfTheBars) {
  for (const Config& model : all_expert_models()) {
    Config cut = model;
    cut.numerics.block_tokens = 32;
    const GradientGap found =
        gap(step_gradients(cut, DeviceKind::cpu), step_gradients(model, DeviceKind::cpu));
    EXPECT_LE(found.loss, kLossBar / 2);
    EXPECT_LE(found.gradient, kGradientBar / 2) << found.worst;
  }
}

TEST(DeviceGradients, CudaFollowsTheCpuInBf16Storage) {
  if (!has_gpu()) GTEST_SKIP() << "skipped: no GPU";
  for (const Config& model : all_expert_models()) {
    const StepGradients want = step_gradients(model, DeviceKind::cpu);
    for (const ReductionMode reduction : {ReductionMode::fast, ReductionMode::exact}) {
      Config config = model;
      config.numerics.reduction = reduction;
      const GradientGap found = gap(step_gradients(config, DeviceKind::cuda), want);
      fmt::print("{} {}: loss {:.1e}, worst gradient {:.1e} {}\n", choice_name(model.model.family),
                 choice_name(reduction), found.loss, found.gradient, found.worst);
      EXPECT_LE(found.loss, kLossBar);
      EXPECT_LE(found.gradient, kGradientBar) << found.worst;
    }
  }
}

TEST(DeviceGradients, MustFailWithTwiceTheZLoss) {
  const Config model = all_expert_models().front();
  Config other = model;
  other.balance.z_loss_weight *= 2;
  const GradientGap found =
      gap(step_gradients(other, DeviceKind::cpu), step_gradients(model, DeviceKind::cpu));
  EXPECT_GT(found.gradient, kGradientBar) << found.worst;
}

}  // namespace

}  // namespace cambium::test
