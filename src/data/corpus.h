// A corpus: the tokens that a run trains on or validates with, as one line of tokens.
//
// `open_data` turns the [data] section into a tokenizer and two corpora. Text and JSONL sources are
// tokenised once, into data/cache/<hash>.h5, the hash covering the source's content and the
// tokenizer; .h5 token files are used where they lie, and must come from the same tokenizer.
// Without `data.validation`, the validation corpus is the held-out tail of the training documents:
// the last documents that together hold at least `validation_fraction` of the tokens and at least
// one sequence. Where that would leave no training document, the last document is cut.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "src/data/token_file.h"

namespace cambium {

// Documents of token files, back to back. Immutable, cheap to copy, read from any thread.
class Corpus {
 public:
  Corpus() = default;
  explicit Corpus(const std::vector<std::shared_ptr<const TokenFile>>& files);
  int64_t token_count() const { return document_offsets_ ? document_offsets_->back() : 0; }
  int64_t document_count() const;
  // Where documents start, and the number of tokens. Every document ends with eos, but the last one
  // of a corpus that `cut` ended inside it.
  const std::vector<int64_t>& document_offsets() const;
  int32_t eos() const;
  // Tokens [first, first + count).
  void read(int64_t first, int64_t count, int32_t* out) const;
  // The corpus of tokens [first, first + count) of this one.
  Corpus cut(int64_t first, int64_t count) const;

 private:
  struct Part {
    std::shared_ptr<const TokenFile> file;
    int64_t first_in_file = 0;
    int64_t first_here = 0;
    int64_t token_count = 0;
  };
  void add_part(const std::shared_ptr<const TokenFile>& file, int64_t first, int64_t count);
  std::vector<Part> parts_;
  std::shared_ptr<std::vector<int64_t>> document_offsets_;
};

struct TrainingData {
  Tokenizer tokenizer;
  Corpus train;
  Corpus validation;  // empty when data.validation_fraction is 0 and no file is named
};

struct DataOptions {
  DataConfig data;
  int64_t model_vocab = 0;      // the tokenizer's ids must be below it
  int64_t sequence_length = 0;  // the held-out tail holds at least one sequence
  std::string cache_directory = "data/cache";
};

// Errors: 2 (vocabulary too small, tokenizer not in this build), 30, 31, 32 (missing or bad corpus;
// a missing quickstart corpus names scripts/setup.sh), 34.
TrainingData open_data(const DataOptions& options);
// The tokenizer alone, as `generate` needs it. It may train one, as open_data does.
Tokenizer open_tokenizer(const DataOptions& options);

}  // namespace cambium
