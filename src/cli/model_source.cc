#include "src/cli/model_source.h"

#include "src/checkpoint/checkpoint.h"
#include "src/checkpoint/hf_config.h"
#include "src/checkpoint/hf_weights.h"
#include "src/cli/launch.h"
#include "src/train/train_run.h"

namespace cambium {

namespace {

Tokenizer named_tokenizer(const std::string& name) {
  return name == "bytes" ? Tokenizer() : Tokenizer::load_sentencepiece(name);
}

LoadedModel from_checkpoint(std::unique_ptr<CheckpointReader> reader, const ModelSource& source) {
  LoadedModel model;
  model.config = parse_config(reader->state().config, reader->path(), {});
  model.step = reader->state().step;
  model.tokenizer = source.tokenizer.empty() ? open_tokenizer(data_options(model.config))
                                             : named_tokenizer(source.tokenizer);
  model.weights = std::move(reader);
  return model;
}

LoadedModel from_hf(FileSystem& files, const ModelSource& source) {
  if (source.tokenizer.empty()) {
    fail(ExitCode::usage,
         "'{}' is a Hugging Face directory; next: name its tokenizer with "
         "--tokenizer bytes or --tokenizer FILE.model",
         source.path);
  }
  LoadedModel model;
  model.config.model = load_hf_config(source.path);
  model.config.train.sequence_length = std::min<int64_t>(model.config.model.max_positions, 1024);
  model.weights = std::make_unique<HfWeights>(files, source.path, model.config.model);
  model.tokenizer = named_tokenizer(source.tokenizer);
  return model;
}

}  // namespace

DataOptions data_options(const Config& config) {
  DataOptions options;
  options.data = config.data;
  options.model_vocab = config.model.vocab;
  options.sequence_length = config.train.sequence_length;
  return options;
}

LoadedModel load_model(FileSystem& files, const ModelSource& source) {
  auto exists = [&](const char* name) {
    return files.kind(source.path + "/" + name) != EntryKind::missing;
  };
  if (exists("manifest.json")) {
    return from_checkpoint(
        std::make_unique<CheckpointReader>(files, source.path, ShardCheck::at_open), source);
  }
  if (exists("checkpoints")) {
    NewestCheckpoint newest = open_newest_checkpoint(files, checkpoint_directory(source.path));
    for (const std::string& warning : newest.warnings) fmt::print(stderr, "{}\n", warning);
    if (newest.reader == nullptr) {
      fail(ExitCode::usage, "run directory '{}' has no completed checkpoint yet", source.path);
    }
    return from_checkpoint(std::move(newest.reader), source);
  }
  if (exists("config.json")) return from_hf(files, source);
  fail(ExitCode::usage,
       "'{}' is no run directory, checkpoint (manifest.json) or Hugging Face directory "
       "(config.json)",
       source.path);
}

void set_device(Config& config, const std::string& device) {
  if (device == "cpu") {
    config.run.device = DeviceKind::cpu;
    config.numerics.attention = AttentionKernel::own;
  }
  if (device == "cuda") {
    config.run.device = DeviceKind::cuda;
    config.numerics.compute = ComputeType::bf16;
  }
  check_device(config);
}

std::string generate_text(const Config& config, TensorSource& weights, const Tokenizer& tokenizer,
                          const GenerateRequest& request) {
  const Config single = single_rank_config(config);
  std::string text;
  const LaunchOptions launch{
      .ranks = 1, .device = config.run.device, .workers = config.run.workers};
  launch_ranks(launch, [&](RankEnvironment& environment) {
    text = generate_on_rank(environment, single, weights, tokenizer, request);
  });
  return text;
}

}  // namespace cambium
