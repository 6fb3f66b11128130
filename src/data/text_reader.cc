// Streaming readers behind text_reader.h: bytes (plain or zstd), records, JSON lines.
#include "src/data/text_reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zstd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <vector>

#include "src/base/check.h"

namespace cambium {
namespace {

constexpr int64_t kMaxLineBytes = 64 << 20;
constexpr int64_t kMaxDocumentBytes = 256 << 20;
constexpr int64_t kMaxZstdRatio = 200;
constexpr int64_t kFreeZstdBytes = 1 << 20;  // below it no ratio is refused
constexpr int kMaxJsonDepth = 64;
constexpr int kMaxZstdWindowLog = 27;  // 128 MiB, zstd's own default limit

bool has_ending(const std::string& path, std::string_view ending) {
  return path.size() > ending.size() && std::string_view(path).ends_with(ending);
}

}  // namespace

SourceKind source_kind(const std::string& path) {
  if (has_ending(path, ".h5")) return SourceKind::token_file;
  if (has_ending(path, ".txt") || has_ending(path, ".txt.zst")) return SourceKind::text;
  if (has_ending(path, ".jsonl") || has_ending(path, ".jsonl.zst")) return SourceKind::jsonl;
  return SourceKind::unknown;
}

// The bytes of a source, decompressed, cut at a delimiter.
class ByteSource {
 public:
  explicit ByteSource(const std::string& path) : path_(path), plain_(kPlainBytes) {
    descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor_ < 0 && (errno == ENOENT || errno == ENOTDIR))
      fail(ExitCode::bad_corpus, "{}: no such file; check the path in [data]", path);
    if (descriptor_ < 0) fail(ExitCode::io, "{}: cannot open: {}", path, std::strerror(errno));
    struct stat status {};
    if (fstat(descriptor_, &status) != 0 || !S_ISREG(status.st_mode)) {
      close(descriptor_);
      fail(ExitCode::bad_corpus, "{}: not a regular file; name a text file in [data]", path);
    }
    if (has_ending(path, ".zst")) {
      raw_.resize(kRawBytes);
      zstd_ = ZSTD_createDStream();
      CHECK(zstd_ != nullptr);
      ZSTD_DCtx_setParameter(zstd_, ZSTD_d_windowLogMax, kMaxZstdWindowLog);
    }
  }
  ~ByteSource() {
    ZSTD_freeDStream(zstd_);
    close(descriptor_);
  }
  ByteSource(const ByteSource&) = delete;
  ByteSource& operator=(const ByteSource&) = delete;

  // Offset of the next byte.
  int64_t offset() const { return offset_; }
  int64_t record_start() const { return record_start_; }

  // Reads up to `delimiter`, which is consumed and left out, or to the end; false when nothing is
  // left. More than `most_bytes` is an error that names `record`.
  bool read_until(char delimiter, int64_t most_bytes, int64_t record, std::string& out) {
    out.clear();
    record_start_ = offset_;
    while (fill(record)) {
      const char* begin = plain_.data() + position_;
      const auto available = static_cast<size_t>(filled_ - position_);
      const auto* found = static_cast<const char*>(std::memchr(begin, delimiter, available));
      const size_t taken = found != nullptr ? static_cast<size_t>(found - begin) : available;
      if (static_cast<int64_t>(out.size() + taken) > most_bytes)
        fail(ExitCode::bad_corpus, "{}: record {}, byte {}: longer than {} bytes; split it", path_,
             record, record_start_, most_bytes);
      out.append(begin, taken);
      const size_t consumed = taken + (found != nullptr ? 1 : 0);
      position_ += static_cast<int64_t>(consumed);
      offset_ += static_cast<int64_t>(consumed);
      if (found != nullptr) return true;
    }
    return offset_ > record_start_;
  }

 private:
  // At least one plain byte is ready; false at the end of the source.
  bool fill(int64_t record) {
    if (position_ < filled_) return true;
    position_ = filled_ = 0;
    if (zstd_ == nullptr) {
      filled_ = read_raw(plain_);
      return filled_ > 0;
    }
    while (filled_ == 0) {
      if (input_.pos == input_.size) {
        const int64_t got = read_raw(raw_);
        if (got == 0) {
          if (frame_state_ != 0) bad_zstd(record, "the last frame is cut short");
          return false;
        }
        compressed_bytes_ += got;
        input_ = {raw_.data(), static_cast<size_t>(got), 0};
      }
      decompress(record);
    }
    return true;
  }

  void decompress(int64_t record) {
    ZSTD_outBuffer output{plain_.data(), plain_.size(), 0};
    frame_state_ = ZSTD_decompressStream(zstd_, &output, &input_);
    if (ZSTD_isError(frame_state_)) bad_zstd(record, ZSTD_getErrorName(frame_state_));
    filled_ = static_cast<int64_t>(output.pos);
    plain_bytes_ += filled_;
    if (plain_bytes_ > kFreeZstdBytes && plain_bytes_ / kMaxZstdRatio > compressed_bytes_)
      bad_zstd(record, "it expands more than 200 times, which no text does");
  }

