// The bytes tokenizer, and SentencePiece where it is linked (tokenizer.h).
#include "src/data/tokenizer.h"

#ifdef CAMBIUM_HAS_SENTENCEPIECE
#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>
#endif

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>

#include "src/base/check.h"
#include "src/data/output_file.h"
#include "src/data/text_reader.h"

namespace cambium {
namespace {

#ifndef CAMBIUM_HAS_SENTENCEPIECE
[[noreturn]] void not_in_this_build() {
  fail(ExitCode::usage,
       "data.tokenizer = \"sentencepiece\": this build has no SentencePiece; configure with "
       "-DCAMBIUM_SENTENCEPIECE=ON or set data.tokenizer = \"bytes\"");
}
#endif

}  // namespace

const char* tokenizer_kind_name(TokenizerKind kind) {
  return kind == TokenizerKind::bytes ? "bytes" : "sentencepiece";
}

#ifdef CAMBIUM_HAS_SENTENCEPIECE

namespace {

// Sentences given to the trainer: enough for a vocabulary, few enough for seconds on two cores.
constexpr int64_t kTrainingBytes = 16 << 20;
constexpr size_t kMaxSentenceBytes = 4096;
constexpr size_t kMaxModelBytes = 64 << 20;
constexpr std::string_view kSpaceMark = "\xE2\x96\x81";
constexpr int64_t kLeastVocab = 256 + 4;  // bytes, <unk> <s> </s>, and one piece

// The first byte of `text` that is not well-formed UTF-8; -1 = none.
int64_t first_invalid_utf8(std::string_view text) {
  size_t i = 0;
  auto continuation = [&](size_t at, int low, int high) {
    const int byte = at < text.size() ? static_cast<uint8_t>(text[at]) : 0;
    return byte >= low && byte <= high;
  };
  while (i < text.size()) {
    const int lead = static_cast<uint8_t>(text[i]);
    size_t more = 0;
    int low = 0x80, high = 0xBF;
    if (lead < 0x80) {
      ++i;
      continue;
    }
    if (lead >= 0xC2 && lead <= 0xDF) more = 1;
    if (lead >= 0xE0 && lead <= 0xEF) more = 2;
    if (lead >= 0xF0 && lead <= 0xF4) more = 3;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
    bool good = more > 0 && continuation(i + 1, low, high);
    for (size_t k = 2; k <= more; ++k) good = good && continuation(i + k, 0x80, 0xBF);
    if (!good) return static_cast<int64_t>(i);
    i += more + 1;
  }
  return -1;
}

}  // namespace

struct Tokenizer::SentencePiece {
  sentencepiece::SentencePieceProcessor processor;
  std::vector<std::string> text_of_token;
  int32_t eos = 0;
  Digest128 hash;
  std::string path;
};

namespace {

// The text that a piece stands for: the library writes the space as U+2581.
std::string piece_text(const sentencepiece::SentencePieceProcessor& processor, int token) {
  if (processor.IsControl(token) || processor.IsUnknown(token)) return "";
  const std::string& piece = processor.IdToPiece(token);
  if (processor.IsByte(token))  // "<0x0A>"
    return std::string(1, static_cast<char>(std::stoi(piece.substr(3, 2), nullptr, 16)));
  std::string text;
  for (size_t i = 0; i < piece.size();) {
    const bool is_space = piece.compare(i, kSpaceMark.size(), kSpaceMark) == 0;
    text.push_back(is_space ? ' ' : piece[i]);
    i += is_space ? kSpaceMark.size() : 1;
  }
  return text;
}

// The whole file; the cap keeps a wrong path from being read for minutes.
std::string read_model(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string bytes;
  if (file) bytes.resize(kMaxModelBytes);
  file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (bytes.empty() || file.bad())
    fail(ExitCode::io, "{}: cannot read the tokenizer: {}; check data.tokenizer_path", path,
         std::strerror(errno));
  bytes.resize(static_cast<size_t>(file.gcount()));
  return bytes;
}

}  // namespace

Tokenizer Tokenizer::load_sentencepiece(const std::string& model_path) {
  const std::string bytes = read_model(model_path);
  auto model = std::make_shared<SentencePiece>();
  auto& processor = model->processor;
  model->path = model_path;
  model->hash = xxh3_128(bytes.data(), bytes.size());
  const auto status = processor.LoadFromSerializedProto(bytes);
  if (!status.ok() || bytes.size() == kMaxModelBytes)
    fail(ExitCode::corrupt_file, "{}: not a SentencePiece model: {}", model_path,
         status.ToString());
  if (processor.eos_id() < 0 || !processor.IsControl(processor.eos_id()))
    fail(ExitCode::corrupt_file,
         "{}: the model has no </s> to end documents with; train one with `cambium tokenizer "
         "train`",
         model_path);
  if (!processor.IsByte(processor.PieceToId("<0x0A>")))
    fail(ExitCode::corrupt_file,
         "{}: the model has no byte fallback, so it would lose text; train one with `cambium "
         "tokenizer train`",
         model_path);
  for (int token = 0; token < processor.GetPieceSize(); ++token)
    model->text_of_token.push_back(piece_text(processor, token));
  model->eos = processor.eos_id();
  Tokenizer tokenizer;
  tokenizer.sentencepiece_ = std::move(model);
  return tokenizer;
}

namespace {

int64_t encode_pieces(const sentencepiece::SentencePieceProcessor& processor, std::string_view text,
                      std::vector<int32_t>& tokens) {
  if (const int64_t bad = first_invalid_utf8(text); bad >= 0) return bad;
  // Line by line, so that time and memory stay linear in long documents; a line keeps its newline.
  std::vector<int> ids;
  for (size_t first = 0; first < text.size();) {
    const size_t newline = text.find('\n', first);
    const size_t end = newline == std::string_view::npos ? text.size() : newline + 1;
    const auto status = processor.Encode(absl::string_view(text.data() + first, end - first), &ids);
    CHECK(status.ok());
    tokens.insert(tokens.end(), ids.begin(), ids.end());
    first = end;
  }
  return -1;
}

// Lines of the corpus: all of them, or every n-th when there are more than kTrainingBytes.
class TrainingLines : public sentencepiece::SentenceIterator {
 public:
  explicit TrainingLines(const std::vector<std::string>& paths) {
    int64_t total_bytes = 0;
    for_each_line(paths, [&](std::string_view line) { total_bytes += std::ssize(line); });
    const int64_t stride = total_bytes / kTrainingBytes + 1;
    int64_t number = 0;
    for_each_line(paths, [&](std::string_view line) {
      if (number++ % stride == 0) lines_.emplace_back(line);
    });
    if (lines_.empty())
      fail(ExitCode::bad_corpus, "{}: no text to train a tokenizer on", paths.front());
  }
  bool done() const override { return next_ == lines_.size(); }
  void Next() override { ++next_; }
  const std::string& value() const override { return lines_[next_]; }
  sentencepiece::util::Status status() const override { return {}; }

