// A trained model named on the command line: a run directory, a checkpoint, or a Hugging Face
// directory; its configuration, weights and tokenizer.
#pragma once

#include <memory>
#include <string>

#include "src/base/io.h"
#include "src/checkpoint/tensor_source.h"
#include "src/cli/commands.h"
#include "src/config/config.h"
#include "src/data/corpus.h"
#include "src/train/generate.h"

namespace cambium {

struct LoadedModel {
  Config config;  // the run's, or for a Hugging Face directory defaults around its config.json
  std::unique_ptr<TensorSource> weights;
  Tokenizer tokenizer;
  int64_t step = 0;  // of the checkpoint; 0 for a Hugging Face directory
};

// Exit 2 when `source.path` is none of the three.
LoadedModel load_model(FileSystem& files, const ModelSource& source);

// `device` is "cpu", "cuda" or, for the run's own, empty; refuses one that this build lacks.
void set_device(Config& config, const std::string& device);

DataOptions data_options(const Config& config);

// Runs generate_on_rank on one simulated rank.
std::string generate_text(const Config& config, TensorSource& weights, const Tokenizer& tokenizer,
                          const GenerateRequest& request);

}  // namespace cambium
