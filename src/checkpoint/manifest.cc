#include "src/checkpoint/manifest.h"

#include <algorithm>
#include <cmath>

#include "nlohmann/json.hpp"
#include "src/base/check.h"
#include "src/base/digest.h"
#include "src/checkpoint/strict_json.h"

namespace cambium {
namespace {

using nlohmann::json;

constexpr int64_t kFormatVersion = 1;
constexpr const char* kHeadFormat =
    "{{\"format\":\"cambium-checkpoint\",\"version\":{},\"body_xxh3_128\":\"{}\",\"body\":\n";
constexpr const char* kTail = "\n}\n";

// Typed access whose errors name file and key.
class Fields {
 public:
  Fields(const json& object, const std::string& where) : object_(object), where_(where) {
    if (!object.is_object()) broken("an entry is not an object");
  }

  [[noreturn]] void broken(const std::string& what) const {
    fail(ExitCode::corrupt_file, "'{}': {}", where_, what);
  }
  const json& at(const char* key) const {
    if (!object_.contains(key)) broken(fmt::format("key '{}' is missing", key));
    return object_.at(key);
  }
  std::string text(const char* key) const {
    if (!at(key).is_string()) broken(fmt::format("key '{}' is not a string", key));
    return at(key).get<std::string>();
  }
  int64_t natural(const char* key) const { return natural(at(key), key); }
  int64_t natural(const json& value, const char* key) const {
    if (!value.is_number_unsigned() || value.get<uint64_t>() > uint64_t{INT64_MAX}) {
      broken(fmt::format("key '{}' is not a natural number", key));
    }
    return value.get<int64_t>();
  }
  const json& array(const char* key, int64_t most) const {
    const json& value = at(key);
    if (!value.is_array() || static_cast<int64_t>(value.size()) > most) {
      broken(fmt::format("key '{}' is not a list of at most {}", key, most));
    }
    return value;
  }
  const json& object(const char* key) const {
    if (!at(key).is_object()) broken(fmt::format("key '{}' is not an object", key));
    return at(key);
  }
  // A number of the wanted kind, or a list of them.
  template <class Value>
  Value number(const json& value, const char* key) const {
    const bool fits = std::is_integral_v<Value> ? value.is_number_integer() : value.is_number();
    if (!fits || (value.is_number_unsigned() && value.get<uint64_t>() > uint64_t{INT64_MAX})) {
      broken(fmt::format("key '{}' holds something else than numbers", key));
    }
    return value.get<Value>();
  }
  template <class Value>
  std::map<std::string, std::vector<Value>> arrays(const char* key) const {
    std::map<std::string, std::vector<Value>> found;
    for (const auto& [name, values] : object(key).items()) {
      if (!values.is_array()) broken(fmt::format("key '{}' is not a list", name));
      for (const json& value : values) found[name].push_back(number<Value>(value, key));
      found[name];
    }
    return found;
  }

 private:
  const json& object_;
  const std::string& where_;
};

json encode_record(const FileRecord& record) {
  return {{"file", record.file}, {"bytes", record.bytes}, {"xxh3_128", record.hash}};
}

FileRecord decode_record(const json& value, const std::string& where) {
  const Fields fields(value, where);
  FileRecord record{.file = fields.text("file"),
                    .bytes = fields.natural("bytes"),
                    .hash = fields.text("xxh3_128")};
  if (!is_plain_file_name(record.file)) {
    fail(ExitCode::unsafe_file, "'{}': '{}' is not a plain file name", where, record.file);
  }
  const bool hexadecimal = std::all_of(record.hash.begin(), record.hash.end(), [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
  });
  if (record.hash.size() != 32 || !hexadecimal)
    fields.broken("a hash is not 32 hexadecimal digits");
  return record;
}

ShardPiece decode_piece(const json& value, const Fields& fields) {
  if (!value.is_array() || value.size() != 4 || !value[0].is_string()) {
    fields.broken("a piece is not [name, first, elements, total]");
  }
  ShardPiece piece;
  piece.name = value[0].get<std::string>();
  piece.first_element = fields.natural(value[1], "pieces");
  piece.elements = fields.natural(value[2], "pieces");
  piece.total_elements = fields.natural(value[3], "pieces");
  if (!is_tensor_name(piece.name)) fields.broken("a piece has no tensor's name");
  if (piece.elements == 0 || piece.first_element > piece.total_elements ||
      piece.elements > piece.total_elements - piece.first_element) {
    fields.broken(fmt::format("the piece of '{}' lies outside its tensor", piece.name));
  }
  return piece;
}

json encode_state(const CheckpointState& state) {
  for (const auto& [name, values] : state.float_arrays) {
    for (const double value : values) CHECK(std::isfinite(value));
  }
  return {{"step", state.step},
          {"seed", state.seed},
          {"config", state.config},
          {"layout", state.layout},
          {"integers", state.integers},
          {"integer_arrays", state.integer_arrays},
          {"float_arrays", state.float_arrays}};
}

CheckpointState decode_state(const Fields& fields) {
  CheckpointState state;
  state.step = fields.natural("step");
  const json& seed = fields.at("seed");
  if (!seed.is_number_unsigned()) fields.broken("key 'seed' is not a natural number");
  state.seed = seed.get<uint64_t>();
  state.config = fields.text("config");
  state.layout = fields.text("layout");
  for (const auto& [name, value] : fields.object("integers").items()) {
    state.integers[name] = fields.number<int64_t>(value, "integers");
  }
  state.integer_arrays = fields.arrays<int64_t>("integer_arrays");
  state.float_arrays = fields.arrays<double>("float_arrays");
  return state;
}

std::vector<FileRecord> decode_records(const Fields& fields, const char* key,
                                       const std::string& where) {
  std::vector<FileRecord> records;
  for (const json& value : fields.array(key, kMostRanks)) {
    records.push_back(decode_record(value, where));
  }
  return records;
}

}  // namespace

std::string shard_file_name(int64_t rank, int64_t ranks) {
  return fmt::format("shard-{:05}-of-{:05}.h5", rank, ranks);
}

std::string index_file_name(int64_t rank, int64_t ranks) {
  return fmt::format("shard-{:05}-of-{:05}.json", rank, ranks);
}

bool is_tensor_name(const std::string& name) {
  return !name.empty() && name.size() <= 200 && std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '_' || c == '-' || c == '/';
  });
}