 private:
  template <class Body>
  static void for_each_line(const std::vector<std::string>& paths, Body&& body) {
    for (const std::string& path : paths) {
      TextReader reader(path);
      TextDocument document;
      while (reader.next(document) == TextReader::Step::document) {
        if (const int64_t bad = first_invalid_utf8(document.text); bad >= 0)
          fail(ExitCode::bad_corpus,
               "{}: record {}, byte {}: not valid UTF-8, which SentencePiece needs; repair the "
               "text or set data.tokenizer = \"bytes\"",
               path, document.record, document.byte_offset + bad);
        std::string_view rest = document.text;
        while (!rest.empty()) {
          const size_t end =
              std::min(rest.find_first_of(std::string_view("\n\r\0", 3)), rest.size());
          const std::string_view line = rest.substr(0, end);
          rest.remove_prefix(std::min(end + 1, rest.size()));
          if (!line.empty() && line.size() <= kMaxSentenceBytes) body(line);
        }
      }
    }
  }
  std::vector<std::string> lines_;
  size_t next_ = 0;
};

}  // namespace

void train_sentencepiece(const SentencePieceTraining& training) {
  if (training.vocab < kLeastVocab)
    fail(ExitCode::usage, "a SentencePiece vocabulary of {} is too small: at least {}",
         training.vocab, kLeastVocab);
  OutputFile output(training.model_path);
  if (training.existing == ExistingModel::keep && output.existing() == OutputFile::Existing::yes)
    return;
  TrainingLines lines(training.text_paths);
  std::string model;
  // Nothing is normalised, added or dropped, so that text survives encoding and decoding.
  const auto status = sentencepiece::SentencePieceTrainer::Train(
      {{"model_type", "bpe"},
       {"vocab_size", std::to_string(training.vocab)},
       {"byte_fallback", "true"},
       {"character_coverage", "0.9995"},
       {"normalization_rule_name", "identity"},
       {"remove_extra_whitespaces", "false"},
       {"add_dummy_prefix", "false"},
       {"max_sentence_length", std::to_string(kMaxSentenceBytes)},
       {"num_threads", "1"},
       {"minloglevel", "2"}},
      &lines, &model);
  if (!status.ok())
    fail(ExitCode::usage,
         "cannot train a SentencePiece vocabulary of {} on this text: {}; choose another "
         "data.tokenizer_vocab or give more text",
         training.vocab, status.ToString());
  std::ofstream file(output.temporary_path(), std::ios::binary);
  file << model;
  file.close();
  if (!file)
    fail(ExitCode::io, "{}: cannot write: {}", output.temporary_path(), std::strerror(errno));
  output.commit();
}

#else

struct Tokenizer::SentencePiece {
  std::vector<std::string> text_of_token;
  int processor = 0;
  int32_t eos = 0;
  Digest128 hash;
  std::string path;
};

namespace {

int64_t encode_pieces(int, std::string_view, std::vector<int32_t>&) { not_in_this_build(); }

}  // namespace

Tokenizer Tokenizer::load_sentencepiece(const std::string&) { not_in_this_build(); }
void train_sentencepiece(const SentencePieceTraining&) { not_in_this_build(); }

#endif

TokenizerKind Tokenizer::kind() const {
  return sentencepiece_ ? TokenizerKind::sentencepiece : TokenizerKind::bytes;
}

int64_t Tokenizer::vocab() const {
  return sentencepiece_ ? std::ssize(sentencepiece_->text_of_token) : kByteTokenizerVocab;
}

int32_t Tokenizer::eos() const { return sentencepiece_ ? sentencepiece_->eos : kByteTokenizerEos; }

Digest128 Tokenizer::hash() const {
  return sentencepiece_ ? sentencepiece_->hash : xxh3_128("bytes", 5);
}

const std::string& Tokenizer::model_path() const {
  static const std::string kNoPath;
  return sentencepiece_ ? sentencepiece_->path : kNoPath;
}

int64_t Tokenizer::encode(std::string_view text, std::vector<int32_t>& tokens) const {
  if (sentencepiece_) return encode_pieces(sentencepiece_->processor, text, tokens);
  for (char byte : text) tokens.push_back(static_cast<uint8_t>(byte));
  return -1;
}

std::string Tokenizer::decode(std::span<const int32_t> tokens) const {
  std::string text;
  for (int32_t token : tokens) {
    CHECK(token >= 0 && token < vocab());
    if (sentencepiece_) {
      text += sentencepiece_->text_of_token[static_cast<size_t>(token)];
    } else if (token != kByteTokenizerEos) {
      text.push_back(static_cast<char>(token));
    }
  }
  return text;
}

int64_t Tokenizer::text_bytes(int32_t token) const {
  CHECK(token >= 0 && token < vocab());
  if (sentencepiece_) return std::ssize(sentencepiece_->text_of_token[static_cast<size_t>(token)]);
  return token == kByteTokenizerEos ? 0 : 1;
}

}  // namespace cambium
