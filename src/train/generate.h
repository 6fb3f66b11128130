// Text from a model: one rank, the prompt and what was drawn so far evaluated anew for each token.
#pragma once

#include <string>

#include "src/checkpoint/tensor_source.h"
#include "src/config/config.h"
#include "src/data/tokenizer.h"
#include "src/train/train_step.h"

namespace cambium {

enum class DocumentEnd { stop, go_on };

struct GenerateRequest {
  std::string prompt;  // empty = the start of a document
  int64_t tokens = 200;
  double temperature = 0.8;  // 0 = the likeliest token
  int64_t top_k = 0;         // 0 = the whole vocabulary
  uint64_t seed = 1;
  DocumentEnd at_document_end = DocumentEnd::stop;
};

// The same model as one rank: dp = cp = pp = ep = 1, a batch of one sequence, no balance loss.
Config single_rank_config(const Config& config);

// Draws tokens on the only rank of `environment`; returns the text after the prompt. Beyond
// sequence_length tokens the window slides. The same request gives the same text.
std::string generate_on_rank(RankEnvironment& environment, const Config& single_rank,
                             TensorSource& weights, const Tokenizer& tokenizer,
                             const GenerateRequest& request);

}  // namespace cambium
