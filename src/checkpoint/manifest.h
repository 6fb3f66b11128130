// The two JSON files of a checkpoint: the index beside each shard, and the manifest.
//
// manifest.json is one JSON object on two lines and a bracket: the first line holds the XXH3-128 of
// the second, so that it is compared before any JSON is parsed, and any changed byte is damage.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "src/checkpoint/checkpoint.h"

namespace cambium {

constexpr int64_t kMostManifestBytes = int64_t{64} << 20;
constexpr int64_t kMostRanks = 100000;
constexpr int64_t kMostPieces = 10000000;

struct FileRecord {
  std::string file;
  int64_t bytes = 0;
  std::string hash;  // XXH3-128, 32 hexadecimal digits
};

// What shard-*.json says about its shard.
struct ShardIndex {
  FileRecord shard;
  std::vector<ShardPiece> pieces;  // without data
};

struct Manifest {
  CheckpointState state;
  std::vector<FileRecord> shards;   // by rank
  std::vector<FileRecord> indexes;  // by rank
};

std::string shard_file_name(int64_t rank, int64_t ranks);  // "shard-00003-of-00008.h5"
std::string index_file_name(int64_t rank, int64_t ranks);
// At most 200 of a-z A-Z 0-9 . _ - and '/': nothing that a file system or HDF5 could misread.
bool is_tensor_name(const std::string& name);
// Name of a piece's dataset within its shard: "m:layers.0.qkv@4096".
std::string dataset_name(const ShardPiece& piece);

std::string encode_index(const ShardIndex& index);
std::string encode_manifest(const Manifest& manifest);
// `where` names the file in messages.
ShardIndex decode_index(const std::string& text, const std::string& where);
Manifest decode_manifest(const std::string& text, const std::string& where);

}  // namespace cambium
