// HDF5 files through the C API: a writer and a strict reader of datasets and root attributes.
//
// Only what Cambium's own files need (design.md section 6): datasets at the root, of one to four
// axes and of fixed integer and float types, contiguous or chunked with fletcher32, and string, u64
// and f64 attributes. Ranges count elements in row-major order, whole rows of one axis at a time.
// The library's newest format is written, whose metadata carries checksums. Every return is
// checked. NOTE: the file format's parser is not safe against hostile files. Callers with a
// recorded hash verify it before opening; the reader refuses whatever could reach outside the file
// (exit 34) and checks sizes with overflow-safe arithmetic against the file before it allocates
// (exit 30). Writing never renames or syncs: the caller owns the temporary name, fsync and rename.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace cambium {

enum class Hdf5Type { u8, u16, u32, u64, i32, f32, f64 };
// `checked` = chunks of at most 1 MiB with a fletcher32 checksum each; `contiguous` = one run of
// bytes whose place in the file `Hdf5DatasetInfo::file_offset_bytes` tells.
enum class Hdf5Storage { contiguous, checked };

int64_t hdf5_type_bytes(Hdf5Type type);
const char* hdf5_type_name(Hdf5Type type);

template <class T>
constexpr Hdf5Type hdf5_type_of() {
  if constexpr (std::is_same_v<T, uint8_t>) return Hdf5Type::u8;
  if constexpr (std::is_same_v<T, uint16_t>) return Hdf5Type::u16;
  if constexpr (std::is_same_v<T, uint32_t>) return Hdf5Type::u32;
  if constexpr (std::is_same_v<T, uint64_t>) return Hdf5Type::u64;
  if constexpr (std::is_same_v<T, int32_t>) return Hdf5Type::i32;
  if constexpr (std::is_same_v<T, float>) return Hdf5Type::f32;
  if constexpr (std::is_same_v<T, double>) return Hdf5Type::f64;
}

struct Hdf5DatasetInfo {
  Hdf5Type type = Hdf5Type::u8;
  Hdf5Storage storage = Hdf5Storage::contiguous;
  uint64_t element_count = 0;
  std::vector<uint64_t> extents;   // their product is element_count
  uint64_t file_offset_bytes = 0;  // contiguous and not empty: where the elements lie in the file
};

// Elements [first, first + count) of a dataset.
struct Hdf5Range {
  uint64_t first_index = 0;
  uint64_t element_count = 0;
};

// A whole HDF5 file in memory, for callers that write files themselves (checkpoint.h).
class Hdf5Image {
 public:
  Hdf5Image() = default;
  ~Hdf5Image();
  Hdf5Image(const Hdf5Image&) = delete;
  Hdf5Image& operator=(const Hdf5Image&) = delete;
  // The file's bytes, once its writer is closed.
  std::span<const std::byte> bytes() const;
  // For the writer: the block with room for `bytes`, moved if need be; null when there is none.
  void* resize(size_t bytes);

 private:
  void* data_ = nullptr;
  size_t capacity_bytes_ = 0;
};

// Writes one new file. The destructor of a writer that was not closed abandons the file as it is.
class Hdf5Writer {
 public:
  // Creates `path`, which must not exist. Errors: exit 31.
  explicit Hdf5Writer(const std::string& path);
  // Writes into `image`, which outlives the writer and is empty. Room for `expected_bytes` is
  // allocated at a time.
  Hdf5Writer(Hdf5Image& image, int64_t expected_bytes);
  ~Hdf5Writer();
  Hdf5Writer(const Hdf5Writer&) = delete;
  Hdf5Writer& operator=(const Hdf5Writer&) = delete;

  void write_attribute(const char* name, std::string_view text);
  void write_attribute(const char* name, const char* text) {
    write_attribute(name, std::string_view(text));
  }
  void write_attribute(const char* name, uint64_t value);
  void write_attribute(const char* name, double value);

  // A dataset of one axis of `element_count` elements, or of several, to be filled by write_range.
  void create_dataset(const std::string& name, Hdf5Type type, Hdf5Storage storage,
                      uint64_t element_count) {
    create_dataset(name, type, storage, std::span<const uint64_t>(&element_count, 1));
  }
  void create_dataset(const std::string& name, Hdf5Type type, Hdf5Storage storage,
                      std::span<const uint64_t> extents);
  void write_range(const std::string& name, Hdf5Type type, Hdf5Range range, const void* data);
  // Both in one call.
  template <class T>
  void write_dataset(const std::string& name, Hdf5Storage storage, std::span<const T> data) {
    create_dataset(name, hdf5_type_of<T>(), storage, data.size());
    write_range(name, hdf5_type_of<T>(), {0, data.size()}, data.data());
  }

  // Flushes and closes; afterwards the file is complete, though not yet on the disk (fsync).
  void close();

 private:
  std::string path_;
  int64_t file_ = -1;
};

// Reads one file. Errors: 31 when it cannot be read, 30 when it is damaged, 34 when it holds
// something that Cambium does not read (links, external or virtual storage, filters, types, ranks).
class Hdf5Reader {
 public:
  explicit Hdf5Reader(const std::string& path);
  ~Hdf5Reader();
  Hdf5Reader(const Hdf5Reader&) = delete;
  Hdf5Reader& operator=(const Hdf5Reader&) = delete;
  const std::string& path() const { return path_; }
  uint64_t file_bytes() const { return file_bytes_; }

  enum class Presence { absent, present };
  Presence dataset_presence(const std::string& name) const;
  // Checks everything about the dataset of `axes` axes (0 = any number) that can be checked without
  // reading its elements.
  Hdf5DatasetInfo dataset_info(const std::string& name, int axes = 1) const;
  void read_range(const std::string& name, Hdf5Type type, Hdf5Range range, void* out) const;
  // The whole dataset, which must be of type T.
  template <class T>
  std::vector<T> read_dataset(const std::string& name) const {
    const Hdf5DatasetInfo info = expect_type(dataset_info(name), name, hdf5_type_of<T>());
    std::vector<T> elements(info.element_count);
    read_range(name, info.type, {0, info.element_count}, elements.data());
    return elements;
  }

  Presence attribute_presence(const char* name) const;
  std::string string_attribute(const char* name) const;
  uint64_t u64_attribute(const char* name) const;
  double f64_attribute(const char* name) const;

 private:
  Hdf5DatasetInfo expect_type(const Hdf5DatasetInfo& info, const std::string& name,
                              Hdf5Type type) const;
  std::string path_;
  uint64_t file_bytes_ = 0;
  int64_t file_ = -1;
};

}  // namespace cambium
