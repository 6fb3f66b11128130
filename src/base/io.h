// Files: every file-system call whose failure matters goes through one FileSystem, passed
// explicitly.
//
// Each call checks its result and throws `Error` (31 I/O, 30 short file, 34 unsafe file) with path
// and errno; EINTR and short transfers are retried here and seen by nobody. Tests derive from
// FileSystem and override `before`, which runs ahead of each system call: it may return an errno,
// shorten a transfer or end the process, so every crash and every I/O error can be enumerated.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "src/base/error.h"

namespace cambium {

enum class FileOp : uint8_t {
  open,
  create,
  read,
  write,
  sync,
  close,
  sync_directory,
  rename,
  make_directory,
  remove,
  list,
  stat,
  free_space,
  lock,
};
const char* file_op_name(FileOp op);

// One system call about to run. `before` may lower `bytes` of a read or write to at least 1.
struct FileCall {
  FileOp op = FileOp::open;
  const char* path = "";
  int64_t bytes = 0;
};

enum class Symlinks { follow, refuse };
enum class EntryKind { missing, file, directory, symlink, other };

// An open file: owns the descriptor. The destructor closes without a check, so writers call
// FileSystem::close. Movable.
class File {
 public:
  File() = default;
  File(int descriptor, std::string path) : descriptor_(descriptor), path_(std::move(path)) {}
  File(File&& other) noexcept { *this = std::move(other); }
  File& operator=(File&& other) noexcept;
  ~File();
  bool is_open() const { return descriptor_ >= 0; }
  int descriptor() const { return descriptor_; }
  const std::string& path() const { return path_; }
  int release() { return std::exchange(descriptor_, -1); }

 private:
  int descriptor_ = -1;
  std::string path_;
};

// The real file system. Stateless, so ranks may share one; `before` of a test's subclass may not
// be.
class FileSystem {
 public:
  virtual ~FileSystem() = default;

  // A new file for writing; refuses one that exists and never follows a link.
  File create(const std::string& path);
  // An existing regular file for reading; devices, pipes and (if asked) links exit 34.
  File open(const std::string& path, Symlinks symlinks);
  void write(File& file, std::span<const std::byte> bytes);
  // Exactly `bytes` from `offset`; a file that ends earlier exits 30.
  void read_at(File& file, int64_t offset, void* destination, int64_t bytes);
  int64_t size_bytes(File& file);
  void sync(File& file);
  void close(File& file);

  void sync_directory(const std::string& path);
  void rename(const std::string& from, const std::string& to);
  // Puts directory `from` in the place of directory `to` in one step, and what was at `to` at
  // `from`. False where the file system cannot exchange.
  bool exchange(const std::string& from, const std::string& to);
  // Existing directories are fine. Parents must exist.
  void make_directory(const std::string& path);
  // `path` and its missing parents, each synced into its parent.
  void make_directories(const std::string& path);
  void remove_file(const std::string& path);
  // Files and directories below `path` and `path` itself; links are removed, never followed.
  void remove_tree(const std::string& path);
  // Names in `path`, sorted, without . and ..
  std::vector<std::string> list(const std::string& path);
  EntryKind kind(const std::string& path);
  int64_t free_bytes(const std::string& path);

  // The whole file; more than `most_bytes` exits 30 before anything is read.
  std::string read_file(const std::string& path, int64_t most_bytes, Symlinks symlinks);
  // Temporary file beside `path`, fsync, rename, fsync of the directory: all or nothing.
  void write_file_atomic(const std::string& path, const std::string& text);

 protected:
  // Runs before every system call; 0 goes on, else the call fails with this errno.
  virtual int before(FileCall& call) {
    (void)call;
    return 0;
  }

 private:
  friend class DirectoryLock;
  int attempt(FileOp op, const std::string& path);
};

// Exclusive use of a directory by one process: flock on `<directory>/lock`, which holds pid and
// host. Ends with the process, however it ends. Already held: exit 33, naming the holder.
class DirectoryLock {
 public:
  DirectoryLock(FileSystem& files, const std::string& directory);

 private:
  File file_;
};

// "a/b" -> "a"; "b" -> "."; "/b" -> "/".
std::string parent_directory(const std::string& path);
// One component that stays inside its directory: not empty, no '/', not '.' or '..', no control
// characters, at most 255 bytes.
bool is_plain_file_name(const std::string& name);

}  // namespace cambium
