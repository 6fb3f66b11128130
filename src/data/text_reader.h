// Documents from text sources, streamed: .txt, .jsonl, and both compressed as .zst.
//
// .txt    A form feed (0x0C) ends a document; a file without one is one document. Every other byte
//         is kept: NUL, CRLF and invalid UTF-8 are the tokenizer's business.
// .jsonl  One object a line ({"text": "..."}; other keys are ignored), LF or CRLF. Lines of white
//         space are skipped. A record's number is its line's.
// .zst    zstd frames; more than 200 bytes of text per compressed byte is refused as a bomb.
// Empty documents are skipped. Bad input is exit 32 with the record's number and the byte offset in
// the (decompressed) text; a file that cannot be read is exit 31, a missing one 32.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace cambium {

struct TextDocument {
  std::string text;
  int64_t record = 0;       // from 1: the document's number in a .txt, the line in a .jsonl
  int64_t byte_offset = 0;  // of the record's first byte in the source
};

// Whether a path's ending names a text source (not: a token file, or an unknown ending).
enum class SourceKind { text, jsonl, token_file, unknown };
SourceKind source_kind(const std::string& path);

class TextReader {
 public:
  explicit TextReader(const std::string& path);
  ~TextReader();
  TextReader(const TextReader&) = delete;
  TextReader& operator=(const TextReader&) = delete;

  enum class Step { document, end };
  Step next(TextDocument& document);

 private:
  Step next_text(TextDocument& document);
  Step next_line(TextDocument& document);
  std::string path_;
  SourceKind kind_;
  int64_t record_ = 0;
  std::unique_ptr<class ByteSource> bytes_;
};

}  // namespace cambium
