// Checkpoints: a directory of HDF5 shards with a manifest, complete or not there at all.
//
//   checkpoints/step-00000100/          the rename that gave this name is the only commit point
//     shard-00000-of-00008.h5           what rank 0 wrote: pieces of canonical tensors, fp32
//     shard-00000-of-00008.json         size and XXH3-128 of the .h5, and its list of pieces
//     manifest.json                     state, and size and XXH3-128 of every file above
//
// Pieces carry canonical names and element ranges, so any layout loads any checkpoint. A name is
// the tensor's ("layers.0.qkv") or a state of it ("m/layers.0.qkv"). Writing: every rank writes its
// shard into step-%08d.tmp; after a barrier of the caller, rank 0 commits: manifest last, fsync of
// files and directory, rename, fsync of the parent. Reading: hash of the manifest before its JSON
// is parsed, hash of each shard before HDF5 sees a byte of it. Damage exits 30, files made to
// mislead exit 34, I/O errors exit 31.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "src/base/hdf5_file.h"
#include "src/base/io.h"
#include "src/checkpoint/tensor_source.h"

namespace cambium {

// Elements [first_element, first_element + elements) of one tensor of `total_elements`.
struct ShardPiece {
  std::string name;
  int64_t first_element = 0;
  int64_t elements = 0;
  int64_t total_elements = 0;
  const float* data = nullptr;
};

// Everything but tensors that a bit-exact resume needs. Doubles keep their bits; they are finite.
struct CheckpointState {
  int64_t step = 0;  // optimizer steps done
  uint64_t seed = 0;
  std::string config;                       // text of config.resolved.toml
  std::string layout;                       // for people: "pp 1, dp 8, cp 1, ep 4, zero1"
  std::map<std::string, int64_t> integers;  // data cursor, RNG counters, schedule
  std::map<std::string, std::vector<int64_t>> integer_arrays;
  std::map<std::string, std::vector<double>> float_arrays;  // balance counts, router bias
  bool operator==(const CheckpointState&) const = default;
};

// Which shard of which checkpoint.
struct ShardTarget {
  std::string directory;  // ".../checkpoints"
  int64_t step = 0;
  int64_t rank = 0;
  int64_t ranks = 1;
};

// Exit 31 with both numbers when fewer than `needed_bytes` are free.
void check_free_space(FileSystem& files, const std::string& directory, int64_t needed_bytes);

// Once per run, by one process that holds the run directory's lock: creates `directory` and removes
// what an interrupted save or deletion left there.
void prepare_checkpoints(FileSystem& files, const std::string& directory);

// Any rank: writes and syncs its shard of a checkpoint that is not committed yet. Every tensor's
// elements lie in exactly one piece of one shard.
void write_checkpoint_shard(FileSystem& files, const ShardTarget& target,
                            std::span<const ShardPiece> pieces);

// One rank, when all ranks wrote their shards: publishes the checkpoint of `state.step`. One that
// has that step already is replaced in one step. Returns the path.
std::string commit_checkpoint(FileSystem& files, const std::string& directory, int64_t ranks,
                              const CheckpointState& state);

// Verifies the checkpoint of `step` in full, then deletes all but it and the `keep` - 1 next older
// ones; later steps stay. Does nothing for keep = 0, and fails (30) if `step` is not good.
void retain_checkpoints(FileSystem& files, const std::string& directory, int64_t step,
                        int64_t keep);

// When the shards' hashes are compared: all of them at open, or each before its first read.
enum class ShardCheck { at_open, at_first_read };

// One complete checkpoint. Safe to share between the ranks of a process.
class CheckpointReader : public TensorSource {
 public:
  // `path` is the step directory itself.
  CheckpointReader(FileSystem& files, const std::string& path, ShardCheck check);
  const CheckpointState& state() const { return state_; }
  const std::string& path() const { return path_; }
  int64_t ranks() const { return static_cast<int64_t>(shards_.size()); }
  int64_t total_bytes() const;
  // Name and element count of every tensor.
  const std::map<std::string, int64_t>& tensors() const { return tensors_; }
  bool contains(const std::string& name) const { return tensors_.contains(name); }
  // Assembles the range from whatever shards hold it. A name that is not there exits 30.
  void read(const std::string& name, int64_t first, std::span<float> values) override;
  // Compares the hash of every shard that was not compared yet.
  void verify();

 private:
  struct Shard {
    std::string file;
    int64_t bytes = 0;
    std::string hash;
    bool verified = false;
    std::unique_ptr<Hdf5Reader> reader;
  };
  struct PieceOfShard {
    int64_t first_element;
    int64_t elements;
    size_t shard;
  };
  void read_index(const std::string& index_file, size_t shard);
  void sort_and_check_coverage();
  void verify(Shard& shard);

  FileSystem* files_;
  std::string path_;
  std::mutex mutex_;
  CheckpointState state_;
  std::vector<Shard> shards_;
  std::map<std::string, int64_t> tensors_;
  std::map<std::string, std::vector<PieceOfShard>> pieces_;  // ascending
};

// Complete checkpoints in `directory`: steps, ascending. A missing directory has none.
std::vector<int64_t> list_checkpoints(FileSystem& files, const std::string& directory);
std::string checkpoint_path(const std::string& directory, int64_t step);
// Where `path` keeps its checkpoints: <path>/checkpoints of a run directory, else `path` itself.
std::string checkpoints_directory(FileSystem& files, const std::string& path);

// The newest checkpoint whose every hash is right, and one warning per damaged one passed over;
// no reader when there is no checkpoint at all. If all are damaged: exit 30. Changes nothing.
struct NewestCheckpoint {
  std::unique_ptr<CheckpointReader> reader;
  std::vector<std::string> warnings;
};
NewestCheckpoint open_newest_checkpoint(FileSystem& files, const std::string& directory);

}  // namespace cambium
