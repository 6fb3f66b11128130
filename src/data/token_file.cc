// Reading and verifying token files; writing them from documents (token_file.h).
#include "src/data/token_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "src/base/check.h"
#include "src/base/digest.h"
#include "src/base/hdf5_file.h"
#include "src/data/output_file.h"
#include "src/data/text_reader.h"

namespace cambium {
namespace {

constexpr const char* kFormat = "cambium-tokens";
constexpr uint64_t kVersion = 1;
constexpr int64_t kBlockBytes = 1 << 20;  // of /tokens, hashed one by one
constexpr int64_t kMostVocab = int64_t{1} << 31;

int64_t block_count(int64_t token_count, int64_t token_bytes) {
  return (token_count * token_bytes + kBlockBytes - 1) / kBlockBytes;
}

Hdf5Type token_type(int64_t vocab) { return vocab <= 65536 ? Hdf5Type::u16 : Hdf5Type::u32; }

// Exactly `bytes` from `offset`.
void read_exactly(const std::string& path, int descriptor, void* out, int64_t bytes,
                  int64_t offset) {
  auto* cursor = static_cast<std::byte*>(out);
  while (bytes > 0) {
    const ssize_t got = pread(descriptor, cursor, static_cast<size_t>(bytes), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(ExitCode::io, "{}: cannot read: {}", path, std::strerror(errno));
    if (got == 0) fail(ExitCode::corrupt_file, "{}: ends early: it was cut while in use", path);
    cursor += got;
    offset += got;
    bytes -= got;
  }
}

void widen(const std::byte* raw, int token_bytes, int64_t count, int32_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    if (token_bytes == 2) {
      uint16_t token = 0;
      std::memcpy(&token, raw + i * 2, 2);
      out[i] = token;
    } else {
      std::memcpy(&out[i], raw + i * 4, 4);
    }
  }
}

}  // namespace

// ---- Reading.

TokenFile::~TokenFile() {
  if (descriptor_ >= 0) close(descriptor_);
}

std::shared_ptr<const TokenFile> TokenFile::open(const std::string& path) {
  std::shared_ptr<TokenFile> file(new TokenFile());
  file->path_ = path;
  const Hdf5Reader reader(path);
  if (reader.attribute_presence("format") == Hdf5Reader::Presence::absent ||
      reader.string_attribute("format") != kFormat)
    fail(ExitCode::corrupt_file,
         "{}: an HDF5 file, but not a Cambium token file; make one with "
         "`cambium data build`",
         path);
  if (const uint64_t version = reader.u64_attribute("version"); version != kVersion)
    fail(ExitCode::corrupt_file, "{}: token file version {}, this program reads {}; build it anew",
         path, version, kVersion);
  file->descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file->descriptor_ < 0) fail(ExitCode::io, "{}: cannot open: {}", path, std::strerror(errno));
  file->verify(reader);
  return file;
}

void TokenFile::verify(const Hdf5Reader& reader) {
  auto require = [&](Verdict verdict, const char* what) {
    if (verdict == Verdict::bad)
      fail(ExitCode::corrupt_file, "{}: damaged: {}; build it anew", path_, what);
  };
  auto is = [](auto condition) { return condition ? Verdict::good : Verdict::bad; };
  const uint64_t vocab = reader.u64_attribute("vocab");
  require(is(vocab >= 2 && vocab <= kMostVocab), "its vocabulary size");
  vocab_ = static_cast<int64_t>(vocab);
  const uint64_t eos = reader.u64_attribute("eos_id");
  require(is(eos < vocab), "its eos id is not below its vocabulary size");
  eos_ = static_cast<int32_t>(eos);
  tokenizer_name_ = reader.string_attribute("tokenizer");
  tokenizer_hash_ = reader.string_attribute("tokenizer_hash");
  source_hash_ = reader.string_attribute("source_hash");

  const Hdf5DatasetInfo tokens = reader.dataset_info("tokens");
  require(is(tokens.type == token_type(vocab_)), "the type of /tokens");
  require(is(tokens.storage == Hdf5Storage::contiguous), "/tokens is not contiguous");
  token_bytes_ = static_cast<int>(hdf5_type_bytes(tokens.type));
  file_offset_bytes_ = tokens.file_offset_bytes;
  const std::vector<uint64_t> offsets = reader.read_dataset<uint64_t>("document_offsets");
  require(is(offsets.size() >= 2 && offsets.front() == 0), "/document_offsets");
  require(is(offsets.back() == tokens.element_count), "/document_offsets does not end at /tokens");
  for (size_t i = 1; i < offsets.size(); ++i)
    require(is(offsets[i - 1] < offsets[i]), "/document_offsets does not increase");
  document_offsets_.assign(offsets.begin(), offsets.end());
  require(is(reader.u64_attribute("token_count") == offsets.back() &&
             reader.u64_attribute("document_count") == offsets.size() - 1),
          "its counts");
  verify_tokens(reader.read_dataset<uint64_t>("block_xxh3"));
}

