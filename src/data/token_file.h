// Token files: one HDF5 file per source (design.md section 6), written once, read at random.
//
//   /tokens            u16, or u32 when the vocabulary needs it; contiguous; documents back to
//   back,
//                      each ended by eos
//   /document_offsets  u64 [documents + 1]: where documents start, and the number of tokens
//   /block_xxh3        u64: XXH3-64 of each 1 MiB of /tokens
//   attributes         format version token_count document_count vocab eos_id tokenizer
//                      tokenizer_hash source_hash
//
// Opening verifies everything once: sizes, hashes, ids below the vocabulary, offsets increasing and
// an eos at each document's end. Reads are then plain pread calls, without HDF5, from any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "src/data/tokenizer.h"

namespace cambium {

// An open token file. Immutable; shared by the ranks of a process.
class TokenFile {
 public:
  // Errors: 31 cannot be read, 30 damaged, 34 unsafe.
  static std::shared_ptr<const TokenFile> open(const std::string& path);
  ~TokenFile();
  TokenFile(const TokenFile&) = delete;
  TokenFile& operator=(const TokenFile&) = delete;

  const std::string& path() const { return path_; }
  int64_t token_count() const { return document_offsets_.back(); }
  int64_t document_count() const { return static_cast<int64_t>(document_offsets_.size()) - 1; }
  // Document d is [offsets[d], offsets[d + 1]), its last token being eos.
  const std::vector<int64_t>& document_offsets() const { return document_offsets_; }
  int64_t vocab() const { return vocab_; }
  int32_t eos() const { return eos_; }
  const std::string& tokenizer_name() const { return tokenizer_name_; }  // bytes, sentencepiece
  const std::string& tokenizer_hash() const { return tokenizer_hash_; }  // 32 hex digits
  const std::string& source_hash() const { return source_hash_; }        // 32 hex digits

  // Tokens [first, first + count). A read error is exit 31.
  void read(int64_t first, int64_t count, int32_t* out) const;

 private:
  TokenFile() = default;
  enum class Verdict { bad, good };
  void verify(const class Hdf5Reader& reader);
  void verify_tokens(const std::vector<uint64_t>& block_hashes) const;
  std::string path_;
  int descriptor_ = -1;
  int token_bytes_ = 0;
  uint64_t file_offset_bytes_ = 0;
  std::vector<int64_t> document_offsets_;
  int64_t vocab_ = 0;
  int32_t eos_ = 0;
  std::string tokenizer_name_, tokenizer_hash_, source_hash_;
};

struct TokenFileBuild {
  std::vector<std::string> source_paths;  // .txt .jsonl .txt.zst .jsonl.zst, read in this order
  std::string token_path;                 // replaced only when everything went well
};

// Tokenises the sources into one token file: temporary file, fsync, rename, fsync of the directory.
// Bad text is exit 32 with the record's number and byte offset; then nothing is left behind.
void build_token_file(const TokenFileBuild& build, const Tokenizer& tokenizer);
// The same into an output that the caller opened for `build.token_path`; commits it.
void write_token_file(const TokenFileBuild& build, const Tokenizer& tokenizer,
                      class OutputFile& output);

}  // namespace cambium
