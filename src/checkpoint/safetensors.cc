#include "src/checkpoint/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "nlohmann/json.hpp"
#include "src/base/check.h"
#include "src/checkpoint/strict_json.h"

namespace cambium {
namespace {

using nlohmann::json;

static_assert(std::endian::native == std::endian::little, "safetensors is little-endian");

constexpr size_t kConvertElements = size_t{1} << 20;  // 2 MiB of stored halves at a time

struct StoredTypeRow {
  StoredType type;
  const char* name;
  int64_t bytes;
};

constexpr StoredTypeRow kStoredTypes[] = {
    {StoredType::boolean, "BOOL", 1}, {StoredType::u8, "U8", 1},   {StoredType::i8, "I8", 1},
    {StoredType::i16, "I16", 2},      {StoredType::u16, "U16", 2}, {StoredType::f16, "F16", 2},
    {StoredType::bf16, "BF16", 2},    {StoredType::i32, "I32", 4}, {StoredType::u32, "U32", 4},
    {StoredType::f32, "F32", 4},      {StoredType::f64, "F64", 8}, {StoredType::i64, "I64", 8},
    {StoredType::u64, "U64", 8},
};

const StoredTypeRow& row_of(StoredType type) {
  for (const StoredTypeRow& row : kStoredTypes) {
    if (row.type == type) return row;
  }
  CHECK(false);
  return kStoredTypes[0];
}

// What a header entry must be, with the tensor and the file in every message.
struct EntryParser {
  const std::string& where;
  const std::string& name;

  template <class... Values>
  [[noreturn]] void refuse(ExitCode code, fmt::format_string<Values...> format,
                           Values&&... values) const {
    fail(code, "'{}': tensor '{}': {}", where, name,
         fmt::format(format, std::forward<Values>(values)...));
  }

  int64_t natural(const json& value, const char* what) const {
    // NOTE: is_number_unsigned is false for -1 and 1.0, which the format does not allow.
    if (!value.is_number_unsigned() || value.get<uint64_t>() > uint64_t{INT64_MAX}) {
      refuse(ExitCode::corrupt_file, "{} holds something else than natural numbers", what);
    }
    return value.get<int64_t>();
  }

  const json& member(const json& entry, const char* key) const {
    if (!entry.is_object() || entry.size() != 3 || !entry.contains(key)) {
      refuse(ExitCode::corrupt_file, "its entry is not {{dtype, shape, data_offsets}}");
    }
    return entry.at(key);
  }

  StoredTensor parse(const json& entry) const {
    StoredTensor tensor;
    tensor.name = name;
    const json& dtype = member(entry, "dtype");
    const json& shape = member(entry, "shape");
    const json& offsets = member(entry, "data_offsets");
    const StoredTypeRow* row = nullptr;
    for (const StoredTypeRow& candidate : kStoredTypes) {
      if (dtype.is_string() && dtype.get_ref<const std::string&>() == candidate.name) {
        row = &candidate;
      }
    }
    if (row == nullptr) refuse(ExitCode::corrupt_file, "unknown dtype {}", dtype.dump());
    tensor.type = row->type;
    if (!shape.is_array() || shape.size() > kMostSafetensorsRank) {
      refuse(ExitCode::corrupt_file, "shape is not a list of at most {} numbers",
             kMostSafetensorsRank);
    }
    tensor.elements = 1;
    int64_t bytes = 0;
    for (const json& extent : shape) {
      tensor.shape.push_back(natural(extent, "shape"));
      if (__builtin_mul_overflow(tensor.elements, tensor.shape.back(), &tensor.elements)) {
        refuse(ExitCode::unsafe_file, "the product of its shape overflows");
      }
    }
    if (__builtin_mul_overflow(tensor.elements, row->bytes, &bytes)) {
      refuse(ExitCode::unsafe_file, "its size in bytes overflows");
    }
    if (!offsets.is_array() || offsets.size() != 2) {
      refuse(ExitCode::corrupt_file, "data_offsets is not a pair");
    }
    const int64_t begin = natural(offsets[0], "data_offsets");
    const int64_t end = natural(offsets[1], "data_offsets");
    if (end < begin || end - begin != bytes) {
      refuse(ExitCode::corrupt_file, "data_offsets [{}, {}] do not span its {} bytes", begin, end,
             bytes);
    }
    tensor.file_offset = begin;  // within the data until the header's length is added
    tensor.bytes = bytes;
    return tensor;
  }
};

void check_metadata(const json& metadata, const std::string& where) {
  bool strings = metadata.is_object();
  if (strings) {
    for (const auto& [key, value] : metadata.items()) strings = strings && value.is_string();
  }
  if (!strings) {
    fail(ExitCode::corrupt_file, "'{}': __metadata__ is not an object of strings", where);
  }
}

float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  const uint32_t exponent = (half >> 10) & 0x1f;
  const uint32_t fraction = half & 0x3ff;
  if (exponent == 0) {  // zero and subnormals: fraction * 2^-24, exact in fp32
    const float value = static_cast<float>(fraction) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
  }
  const uint32_t wide_exponent = exponent == 31 ? 255 : exponent + 112;
  return std::bit_cast<float>(sign | wide_exponent << 23 | fraction << 13);
}

uint16_t float_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void convert_half(StoredType type, const std::byte* source, std::span<float> values) {
  for (size_t i = 0; i < values.size(); ++i) {
    uint16_t half = 0;
    std::memcpy(&half, source + 2 * i, 2);
    values[i] =
        type == StoredType::f16 ? half_to_float(half) : std::bit_cast<float>(uint32_t{half} << 16);
  }
}

void check_range(const StoredTensor& tensor, int64_t first, int64_t count) {
  CHECK_GE(first, 0);
  CHECK_LE(count, tensor.elements - first);
}

}  // namespace

