// Safetensors: strict reader and deterministic writer of the Hugging Face tensor file.
//
// Layout: u64 little-endian header length n, n bytes of JSON {name: {dtype, shape, data_offsets}},
// then the data. The reader trusts nothing: header <= 16 MiB, <= 1e5 tensors, nesting <= 64, no
// name twice, products checked for overflow, and the tensors' byte ranges tile the data exactly (no
// overlap, no hole, no byte behind). Broken files exit 30; files built to mislead (sizes that
// overflow, headers beyond the cap, unsafe shard names) exit 34.
// https://huggingface.co/docs/safetensors
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "src/base/io.h"

namespace cambium {

constexpr int64_t kMostSafetensorsHeaderBytes = int64_t{16} << 20;
constexpr int64_t kMostSafetensorsTensors = 100000;
constexpr int kMostSafetensorsRank = 8;

enum class StoredType : uint8_t {
  boolean,
  u8,
  i8,
  i16,
  u16,
  f16,
  bf16,
  i32,
  u32,
  f32,
  f64,
  i64,
  u64
};
int64_t stored_type_bytes(StoredType type);
const char* stored_type_name(StoredType type);  // "BF16"

struct StoredTensor {
  std::string name;
  StoredType type = StoredType::f32;
  std::vector<int64_t> shape;
  int64_t elements = 0;
  int64_t file_offset = 0;  // of its first byte, from the start of the file
  int64_t bytes = 0;
};

// The checked header of a file: tensors in file order. `prefix` holds at least the file's first
// min(file_bytes, 8 + header length) bytes; `where` names the file in messages.
std::vector<StoredTensor> parse_safetensors_header(std::string_view prefix, int64_t file_bytes,
                                                   const std::string& where);

// Tensors by name from one file, or from the shards that `model.safetensors.index.json` lists.
// Data is read with pread, not mapped: a file cut short meanwhile is an error, not a signal.
class SafetensorsReader {
 public:
  // `path`: a .safetensors file. Links are followed (download caches are made of them).
  static SafetensorsReader open_file(FileSystem& files, const std::string& path);
  // `directory`: holds model.safetensors, or the index and its shards.
  static SafetensorsReader open_directory(FileSystem& files, const std::string& directory);

  // All tensors, by name.
  const std::map<std::string, StoredTensor>& tensors() const { return tensors_; }
  bool contains(const std::string& name) const { return tensors_.contains(name); }
  // The tensor, or exit 30 naming what is missing.
  const StoredTensor& at(const std::string& name) const;
  // Elements [first, first + count) as fp32. f16, bf16 and f32 convert exactly; others exit 30.
  void read_f32(const std::string& name, int64_t first, std::span<float> values);
  // Elements [first, first + count) of an i64 or i32 tensor.
  void read_i64(const std::string& name, int64_t first, std::span<int64_t> values);
  const std::string& where() const { return where_; }

 private:
  explicit SafetensorsReader(FileSystem& files) : files_(&files) {}
  void add_file(const std::string& path);

  FileSystem* files_;
  std::string where_;
  std::vector<File> open_files_;
  std::map<std::string, StoredTensor> tensors_;
  std::map<std::string, size_t> file_of_;  // index into open_files_
};

// Writes one file in a deterministic order (by name) through a temporary file, fsync and rename.
// Declare every tensor, then append each one's values in the order of `order()`.
class SafetensorsWriter {
 public:
  struct Declaration {
    std::string name;
    StoredType type = StoredType::f32;  // f32 or bf16
    std::vector<int64_t> shape;
  };
  SafetensorsWriter(FileSystem& files, std::string path, std::vector<Declaration> declarations);
  const std::vector<Declaration>& order() const { return declarations_; }
  // Values of the next tensor, or the next part of it; bf16 rounds to nearest even.
  void append(std::span<const float> values);
  // Every declared element is there: fsync, close, rename, fsync of the directory.
  void finish();

 private:
  FileSystem* files_;
  std::string path_;
  std::vector<Declaration> declarations_;
  File file_;
  size_t current_ = 0;  // declaration being filled
  int64_t filled_ = 0;  // elements of it
  std::vector<uint16_t> bf16_;
};

}  // namespace cambium
