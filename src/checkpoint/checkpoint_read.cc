// Reading checkpoints: scan, verify, assemble (format: checkpoint.h).
#include <algorithm>
#include <charconv>

#include "src/base/check.h"
#include "src/base/digest.h"
#include "src/checkpoint/checkpoint.h"
#include "src/checkpoint/manifest.h"

namespace cambium {
namespace {

constexpr int64_t kHashBytesPerRead = int64_t{4} << 20;

std::string hash_of_file(FileSystem& files, File& file, int64_t bytes) {
  Xxh3Stream hash;
  std::vector<char> buffer(static_cast<size_t>(std::min(bytes, kHashBytesPerRead)));
  for (int64_t done = 0; done < bytes; done += static_cast<int64_t>(buffer.size())) {
    const int64_t count = std::min<int64_t>(bytes - done, static_cast<int64_t>(buffer.size()));
    files.read_at(file, done, buffer.data(), count);
    hash.update(buffer.data(), static_cast<size_t>(count));
  }
  return hash.digest().hex();
}

// A file that the manifest names must be there, whole, and no link.
File open_recorded(FileSystem& files, const std::string& path, int64_t bytes) {
  if (files.kind(path) == EntryKind::missing) {
    fail(ExitCode::corrupt_file, "'{}' is missing", path);
  }
  File file = files.open(path, Symlinks::refuse);
  const int64_t found = files.size_bytes(file);
  if (found != bytes) {
    fail(ExitCode::corrupt_file, "'{}' has {} bytes, the manifest says {}", path, found, bytes);
  }
  return file;
}

[[noreturn]] void fail_hash(const std::string& path, const std::string& expected,
                            const std::string& found) {
  fail(ExitCode::corrupt_file, "'{}' is damaged: its XXH3-128 is {}, the manifest says {}", path,
       found, expected);
}

}  // namespace

std::string checkpoint_path(const std::string& directory, int64_t step) {
  return fmt::format("{}/step-{:08}", directory, step);
}

std::string checkpoints_directory(FileSystem& files, const std::string& path) {
  const std::string inner = path + "/checkpoints";
  return files.kind(inner) == EntryKind::missing ? path : inner;
}

std::vector<int64_t> list_checkpoints(FileSystem& files, const std::string& directory) {
  std::vector<int64_t> steps;
  if (files.kind(directory) == EntryKind::missing) return steps;
  for (const std::string& name : files.list(directory)) {
    if (!name.starts_with("step-")) continue;
    int64_t step = 0;
    const char* end = name.data() + name.size();
    const auto [rest, error] = std::from_chars(name.data() + 5, end, step);
    const bool canonical =
        error == std::errc() && rest == end && step >= 0 && checkpoint_path("", step) == "/" + name;
    if (canonical) steps.push_back(step);
  }
  std::sort(steps.begin(), steps.end());
  return steps;
}

CheckpointReader::CheckpointReader(FileSystem& files, const std::string& path, ShardCheck check)
    : files_(&files), path_(path) {
  switch (files.kind(path)) {
    case EntryKind::directory:
      break;
    case EntryKind::missing:
      fail(ExitCode::usage, "there is no checkpoint at '{}'", path);
    default:
      fail(ExitCode::unsafe_file, "'{}' is not a directory; name the checkpoint itself", path);
  }
  const std::string manifest_path = path + "/manifest.json";
  if (files.kind(manifest_path) == EntryKind::missing) {
    fail(ExitCode::corrupt_file, "'{}' is missing; the checkpoint is not complete", manifest_path);
  }
  Manifest manifest = decode_manifest(
      files.read_file(manifest_path, kMostManifestBytes, Symlinks::refuse), manifest_path);
  state_ = std::move(manifest.state);
  for (FileRecord& record : manifest.shards) {
    open_recorded(files, path + "/" + record.file, record.bytes);
    shards_.push_back({.file = std::move(record.file),
                       .bytes = record.bytes,
                       .hash = std::move(record.hash),
                       .reader = nullptr});
  }
  for (size_t shard = 0; shard < shards_.size(); ++shard) {
    const FileRecord& record = manifest.indexes[shard];
    File file = open_recorded(files, path + "/" + record.file, record.bytes);
    const std::string hash = hash_of_file(files, file, record.bytes);
    if (hash != record.hash) fail_hash(file.path(), record.hash, hash);
    read_index(record.file, shard);
  }
  sort_and_check_coverage();
  if (check == ShardCheck::at_open) verify();
}

void CheckpointReader::read_index(const std::string& index_file, size_t shard) {
  const std::string path = path_ + "/" + index_file;
  const ShardIndex index =
      decode_index(files_->read_file(path, kMostManifestBytes, Symlinks::refuse), path);
  if (index.shard.file != shards_[shard].file || index.shard.hash != shards_[shard].hash) {
    fail(ExitCode::corrupt_file, "'{}' describes another shard than the manifest", path);
  }
  for (const ShardPiece& piece : index.pieces) {
    const auto [entry, fresh] = tensors_.emplace(piece.name, piece.total_elements);
    if (!fresh && entry->second != piece.total_elements) {
      fail(ExitCode::corrupt_file, "'{}': tensor '{}' has {} elements here, {} elsewhere", path,
           piece.name, piece.total_elements, entry->second);
    }
    pieces_[piece.name].push_back({piece.first_element, piece.elements, shard});
  }
}

void CheckpointReader::sort_and_check_coverage() {
  for (auto& [name, pieces] : pieces_) {
    std::sort(pieces.begin(), pieces.end(),
              [](const PieceOfShard& left, const PieceOfShard& right) {
                return left.first_element < right.first_element;
              });
    int64_t covered = 0;
    for (const PieceOfShard& piece : pieces) {
      if (piece.first_element != covered) {
        fail(ExitCode::corrupt_file, "'{}': tensor '{}': elements {} to {} are in {} pieces", path_,
             name, std::min(covered, piece.first_element), std::max(covered, piece.first_element),
             piece.first_element > covered ? "no" : "several");
      }
      covered += piece.elements;  // within the tensor: decode_index checked each piece
    }
    if (covered != tensors_.at(name)) {
      fail(ExitCode::corrupt_file, "'{}': tensor '{}': only {} of {} elements are there", path_,
           name, covered, tensors_.at(name));
    }
  }
}

void CheckpointReader::verify(Shard& shard) {
  if (shard.verified) return;
  File file = open_recorded(*files_, path_ + "/" + shard.file, shard.bytes);
  const std::string hash = hash_of_file(*files_, file, shard.bytes);
  if (hash != shard.hash) fail_hash(file.path(), shard.hash, hash);
  shard.verified = true;
}

void CheckpointReader::verify() {
  const std::lock_guard lock(mutex_);
  for (Shard& shard : shards_) verify(shard);
}

int64_t CheckpointReader::total_bytes() const {
  int64_t total = 0;
  for (const Shard& shard : shards_) total += shard.bytes;
  return total;
}

void CheckpointReader::read(const std::string& name, int64_t first, std::span<float> values) {
  const std::lock_guard lock(mutex_);
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) {
    fail(ExitCode::corrupt_file, "'{}' holds no tensor '{}'; is it of another model?", path_, name);
  }
  const int64_t count = static_cast<int64_t>(values.size());
  CHECK(first >= 0 && count <= found->second && first <= found->second - count);
  for (const PieceOfShard& piece : pieces_.at(name)) {
    const int64_t begin = std::max(first, piece.first_element);
    const int64_t end = std::min(first + count, piece.first_element + piece.elements);
    if (begin >= end) continue;
    Shard& shard = shards_[piece.shard];
    verify(shard);
    if (!shard.reader) shard.reader = std::make_unique<Hdf5Reader>(path_ + "/" + shard.file);
    const ShardPiece stored{.name = name, .first_element = piece.first_element};
    shard.reader->read_range(
        dataset_name(stored), Hdf5Type::f32,
        {static_cast<uint64_t>(begin - piece.first_element), static_cast<uint64_t>(end - begin)},
        values.data() + (begin - first));
  }
}

NewestCheckpoint open_newest_checkpoint(FileSystem& files, const std::string& directory) {
  NewestCheckpoint newest;
  const std::vector<int64_t> steps = list_checkpoints(files, directory);
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    try {
      auto reader = std::make_unique<CheckpointReader>(files, checkpoint_path(directory, *step),
                                                       ShardCheck::at_open);
      if (reader->state().step != *step) {
        fail(ExitCode::corrupt_file, "'{}' holds step {}", reader->path(), reader->state().step);
      }
      newest.reader = std::move(reader);
      return newest;
    } catch (const Error& error) {
      // An I/O error may pass, and an unsafe file is for a person to look at: neither is skipped.
      if (error.exit_code() != ExitCode::corrupt_file) throw;
      newest.warnings.push_back(
          fmt::format("checkpoint of step {} is passed over: {}", *step, error.what()));
    }
  }
  if (steps.empty()) return newest;
  fail(ExitCode::corrupt_file,
       "none of the {} checkpoints in '{}' is good; restore one from a copy, or move the directory "
       "away to start at step 0. The newest: {}",
       steps.size(), directory, newest.warnings.front());
}

}  // namespace cambium