  [[noreturn]] void bad_zstd(int64_t record, const char* reason) const {
    fail(ExitCode::bad_corpus, "{}: record {}, byte {}: zstd: {}; compress the text anew", path_,
         record, offset_, reason);
  }

  int64_t read_raw(std::vector<char>& out) const {
    while (true) {
      const ssize_t got = read(descriptor_, out.data(), out.size());
      if (got >= 0) return got;
      if (errno != EINTR) fail(ExitCode::io, "{}: cannot read: {}", path_, std::strerror(errno));
    }
  }

  static constexpr size_t kRawBytes = 1 << 16, kPlainBytes = 1 << 16;
  std::string path_;
  int descriptor_ = -1;
  ZSTD_DStream* zstd_ = nullptr;
  size_t frame_state_ = 0;  // 0 = between frames
  std::vector<char> raw_, plain_;
  ZSTD_inBuffer input_{nullptr, 0, 0};
  int64_t position_ = 0, filled_ = 0;  // of plain_
  int64_t offset_ = 0, record_start_ = 0;
  int64_t compressed_bytes_ = 0, plain_bytes_ = 0;
};

namespace {

// Takes the string under "text" of one object; refuses everything that is not such an object.
class TextHandler : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit TextHandler(std::string& text) : text_(text) {}
  const std::string& problem() const { return problem_; }
  size_t position() const { return position_; }
  bool has_text() const { return texts_ == 1; }

  bool null() override { return value("null"); }
  bool boolean(bool) override { return value("a boolean"); }
  bool number_integer(number_integer_t) override { return value("a number"); }
  bool number_unsigned(number_unsigned_t) override { return value("a number"); }
  bool number_float(number_float_t, const string_t&) override { return value("a number"); }
  bool binary(binary_t&) override { return value("binary"); }
  bool string(string_t& content) override {
    if (depth_ == 0) return value("a string");
    if (wants_text_) text_ = std::move(content);
    wants_text_ = false;
    return true;
  }
  bool key(string_t& name) override {
    wants_text_ = depth_ == 1 && name == "text";
    if (wants_text_ && ++texts_ > 1) return stop("the key \"text\" stands twice");
    return true;
  }
  bool start_object(std::size_t) override { return enter("an object"); }
  bool end_object() override { return leave(); }
  bool start_array(std::size_t) override {
    return depth_ == 0 ? value("an array") : enter("an array");
  }
  bool end_array() override { return leave(); }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::json::exception& error) override {
    position_ = position;
    const std::string_view what = error.what();
    const size_t start = what.find("syntax error");
    problem_ = start == std::string_view::npos ? what : what.substr(start);
    return false;
  }

 private:
  bool stop(std::string problem) {
    problem_ = std::move(problem);
    return false;
  }
  bool value(const char* kind) {
    if (depth_ == 0) return stop(fmt::format("{} where an object belongs", kind));
    if (wants_text_) return stop(fmt::format("\"text\" is {}, not a string", kind));
    return true;
  }
  bool enter(const char* kind) {
    if (wants_text_) return stop(fmt::format("\"text\" is {}, not a string", kind));
    if (++depth_ > kMaxJsonDepth) return stop("nested deeper than 64 levels");
    return true;
  }
  bool leave() {
    --depth_;
    return true;
  }

  std::string& text_;
  std::string problem_;
  size_t position_ = 0;
  int depth_ = 0;
  int texts_ = 0;
  bool wants_text_ = false;
};

}  // namespace

TextReader::TextReader(const std::string& path)
    : path_(path), kind_(source_kind(path)), bytes_(std::make_unique<ByteSource>(path)) {
  if (kind_ != SourceKind::text && kind_ != SourceKind::jsonl)
    fail(ExitCode::bad_corpus,
         "{}: not a text source; Cambium reads .txt .jsonl .txt.zst "
         ".jsonl.zst",
         path);
}

TextReader::~TextReader() = default;

TextReader::Step TextReader::next(TextDocument& document) {
  return kind_ == SourceKind::text ? next_text(document) : next_line(document);
}

TextReader::Step TextReader::next_text(TextDocument& document) {
  while (bytes_->read_until('\f', kMaxDocumentBytes, record_ + 1, document.text)) {
    document.record = ++record_;
    document.byte_offset = bytes_->record_start();
    if (!document.text.empty()) return Step::document;
  }
  return Step::end;
}

TextReader::Step TextReader::next_line(TextDocument& document) {
  std::string line;
  while (bytes_->read_until('\n', kMaxLineBytes, record_ + 1, line)) {
    document.record = ++record_;
    document.byte_offset = bytes_->record_start();
    document.text.clear();
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    TextHandler handler(document.text);
    bool good = nlohmann::json::sax_parse(line, &handler);
    if (good && handler.has_text()) {
      if (!document.text.empty()) return Step::document;
      continue;
    }
    const size_t position = handler.position() > 0 ? handler.position() - 1 : 0;
    fail(ExitCode::bad_corpus,
         "{}: record {}, byte {}: {}; each line must be an object with a "
         "\"text\" string",
         path_, record_, document.byte_offset + static_cast<int64_t>(position),
         good ? "no key \"text\"" : handler.problem());
  }
  return Step::end;
}

}  // namespace cambium