std::string dataset_name(const ShardPiece& piece) {
  std::string name = fmt::format("{}@{}", piece.name, piece.first_element);
  std::replace(name.begin(), name.end(), '/', ':');
  return name;
}

std::string encode_index(const ShardIndex& index) {
  json pieces = json::array();
  for (const ShardPiece& piece : index.pieces) {
    pieces.push_back({piece.name, piece.first_element, piece.elements, piece.total_elements});
  }
  json root = encode_record(index.shard);
  root["pieces"] = std::move(pieces);
  return root.dump() + "\n";
}

ShardIndex decode_index(const std::string& text, const std::string& where) {
  const json root = parse_strict_json(text, where);
  ShardIndex index;
  index.shard = decode_record(root, where);
  const Fields fields(root, where);
  for (const json& value : fields.array("pieces", kMostPieces)) {
    index.pieces.push_back(decode_piece(value, fields));
  }
  return index;
}

std::string encode_manifest(const Manifest& manifest) {
  json body = encode_state(manifest.state);
  body["shards"] = json::array();
  body["indexes"] = json::array();
  for (const FileRecord& record : manifest.shards) body["shards"].push_back(encode_record(record));
  for (const FileRecord& record : manifest.indexes)
    body["indexes"].push_back(encode_record(record));
  const std::string text = body.dump();
  return fmt::format(fmt::runtime(kHeadFormat), kFormatVersion,
                     xxh3_128(text.data(), text.size()).hex()) +
         text + kTail;
}

Manifest decode_manifest(const std::string& text, const std::string& where) {
  const size_t head_end = text.find('\n');
  const std::string_view tail = kTail;
  if (head_end == std::string::npos || !text.ends_with(tail) ||
      text.size() < head_end + 1 + tail.size()) {
    fail(ExitCode::corrupt_file, "'{}' is not a complete checkpoint manifest", where);
  }
  const std::string_view body =
      std::string_view(text).substr(head_end + 1, text.size() - head_end - 1 - tail.size());
  const std::string hash = xxh3_128(body.data(), body.size()).hex();
  // The head must be, byte for byte, what the body's hash makes it.
  if (text.substr(0, head_end + 1) !=
      fmt::format(fmt::runtime(kHeadFormat), kFormatVersion, hash)) {
    fail(ExitCode::corrupt_file,
         "'{}' does not match its hash (or is not of format version {}); it is damaged", where,
         kFormatVersion);
  }
  const json root = parse_strict_json(body, where);
  const Fields fields(root, where);
  Manifest manifest;
  manifest.state = decode_state(fields);
  manifest.shards = decode_records(fields, "shards", where);
  manifest.indexes = decode_records(fields, "indexes", where);
  const int64_t ranks = static_cast<int64_t>(manifest.shards.size());
  if (ranks == 0 || manifest.indexes.size() != manifest.shards.size()) {
    fields.broken("it lists no shards, or not one index each");
  }
  for (int64_t rank = 0; rank < ranks; ++rank) {
    if (manifest.shards[static_cast<size_t>(rank)].file != shard_file_name(rank, ranks) ||
        manifest.indexes[static_cast<size_t>(rank)].file != index_file_name(rank, ranks)) {
      fields.broken(fmt::format("shard {} has another name than it must have", rank));
    }
  }
  return manifest;
}

}  // namespace cambium
