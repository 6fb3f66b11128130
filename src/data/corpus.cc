// The [data] section made into corpora: caching, checking and the held-out split (corpus.h).
#include "src/data/corpus.h"

#include <sys/stat.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "src/base/check.h"
#include "src/data/output_file.h"
#include "src/data/text_reader.h"

namespace cambium {

// ---- Corpus.

Corpus::Corpus(const std::vector<std::shared_ptr<const TokenFile>>& files) {
  for (const auto& file : files) {
    if (!parts_.empty()) CHECK_EQ(file->eos(), parts_.front().file->eos());
    add_part(file, 0, file->token_count());
  }
}

void Corpus::add_part(const std::shared_ptr<const TokenFile>& file, int64_t first, int64_t count) {
  if (!document_offsets_)
    document_offsets_ = std::make_shared<std::vector<int64_t>>(std::vector<int64_t>{0});
  const int64_t here = token_count();
  parts_.push_back({file, first, here, count});
  // Document ends within (first, first + count], and the part's end when it lies inside a document.
  const std::vector<int64_t>& ends = file->document_offsets();
  for (auto end = std::upper_bound(ends.begin(), ends.end(), first);
       end != ends.end() && *end < first + count; ++end)
    document_offsets_->push_back(*end - first + here);
  document_offsets_->push_back(here + count);
}

const std::vector<int64_t>& Corpus::document_offsets() const {
  CHECK(document_offsets_ != nullptr);
  return *document_offsets_;
}

int64_t Corpus::document_count() const {
  return document_offsets_ ? static_cast<int64_t>(document_offsets_->size()) - 1 : 0;
}

int32_t Corpus::eos() const {
  CHECK(!parts_.empty());
  return parts_.front().file->eos();
}

void Corpus::read(int64_t first, int64_t count, int32_t* out) const {
  CHECK(first >= 0 && count >= 0 && first <= token_count() - count);
  auto part = std::upper_bound(parts_.begin(), parts_.end(), first,
                               [](int64_t token, const Part& p) { return token < p.first_here; });
  if (count == 0) return;
  for (--part; count > 0; ++part) {
    const int64_t inside = first - part->first_here;
    const int64_t piece = std::min(count, part->token_count - inside);
    part->file->read(part->first_in_file + inside, piece, out);
    first += piece;
    out += piece;
    count -= piece;
  }
}

Corpus Corpus::cut(int64_t first, int64_t count) const {
  CHECK(first >= 0 && count >= 0 && first <= token_count() - count);
  Corpus result;
  for (const Part& part : parts_) {
    const int64_t begin = std::max(first, part.first_here);
    const int64_t end = std::min(first + count, part.first_here + part.token_count);
    if (begin < end)
      result.add_part(part.file, part.first_in_file + begin - part.first_here, end - begin);
  }
  return result;
}

// ---- Opening.

namespace {

constexpr const char* kQuickstartText = "data/quickstart.txt";

// Every source must be there before a tokenizer or a cache file is made.
void check_sources(const std::vector<std::string>& paths, const char* key) {
  for (const std::string& path : paths) {
    if (source_kind(path) == SourceKind::unknown)
      fail(ExitCode::bad_corpus,
           "{}: '{}' is no corpus: Cambium reads .txt .jsonl .txt.zst .jsonl.zst and .h5 token "
           "files; name such a file",
           key, path);
    struct stat status {};
    if (stat(path.c_str(), &status) == 0) {
      if (S_ISREG(status.st_mode)) continue;
      fail(ExitCode::bad_corpus, "{}: '{}' is not a regular file; name a file", key, path);
    }
    const bool is_quickstart = path.ends_with(kQuickstartText);
    fail(ExitCode::bad_corpus, "{}: '{}' does not exist; {}", key, path,
         is_quickstart ? "run scripts/setup.sh, which fetches it" : "check the path");
  }
}

std::vector<std::string> text_paths(const std::vector<std::string>& paths) {
  std::vector<std::string> texts;
  for (const std::string& path : paths)
    if (source_kind(path) != SourceKind::token_file) texts.push_back(path);
  return texts;
}

// The hash of the sources' content and of what is made from them.
std::string cache_key(const std::vector<std::string>& paths, const std::string& purpose) {
  Xxh3Stream hash;
  hash.update(purpose.data(), purpose.size());
  for (const std::string& path : paths) {
    const Digest128 content = xxh3_128_of_file(path);
    const auto kind = static_cast<uint8_t>(source_kind(path));
    const uint8_t compressed = path.ends_with(".zst") ? 1 : 0;
    hash.update(&content, sizeof(content));
    hash.update(&kind, 1);
    hash.update(&compressed, 1);
  }
  return hash.digest().hex();
}

Tokenizer trained_tokenizer(const DataOptions& options) {
  const std::vector<std::string> texts = text_paths(options.data.train);
  if (texts.empty())
    fail(ExitCode::usage,
         "data.tokenizer = \"sentencepiece\" with token files alone needs data.tokenizer_path: "
         "name the .model file that made them");
  const int64_t vocab =
      options.data.tokenizer_vocab > 0 ? options.data.tokenizer_vocab : options.model_vocab;
  const std::string key = cache_key(texts, fmt::format("sentencepiece bpe {}", vocab));
  const std::string path = fmt::format("{}/{}.model", options.cache_directory, key);
  struct stat status {};
  if (stat(path.c_str(), &status) != 0) {
    std::fprintf(stderr, "cambium: training a tokenizer of %lld pieces: %s\n",
                 static_cast<long long>(vocab), path.c_str());
    train_sentencepiece(
        {.text_paths = texts, .vocab = vocab, .model_path = path, .existing = ExistingModel::keep});
  }
  return Tokenizer::load_sentencepiece(path);
}

// The token file of one text source, built unless it is in the cache.
std::shared_ptr<const TokenFile> cached_tokens(const std::string& source,
                                               const Tokenizer& tokenizer,
                                               const DataOptions& options) {
  const std::string key = cache_key({source}, "tokens 1 " + tokenizer.hash().hex());
  const std::string path = fmt::format("{}/{}.h5", options.cache_directory, key);
  struct stat status {};
  if (stat(path.c_str(), &status) == 0) {
    try {
      return TokenFile::open(path);
    } catch (const Error& error) {
      // A cache is made anew from its source: nothing is lost, and the cause is said.
      if (error.exit_code() != ExitCode::corrupt_file) throw;
      std::fprintf(stderr, "cambium: %s\n", error.what());
      std::remove(path.c_str());
    }
  }
  OutputFile output(path);
  if (output.existing() == OutputFile::Existing::no) {
    std::fprintf(stderr, "cambium: tokenising %s into %s\n", source.c_str(), path.c_str());
    write_token_file({.source_paths = {source}, .token_path = path}, tokenizer, output);
  }
  return TokenFile::open(path);
}

void check_same_tokenizer(const TokenFile& file, const Tokenizer& tokenizer) {
  if (file.tokenizer_hash() == tokenizer.hash().hex() && file.vocab() == tokenizer.vocab()) return;
  fail(ExitCode::bad_corpus,
       "{}: made by another tokenizer ({}, hash {}) than the configured one ({}, hash {}); set "
       "data.tokenizer and data.tokenizer_path to that one, or build the file anew",
       file.path(), file.tokenizer_name(), file.tokenizer_hash(),
       tokenizer_kind_name(tokenizer.kind()), tokenizer.hash().hex());
}

Corpus open_corpus(const std::vector<std::string>& paths, const Tokenizer& tokenizer,
                   const DataOptions& options) {
  std::vector<std::shared_ptr<const TokenFile>> files;
  for (const std::string& path : paths) {
    const bool is_token_file = source_kind(path) == SourceKind::token_file;
    files.push_back(is_token_file ? TokenFile::open(path)
                                  : cached_tokens(path, tokenizer, options));
    check_same_tokenizer(*files.back(), tokenizer);
  }
  return Corpus(files);
}

// The first token of the held-out tail.
int64_t tail_begin(const Corpus& corpus, const DataOptions& options) {
  const int64_t total = corpus.token_count();
  const auto wanted = std::max<int64_t>(
      static_cast<int64_t>(std::ceil(options.data.validation_fraction * double(total))),
      options.sequence_length + 1);
  if (total < wanted + options.sequence_length + 1)
    fail(ExitCode::bad_corpus,
         "data.train: {} tokens are too few to hold out {} for validation and keep one sequence of "
         "{}; give more text, name data.validation, or set data.validation_fraction = 0",
         total, wanted, options.sequence_length);
  const std::vector<int64_t>& offsets = corpus.document_offsets();
  const auto after = std::upper_bound(offsets.begin(), offsets.end(), total - wanted);
  const int64_t begin = *(after - 1);
  return begin > options.sequence_length ? begin : total - wanted;
}

}  // namespace

Tokenizer open_tokenizer(const DataOptions& options) {
  check_sources(options.data.train, "data.train");
  Tokenizer tokenizer;
  if (options.data.tokenizer == TokenizerKind::sentencepiece)
    tokenizer = options.data.tokenizer_path.empty()
                    ? trained_tokenizer(options)
                    : Tokenizer::load_sentencepiece(options.data.tokenizer_path);
  if (tokenizer.vocab() > options.model_vocab)
    fail(ExitCode::usage,
         "model.vocab = {} is below the {} ids of data.tokenizer = \"{}\"; set model.vocab to at "
         "least {}",
         options.model_vocab, tokenizer.vocab(), tokenizer_kind_name(tokenizer.kind()),
         tokenizer.vocab());
  return tokenizer;
}

TrainingData open_data(const DataOptions& options) {
  CHECK_GT(options.sequence_length, 0);
  if (options.data.train.empty())
    fail(ExitCode::bad_corpus, "data.train names no file; name a text, JSONL or token file");
  check_sources(options.data.train, "data.train");
  check_sources(options.data.validation, "data.validation");
  TrainingData result;
  result.tokenizer = open_tokenizer(options);
  result.train = open_corpus(options.data.train, result.tokenizer, options);
  if (!options.data.validation.empty()) {
    result.validation = open_corpus(options.data.validation, result.tokenizer, options);
  } else if (options.data.validation_fraction > 0) {
    const Corpus all = result.train;
    const int64_t begin = tail_begin(all, options);
    result.train = all.cut(0, begin);
    result.validation = all.cut(begin, all.token_count() - begin);
  }
  return result;
}

}  // namespace cambium