int64_t stored_type_bytes(StoredType type) { return row_of(type).bytes; }
const char* stored_type_name(StoredType type) { return row_of(type).name; }

std::vector<StoredTensor> parse_safetensors_header(std::string_view prefix, int64_t file_bytes,
                                                   const std::string& where) {
  uint64_t header_bytes = 0;
  if (file_bytes < 8 || prefix.size() < 8) {
    fail(ExitCode::corrupt_file, "'{}': {} bytes are too few for a safetensors file", where,
         file_bytes);
  }
  std::memcpy(&header_bytes, prefix.data(), 8);
  if (header_bytes > uint64_t{kMostSafetensorsHeaderBytes}) {
    fail(ExitCode::unsafe_file, "'{}': safetensors header of {} bytes, at most {} are accepted",
         where, header_bytes, kMostSafetensorsHeaderBytes);
  }
  const int64_t data_offset = 8 + static_cast<int64_t>(header_bytes);
  if (data_offset > file_bytes || prefix.size() < static_cast<size_t>(data_offset)) {
    fail(ExitCode::corrupt_file, "'{}': header of {} bytes in a file of {}; it is truncated", where,
         header_bytes, file_bytes);
  }
  const std::string_view header = prefix.substr(8, header_bytes);
  if (header.empty() || header.front() != '{') {
    fail(ExitCode::corrupt_file, "'{}': the safetensors header does not begin with '{{'", where);
  }
  const json root = parse_strict_json(header, where);
  if (root.size() > kMostSafetensorsTensors) {
    fail(ExitCode::unsafe_file, "'{}': {} tensors, at most {} are accepted", where, root.size(),
         kMostSafetensorsTensors);
  }
  std::vector<StoredTensor> tensors;
  for (const auto& [name, entry] : root.items()) {
    if (name == "__metadata__") {
      check_metadata(entry, where);
    } else {
      tensors.push_back(EntryParser{where, name}.parse(entry));
    }
  }
  std::stable_sort(tensors.begin(), tensors.end(),
                   [](const StoredTensor& left, const StoredTensor& right) {
                     return left.file_offset != right.file_offset
                                ? left.file_offset < right.file_offset
                                : left.bytes < right.bytes;  // empty tensors first
                   });
  int64_t covered = 0;
  for (StoredTensor& tensor : tensors) {
    if (tensor.file_offset != covered) {
      fail(ExitCode::corrupt_file, "'{}': tensor '{}' begins at data byte {}, expected {} ({})",
           where, tensor.name, tensor.file_offset, covered,
           tensor.file_offset < covered ? "overlap" : "hole");
    }
    if (tensor.bytes > file_bytes - data_offset - covered) {
      fail(ExitCode::corrupt_file, "'{}': tensor '{}' ends beyond the file; it is truncated", where,
           tensor.name);
    }
    covered += tensor.bytes;
    tensor.file_offset += data_offset;
  }
  if (covered != file_bytes - data_offset) {
    fail(ExitCode::corrupt_file, "'{}': {} bytes of data, the header describes {}", where,
         file_bytes - data_offset, covered);
  }
  return tensors;
}