void TokenFile::verify_tokens(const std::vector<uint64_t>& block_hashes) const {
  auto damaged = [&](const char* what, int64_t where) {
    fail(ExitCode::corrupt_file, "{}: damaged: {} {}; build it anew", path_, what, where);
  };
  if (static_cast<int64_t>(block_hashes.size()) != block_count(token_count(), token_bytes_))
    damaged("/block_xxh3 has the wrong length,", static_cast<int64_t>(block_hashes.size()));
  std::vector<std::byte> raw(static_cast<size_t>(kBlockBytes));
  std::vector<int32_t> tokens(static_cast<size_t>(kBlockBytes / token_bytes_));
  const int64_t total_bytes = token_count() * token_bytes_;
  size_t document = 1;  // the next document end
  for (int64_t first = 0; first < total_bytes; first += kBlockBytes) {
    const int64_t bytes = std::min(kBlockBytes, total_bytes - first);
    read_exactly(path_, descriptor_, raw.data(), bytes,
                 static_cast<int64_t>(file_offset_bytes_) + first);
    const int64_t block = first / kBlockBytes;
    if (xxh3_64(raw.data(), static_cast<size_t>(bytes)) != block_hashes[static_cast<size_t>(block)])
      damaged("the hash differs of block", block);
    const int64_t count = bytes / token_bytes_, first_token = first / token_bytes_;
    widen(raw.data(), token_bytes_, count, tokens.data());
    for (int64_t i = 0; i < count; ++i)
      if (tokens[static_cast<size_t>(i)] < 0 || tokens[static_cast<size_t>(i)] >= vocab_)
        damaged("an id that is not below the vocabulary size, token", first_token + i);
    for (; document < document_offsets_.size(); ++document) {
      const int64_t last = document_offsets_[document] - 1 - first_token;
      if (last >= count) break;
      if (tokens[static_cast<size_t>(last)] != eos_)
        damaged("no eos at the end of document", static_cast<int64_t>(document) - 1);
    }
  }
}

void TokenFile::read(int64_t first, int64_t count, int32_t* out) const {
  CHECK(first >= 0 && count >= 0 && first <= token_count() - count);
  constexpr int64_t kPieceTokens = 4096;
  std::byte raw[kPieceTokens * 4];
  for (int64_t done = 0; done < count; done += kPieceTokens) {
    const int64_t piece = std::min(kPieceTokens, count - done);
    read_exactly(path_, descriptor_, raw, piece * token_bytes_,
                 static_cast<int64_t>(file_offset_bytes_) + (first + done) * token_bytes_);
    widen(raw, token_bytes_, piece, out + done);
  }
}

// ---- Writing.

namespace {

// Tokens wait in an unlinked file: HDF5 wants the length of contiguous storage in advance.
class TokenSpool {
 public:
  TokenSpool(const std::string& path, Hdf5Type type) : path_(path), type_(type) {
    std::string name = path + ".spool-XXXXXX";
    const int descriptor = mkostemp(name.data(), O_CLOEXEC);
    if (descriptor >= 0) unlink(name.c_str());
    if (descriptor >= 0) file_ = fdopen(descriptor, "w+b");
    if (file_ == nullptr) fail(ExitCode::io, "{}: cannot create: {}", name, std::strerror(errno));
  }
  ~TokenSpool() { std::fclose(file_); }
  TokenSpool(const TokenSpool&) = delete;
  TokenSpool& operator=(const TokenSpool&) = delete;

  void append(const std::vector<int32_t>& tokens) {
    narrow_.clear();
    for (int32_t token : tokens) narrow_.push_back(static_cast<uint16_t>(token));
    const bool is_u16 = type_ == Hdf5Type::u16;
    const size_t written = is_u16 ? std::fwrite(narrow_.data(), 2, narrow_.size(), file_)
                                  : std::fwrite(tokens.data(), 4, tokens.size(), file_);
    if (written != tokens.size()) failed("write");
    token_count_ += static_cast<int64_t>(tokens.size());
  }
  int64_t token_count() const { return token_count_; }

