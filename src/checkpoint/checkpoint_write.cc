// Writing checkpoints: shards, commit, retention (protocol: checkpoint.h).
#include <algorithm>

#include "src/base/check.h"
#include "src/base/digest.h"
#include "src/checkpoint/checkpoint.h"
#include "src/checkpoint/manifest.h"

namespace cambium {
namespace {

constexpr int64_t kHdf5BytesPerPiece = 1024;  // object header, chunk index, link; generous
constexpr int64_t kHdf5BytesPerFile = 65536;

std::string temporary_path(const std::string& directory, int64_t step) {
  return checkpoint_path(directory, step) + ".tmp";
}

std::string trash_path(const std::string& directory, const std::string& name) {
  return directory + "/.trash-" + name;
}

// Writes, syncs and closes a new file; the directory is synced by the commit.
FileRecord write_new_file(FileSystem& files, const std::string& directory, const std::string& name,
                          std::span<const std::byte> bytes) {
  const std::string path = directory + "/" + name;
  files.remove_file(path);  // of an attempt at the same step that failed
  File file = files.create(path);
  files.write(file, bytes);
  files.sync(file);
  files.close(file);
  return {.file = name,
          .bytes = static_cast<int64_t>(bytes.size()),
          .hash = xxh3_128(bytes.data(), bytes.size()).hex()};
}

FileRecord write_new_file(FileSystem& files, const std::string& directory, const std::string& name,
                          const std::string& text) {
  return write_new_file(files, directory, name, std::as_bytes(std::span(text)));
}

// HDF5 writes into memory; the bytes then go to the disk through FileSystem, so that no write
// escapes its checks and its tests.
void write_hdf5(Hdf5Image& image, int64_t expected_bytes, std::span<const ShardPiece> pieces) {
  Hdf5Writer writer(image, expected_bytes);
  writer.write_attribute("format", "cambium-shard");
  writer.write_attribute("version", uint64_t{1});
  for (const ShardPiece& piece : pieces) {
    CHECK(is_tensor_name(piece.name));
    CHECK(piece.first_element >= 0 && piece.elements > 0);
    CHECK_LE(piece.first_element + piece.elements, piece.total_elements);
    writer.write_dataset(dataset_name(piece), Hdf5Storage::checked,
                         std::span(piece.data, static_cast<size_t>(piece.elements)));
  }
  writer.close();
}

// Renames first, so that a deletion cut short leaves nothing that looks like a checkpoint.
void delete_checkpoint(FileSystem& files, const std::string& directory, const std::string& name) {
  const std::string trash = trash_path(directory, name);
  files.remove_tree(trash);
  files.rename(directory + "/" + name, trash);
  files.sync_directory(directory);
  files.remove_tree(trash);
}

// Gives the complete directory its final name: the commit point.
void publish(FileSystem& files, const std::string& directory, int64_t step) {
  const std::string temporary = temporary_path(directory, step);
  const std::string path = checkpoint_path(directory, step);
  if (files.kind(path) == EntryKind::missing) {
    files.rename(temporary, path);
    files.sync_directory(directory);
    return;
  }
  if (!files.exchange(temporary, path)) {
    // NOTE: this file system cannot exchange: for a moment there is neither old nor new of this
    // step, and older checkpoints stand in.
    delete_checkpoint(files, directory, path.substr(directory.size() + 1));
    files.rename(temporary, path);
  }
  files.sync_directory(directory);
  files.remove_tree(temporary);
}

}  // namespace

void check_free_space(FileSystem& files, const std::string& directory, int64_t needed_bytes) {
  const int64_t free_bytes = files.free_bytes(directory);
  if (free_bytes < needed_bytes) {
    fail(ExitCode::io,
         "'{}': a checkpoint needs {} bytes, {} are free; free space, lower checkpoint.keep, or "
         "choose another run.out",
         directory, needed_bytes, free_bytes);
  }
}

void prepare_checkpoints(FileSystem& files, const std::string& directory) {
  files.make_directories(directory);
  for (const std::string& name : files.list(directory)) {
    const bool stale =
        (name.starts_with("step-") && name.ends_with(".tmp")) || name.starts_with(".trash-step-");
    if (stale) files.remove_tree(directory + "/" + name);
  }
}

void write_checkpoint_shard(FileSystem& files, const ShardTarget& target,
                            std::span<const ShardPiece> pieces) {
  CHECK(target.rank >= 0 && target.rank < target.ranks && target.ranks <= kMostRanks);
  int64_t needed_bytes = kHdf5BytesPerFile;
  for (const ShardPiece& piece : pieces) needed_bytes += piece.elements * 4 + kHdf5BytesPerPiece;
  check_free_space(files, target.directory, needed_bytes);
  const std::string temporary = temporary_path(target.directory, target.step);
  files.make_directory(temporary);

  Hdf5Image image;
  write_hdf5(image, needed_bytes, pieces);
  ShardIndex index;
  index.shard =
      write_new_file(files, temporary, shard_file_name(target.rank, target.ranks), image.bytes());
  index.pieces.assign(pieces.begin(), pieces.end());
  write_new_file(files, temporary, index_file_name(target.rank, target.ranks), encode_index(index));
}

std::string commit_checkpoint(FileSystem& files, const std::string& directory, int64_t ranks,
                              const CheckpointState& state) {
  const std::string temporary = temporary_path(directory, state.step);
  Manifest manifest;
  manifest.state = state;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    const std::string name = index_file_name(rank, ranks);
    const std::string path = temporary + "/" + name;
    const std::string text = files.read_file(path, kMostManifestBytes, Symlinks::refuse);
    manifest.shards.push_back(decode_index(text, path).shard);
    manifest.indexes.push_back({.file = name,
                                .bytes = static_cast<int64_t>(text.size()),
                                .hash = xxh3_128(text.data(), text.size()).hex()});
  }
  write_new_file(files, temporary, "manifest.json", encode_manifest(manifest));
  files.sync_directory(temporary);
  // Sizes, indexes and coverage are read back before anyone may rely on this checkpoint.
  { const CheckpointReader complete(files, temporary, ShardCheck::at_first_read); }
  publish(files, directory, state.step);
  return checkpoint_path(directory, state.step);
}

void retain_checkpoints(FileSystem& files, const std::string& directory, int64_t step,
                        int64_t keep) {
  if (keep <= 0) return;
  std::vector<int64_t> older;
  for (const int64_t found : list_checkpoints(files, directory)) {
    if (found < step) older.push_back(found);
  }
  const int64_t surplus = static_cast<int64_t>(older.size()) - (keep - 1);
  if (surplus <= 0) return;
  { const CheckpointReader newest(files, checkpoint_path(directory, step), ShardCheck::at_open); }
  older.resize(static_cast<size_t>(surplus));
  for (const int64_t surplus_step : older) {
    delete_checkpoint(files, directory,
                      checkpoint_path(directory, surplus_step).substr(directory.size() + 1));
  }
}

}  // namespace cambium