SafetensorsReader SafetensorsReader::open_file(FileSystem& files, const std::string& path) {
  SafetensorsReader reader(files);
  reader.where_ = path;
  reader.add_file(path);
  return reader;
}

SafetensorsReader SafetensorsReader::open_directory(FileSystem& files,
                                                    const std::string& directory) {
  const std::string single = directory + "/model.safetensors";
  if (files.kind(single) != EntryKind::missing) return open_file(files, single);
  const std::string index_path = directory + "/model.safetensors.index.json";
  if (files.kind(index_path) == EntryKind::missing) {
    fail(ExitCode::usage,
         "'{}' holds neither model.safetensors nor model.safetensors.index.json; name a directory "
         "with Hugging Face weights",
         directory);
  }
  const json index =
      parse_strict_json(files.read_file(index_path, kMostJsonBytes, Symlinks::follow), index_path);
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
    fail(ExitCode::corrupt_file, "'{}': there is no object weight_map", index_path);
  }
  SafetensorsReader reader(files);
  reader.where_ = directory;
  std::map<std::string, size_t> shards;
  for (const auto& [tensor, shard] : index["weight_map"].items()) {
    if (!shard.is_string() || !is_plain_file_name(shard.get_ref<const std::string&>())) {
      fail(ExitCode::unsafe_file, "'{}': tensor '{}' lies in {}, which is not a plain file name",
           index_path, tensor, shard.dump());
    }
    shards.emplace(shard.get<std::string>(), 0);
  }
  for (auto& [name, file] : shards) {
    const std::string path = directory + "/" + name;
    if (files.kind(path) == EntryKind::missing) {
      fail(ExitCode::corrupt_file, "'{}' names '{}', which is missing", index_path, name);
    }
    file = reader.open_files_.size();
    reader.add_file(path);
  }
  for (const auto& [tensor, shard] : index["weight_map"].items()) {
    const auto found = reader.file_of_.find(tensor);
    if (found == reader.file_of_.end() || found->second != shards.at(shard.get<std::string>())) {
      fail(ExitCode::corrupt_file, "'{}': tensor '{}' is not in '{}'", index_path, tensor,
           shard.get<std::string>());
    }
  }
  return reader;
}

void SafetensorsReader::add_file(const std::string& path) {
  File file = files_->open(path, Symlinks::follow);
  const int64_t file_bytes = files_->size_bytes(file);
  uint64_t header_bytes = 0;
  if (file_bytes >= 8) files_->read_at(file, 0, &header_bytes, 8);
  header_bytes = std::min<uint64_t>(header_bytes, kMostSafetensorsHeaderBytes);
  const int64_t prefix_bytes =
      std::min<int64_t>(file_bytes, 8 + static_cast<int64_t>(header_bytes));
  std::string prefix(static_cast<size_t>(prefix_bytes), '\0');
  files_->read_at(file, 0, prefix.data(), prefix_bytes);
  for (StoredTensor& tensor : parse_safetensors_header(prefix, file_bytes, path)) {
    const std::string name = tensor.name;
    if (!tensors_.emplace(name, std::move(tensor)).second) {
      fail(ExitCode::corrupt_file, "'{}': tensor '{}' is in an earlier shard too", path, name);
    }
    file_of_[name] = open_files_.size();
  }
  open_files_.push_back(std::move(file));
}

const StoredTensor& SafetensorsReader::at(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) {
    fail(ExitCode::corrupt_file, "'{}' has no tensor '{}'; is config.json of another model?",
         where_, name);
  }
  return found->second;
}

void SafetensorsReader::read_f32(const std::string& name, int64_t first, std::span<float> values) {
  const StoredTensor& tensor = at(name);
  check_range(tensor, first, static_cast<int64_t>(values.size()));
  if (tensor.type != StoredType::f32 && tensor.type != StoredType::f16 &&
      tensor.type != StoredType::bf16) {
    fail(ExitCode::corrupt_file, "'{}': tensor '{}' is stored as {}; F32, F16 and BF16 are read",
         where_, name, stored_type_name(tensor.type));
  }
  File& file = open_files_[file_of_.at(name)];
  const int64_t element_bytes = stored_type_bytes(tensor.type);
  const int64_t offset = tensor.file_offset + first * element_bytes;
  if (tensor.type == StoredType::f32) {
    files_->read_at(file, offset, values.data(), static_cast<int64_t>(values.size_bytes()));
    return;
  }
  std::vector<std::byte> raw;
  for (size_t done = 0; done < values.size(); done += kConvertElements) {
    const std::span<float> part =
        values.subspan(done, std::min(kConvertElements, values.size() - done));
    raw.resize(part.size() * 2);
    files_->read_at(file, offset + static_cast<int64_t>(done) * 2, raw.data(),
                    static_cast<int64_t>(raw.size()));
    convert_half(tensor.type, raw.data(), part);
  }
}