  // Copies the tokens into /tokens; returns the hashes of its blocks.
  std::vector<uint64_t> copy_to(Hdf5Writer& writer) {
    writer.create_dataset("tokens", type_, Hdf5Storage::contiguous,
                          static_cast<uint64_t>(token_count_));
    if (std::fflush(file_) != 0 || std::fseek(file_, 0, SEEK_SET) != 0) failed("write");
    const int64_t token_bytes = hdf5_type_bytes(type_), block_tokens = kBlockBytes / token_bytes;
    std::vector<std::byte> block(static_cast<size_t>(kBlockBytes));
    std::vector<uint64_t> hashes;
    for (int64_t first = 0; first < token_count_; first += block_tokens) {
      const auto count = static_cast<size_t>(std::min(block_tokens, token_count_ - first));
      const size_t bytes = count * static_cast<size_t>(token_bytes);
      if (std::fread(block.data(), 1, bytes, file_) != bytes) failed("read back");
      hashes.push_back(xxh3_64(block.data(), bytes));
      writer.write_range("tokens", type_, {static_cast<uint64_t>(first), count}, block.data());
    }
    return hashes;
  }

 private:
  [[noreturn]] void failed(const char* action) const {
    fail(ExitCode::io, "{}: cannot {} the tokens: {}; check the free space", path_, action,
         std::strerror(errno));
  }
  std::string path_;
  Hdf5Type type_;
  std::FILE* file_ = nullptr;
  int64_t token_count_ = 0;
  std::vector<uint16_t> narrow_;
};

struct TokenisedSources {
  std::vector<uint64_t> document_offsets{0};
  std::string source_hash;
};

TokenisedSources tokenise(const TokenFileBuild& build, const Tokenizer& tokenizer,
                          TokenSpool& spool) {
  TokenisedSources sources;
  Xxh3Stream source_hash;
  std::vector<int32_t> tokens;
  for (const std::string& path : build.source_paths) {
    TextReader reader(path);
    TextDocument document;
    while (reader.next(document) == TextReader::Step::document) {
      tokens.clear();
      const int64_t bad_offset = tokenizer.encode(document.text, tokens);
      if (bad_offset >= 0)
        fail(ExitCode::bad_corpus,
             "{}: record {}, byte {}: not valid UTF-8, which the {} tokenizer "
             "needs; repair the text or set data.tokenizer = \"bytes\"",
             path, document.record, document.byte_offset + bad_offset,
             tokenizer_kind_name(tokenizer.kind()));
      tokens.push_back(tokenizer.eos());
      spool.append(tokens);
      sources.document_offsets.push_back(static_cast<uint64_t>(spool.token_count()));
    }
    const Digest128 hash = xxh3_128_of_file(path);
    source_hash.update(&hash, sizeof(hash));
  }
  sources.source_hash = source_hash.digest().hex();
  if (sources.document_offsets.size() == 1)
    fail(ExitCode::bad_corpus, "{}: no text in it; name a file with text",
         build.source_paths.front());
  return sources;
}

}  // namespace

void build_token_file(const TokenFileBuild& build, const Tokenizer& tokenizer) {
  OutputFile output(build.token_path);
  write_token_file(build, tokenizer, output);
}

void write_token_file(const TokenFileBuild& build, const Tokenizer& tokenizer, OutputFile& output) {
  CHECK(!build.source_paths.empty());
  TokenSpool spool(build.token_path, token_type(tokenizer.vocab()));
  const TokenisedSources sources = tokenise(build, tokenizer, spool);
  Hdf5Writer writer(output.temporary_path());
  writer.write_attribute("format", kFormat);
  writer.write_attribute("version", kVersion);
  writer.write_attribute("token_count", static_cast<uint64_t>(spool.token_count()));
  writer.write_attribute("document_count", uint64_t{sources.document_offsets.size() - 1});
  writer.write_attribute("vocab", static_cast<uint64_t>(tokenizer.vocab()));
  writer.write_attribute("eos_id", static_cast<uint64_t>(tokenizer.eos()));
  writer.write_attribute("tokenizer", tokenizer_kind_name(tokenizer.kind()));
  writer.write_attribute("tokenizer_hash", tokenizer.hash().hex());
  writer.write_attribute("source_hash", sources.source_hash);
  const std::vector<uint64_t> hashes = spool.copy_to(writer);
  writer.write_dataset<uint64_t>("document_offsets", Hdf5Storage::checked,
                                 sources.document_offsets);
  writer.write_dataset<uint64_t>("block_xxh3", Hdf5Storage::checked, hashes);
  writer.close();
  output.commit();
}

}  // namespace cambium
