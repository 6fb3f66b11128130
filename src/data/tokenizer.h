// Tokenizers: bytes (built in) and SentencePiece (library; trained here or given as a .model).
//
// bytes: ids 0..255 are the bytes, 256 ends a document; lossless on any input.
// SentencePiece: no normalisation, byte fallback, no dummy prefix, so decode(encode(text)) == text
// for valid UTF-8 text (U+2581, which the library reserves for the space, comes back as a space);
// other bytes are refused by `encode`. A document ends with the model's </s>.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "src/base/digest.h"
#include "src/config/config.h"

namespace cambium {

constexpr int64_t kByteTokenizerVocab = 257;
constexpr int32_t kByteTokenizerEos = 256;

// Immutable, cheap to copy; may be used from several threads.
class Tokenizer {
 public:
  // The bytes tokenizer.
  Tokenizer() = default;
  // Loads a .model file. Exit 2 in a build without SentencePiece, 31 when it cannot be read, 30
  // when it is damaged or has no byte fallback or no </s>.
  static Tokenizer load_sentencepiece(const std::string& model_path);

  TokenizerKind kind() const;
  int64_t vocab() const;  // ids are below it
  int32_t eos() const;    // ends every document
  // Of the model's bytes, or of the word "bytes": what token files and checkpoints remember.
  Digest128 hash() const;
  // The .model file of SentencePiece, empty for bytes.
  const std::string& model_path() const;

  // Appends the tokens of `text`, without eos. Returns the byte offset of the first byte that the
  // tokenizer cannot represent, -1 when all went well (always so for bytes).
  int64_t encode(std::string_view text, std::vector<int32_t>& tokens) const;
  // The text of `tokens`; eos and ids of no text (unknown, control) add nothing.
  std::string decode(std::span<const int32_t> tokens) const;
  // Bytes of text that a token stands for (0 for eos): bits per byte are counted with it.
  int64_t text_bytes(int32_t token) const;

 private:
  struct SentencePiece;
  std::shared_ptr<const SentencePiece> sentencepiece_;  // null = bytes
};

const char* tokenizer_kind_name(TokenizerKind kind);

enum class ExistingModel { keep, replace };

struct SentencePieceTraining {
  std::vector<std::string> text_paths;  // what open_corpus (text_reader.h) reads
  int64_t vocab = 1024;
  std::string model_path;                           // written by temporary file, fsync and rename
  ExistingModel existing = ExistingModel::replace;  // keep: another process may have made it
};

// Trains a BPE model: the same text gives the same model. Exit 2 in a build without SentencePiece
// or for a vocabulary that cannot be had, 32 for bad text.
void train_sentencepiece(const SentencePieceTraining& training);

}  // namespace cambium