void SafetensorsReader::read_i64(const std::string& name, int64_t first,
                                 std::span<int64_t> values) {
  const StoredTensor& tensor = at(name);
  check_range(tensor, first, static_cast<int64_t>(values.size()));
  if (tensor.type != StoredType::i64 && tensor.type != StoredType::i32) {
    fail(ExitCode::corrupt_file, "'{}': tensor '{}' is stored as {}; I64 or I32 is expected",
         where_, name, stored_type_name(tensor.type));
  }
  const int64_t element_bytes = stored_type_bytes(tensor.type);
  std::vector<std::byte> raw(values.size() * static_cast<size_t>(element_bytes));
  files_->read_at(open_files_[file_of_.at(name)], tensor.file_offset + first * element_bytes,
                  raw.data(), static_cast<int64_t>(raw.size()));
  for (size_t i = 0; i < values.size(); ++i) {
    if (tensor.type == StoredType::i64) {
      std::memcpy(&values[i], raw.data() + 8 * i, 8);
    } else {
      int32_t narrow = 0;
      std::memcpy(&narrow, raw.data() + 4 * i, 4);
      values[i] = narrow;
    }
  }
}

SafetensorsWriter::SafetensorsWriter(FileSystem& files, std::string path,
                                     std::vector<Declaration> declarations)
    : files_(&files), path_(std::move(path)), declarations_(std::move(declarations)) {
  std::sort(
      declarations_.begin(), declarations_.end(),
      [](const Declaration& left, const Declaration& right) { return left.name < right.name; });
  json header = json::object();
  header["__metadata__"] = {{"format", "pt"}};  // transformers refuses files without it
  int64_t offset = 0;
  for (const Declaration& declaration : declarations_) {
    CHECK(declaration.type == StoredType::f32 || declaration.type == StoredType::bf16);
    CHECK(!header.contains(declaration.name));
    int64_t bytes = stored_type_bytes(declaration.type);
    for (const int64_t extent : declaration.shape) {
      CHECK(extent > 0 && !__builtin_mul_overflow(bytes, extent, &bytes));
    }
    header[declaration.name] = {{"dtype", stored_type_name(declaration.type)},
                                {"shape", declaration.shape},
                                {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');  // data aligned to 8 bytes
  CHECK_LE(static_cast<int64_t>(text.size()), kMostSafetensorsHeaderBytes);
  const uint64_t header_bytes = text.size();
  files_->remove_file(path_ + ".tmp");
  file_ = files_->create(path_ + ".tmp");
  files_->write(file_, std::as_bytes(std::span(&header_bytes, 1)));
  files_->write(file_, std::as_bytes(std::span(text)));
}

void SafetensorsWriter::append(std::span<const float> values) {
  if (values.empty()) return;
  CHECK_LT(current_, declarations_.size());
  const Declaration& declaration = declarations_[current_];
  int64_t elements = 1;
  for (const int64_t extent : declaration.shape) elements *= extent;
  filled_ += static_cast<int64_t>(values.size());
  CHECK_LE(filled_, elements);
  if (declaration.type == StoredType::f32) {
    files_->write(file_, std::as_bytes(values));
  } else {
    bf16_.resize(values.size());
    std::transform(values.begin(), values.end(), bf16_.begin(), float_to_bf16);
    files_->write(file_, std::as_bytes(std::span(bf16_)));
  }
  if (filled_ == elements) {
    ++current_;
    filled_ = 0;
  }
}

void SafetensorsWriter::finish() {
  CHECK_EQ(current_, declarations_.size());
  files_->sync(file_);
  files_->close(file_);
  files_->rename(path_ + ".tmp", path_);
  files_->sync_directory(parent_directory(path_));
}

}  // namespace cambium
