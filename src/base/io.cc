#include "src/base/io.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "src/base/check.h"

namespace cambium {
namespace {

constexpr int64_t kMostBytesPerCall = int64_t{64} << 20;

const char* advice(int error) {
  switch (error) {
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
      return "free space or choose another directory";
    case EACCES:
    case EPERM:
    case EROFS:
      return "check the permissions of the directory";
    case EMFILE:
    case ENFILE:
      return "raise the limit of open files (ulimit -n)";
    case ENOENT:
    case ENOTDIR:
      return "check the path";
    default:
      return "check the disk and its mount";
  }
}

[[noreturn]] void fail_io(const char* what, const std::string& path, int error) {
  fail(ExitCode::io, "cannot {} '{}': {}; {}", what, path, std::strerror(error), advice(error));
}

EntryKind kind_of(mode_t mode) {
  if (S_ISREG(mode)) return EntryKind::file;
  if (S_ISDIR(mode)) return EntryKind::directory;
  if (S_ISLNK(mode)) return EntryKind::symlink;
  return EntryKind::other;
}

}  // namespace

const char* file_op_name(FileOp op) {
  switch (op) {
    case FileOp::open:
      return "open";
    case FileOp::create:
      return "create";
    case FileOp::read:
      return "read";
    case FileOp::write:
      return "write";
    case FileOp::sync:
      return "fsync";
    case FileOp::close:
      return "close";
    case FileOp::sync_directory:
      return "fsync directory";
    case FileOp::rename:
      return "rename";
    case FileOp::make_directory:
      return "create directory";
    case FileOp::remove:
      return "remove";
    case FileOp::list:
      return "list";
    case FileOp::stat:
      return "stat";
    case FileOp::free_space:
      return "ask for free space of";
    case FileOp::lock:
      return "lock";
  }
  return "?";
}

File& File::operator=(File&& other) noexcept {
  if (this != &other) {
    if (descriptor_ >= 0) ::close(descriptor_);
    descriptor_ = other.release();
    path_ = std::move(other.path_);
  }
  return *this;
}

File::~File() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

int FileSystem::attempt(FileOp op, const std::string& path) {
  FileCall call{.op = op, .path = path.c_str()};
  int error = before(call);
  while (error == EINTR) error = before(call);
  return error;
}

File FileSystem::create(const std::string& path) {
  int error = attempt(FileOp::create, path);
  if (error == 0) {
    const int descriptor =
        ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
    if (descriptor >= 0) return File(descriptor, path);
    error = errno;
  }
  fail_io("create", path, error);
}

File FileSystem::open(const std::string& path, Symlinks symlinks) {
  int error = attempt(FileOp::open, path);
  if (error != 0) fail_io("open", path, error);
  // O_NONBLOCK: a pipe put in the file's place must not hang the open.
  const int flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK;
  const int descriptor =
      ::open(path.c_str(), symlinks == Symlinks::refuse ? flags | O_NOFOLLOW : flags);
  if (descriptor < 0) {
    error = errno;
    if (error == ELOOP) {
      fail(ExitCode::unsafe_file, "'{}' is a symbolic link; put the file itself there", path);
    }
    fail_io("open", path, error);
  }
  File file(descriptor, path);
  struct stat status {};
  if (::fstat(descriptor, &status) != 0) fail_io("stat", path, errno);
  if (!S_ISREG(status.st_mode)) {
    fail(ExitCode::unsafe_file, "'{}' is not a regular file; put the file itself there", path);
  }
  return file;
}

void FileSystem::write(File& file, std::span<const std::byte> bytes) {
  CHECK(file.is_open());
  size_t done = 0;
  while (done < bytes.size()) {
    const int64_t left = static_cast<int64_t>(bytes.size() - done);
    FileCall call{FileOp::write, file.path().c_str(), std::min(left, kMostBytesPerCall)};
    int error = before(call);
    if (error == 0) {
      const ssize_t count =
          ::write(file.descriptor(), bytes.data() + done, static_cast<size_t>(call.bytes));
      if (count > 0) {
        done += static_cast<size_t>(count);
        continue;
      }
      error = count == 0 ? ENOSPC : errno;
    }
    if (error != EINTR) fail_io("write", file.path(), error);
  }
}

void FileSystem::read_at(File& file, int64_t offset, void* destination, int64_t bytes) {
  CHECK(file.is_open() && offset >= 0 && bytes >= 0);
  int64_t done = 0;
  while (done < bytes) {
    FileCall call{FileOp::read, file.path().c_str(), std::min(bytes - done, kMostBytesPerCall)};
    int error = before(call);
    if (error == 0) {
      const ssize_t count = ::pread(file.descriptor(), static_cast<char*>(destination) + done,
                                    static_cast<size_t>(call.bytes), offset + done);
      if (count > 0) {
        done += count;
        continue;
      }
      if (count == 0) {
        fail(ExitCode::corrupt_file,
             "'{}' ends at byte {}, {} bytes were expected; it is truncated", file.path(),
             offset + done, offset + bytes);
      }
      error = errno;
    }
    if (error != EINTR) fail_io("read", file.path(), error);
  }
}

int64_t FileSystem::size_bytes(File& file) {
  int error = attempt(FileOp::stat, file.path());
  struct stat status {};
  if (error == 0 && ::fstat(file.descriptor(), &status) != 0) error = errno;
  if (error != 0) fail_io("stat", file.path(), error);
  return status.st_size;
}

void FileSystem::sync(File& file) {
  int error = attempt(FileOp::sync, file.path());
  while (error == 0 && ::fsync(file.descriptor()) != 0) {
    if (errno != EINTR) error = errno;
  }
  if (error != 0) fail_io("fsync", file.path(), error);
}

void FileSystem::close(File& file) {
  int error = attempt(FileOp::close, file.path());
  // Linux frees the descriptor whatever close returns, EINTR included.
  if (::close(file.release()) != 0 && errno != EINTR && error == 0) error = errno;
  if (error != 0) fail_io("close", file.path(), error);
}

void FileSystem::sync_directory(const std::string& path) {
  int error = attempt(FileOp::sync_directory, path);
  if (error == 0) {
    File directory(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC), path);
    if (!directory.is_open() || ::fsync(directory.descriptor()) != 0) error = errno;
  }
  if (error != 0) fail_io("fsync directory", path, error);
}

void FileSystem::rename(const std::string& from, const std::string& to) {
  int error = attempt(FileOp::rename, from);
  if (error == 0 && ::rename(from.c_str(), to.c_str()) != 0) error = errno;
  if (error != 0) {
    fail(ExitCode::io, "cannot rename '{}' to '{}': {}; {}", from, to, std::strerror(error),
         advice(error));
  }
}

bool FileSystem::exchange(const std::string& from, const std::string& to) {
  int error = attempt(FileOp::rename, from);
  if (error == 0 &&
      ::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_EXCHANGE) != 0) {
    error = errno;
    if (error == EINVAL || error == ENOSYS) return false;
  }
  if (error != 0) fail_io("exchange", from, error);
  return true;
}

void FileSystem::make_directory(const std::string& path) {
  int error = attempt(FileOp::make_directory, path);
  if (error == 0 && ::mkdir(path.c_str(), 0755) != 0) error = errno;
  if (error == EEXIST && kind(path) != EntryKind::file) error = 0;
  if (error != 0) fail_io("create directory", path, error);
}

void FileSystem::make_directories(const std::string& path) {
  if (path.empty() || kind(path) == EntryKind::directory) return;
  const std::string parent = parent_directory(path);
  if (parent != path) make_directories(parent);
  make_directory(path);
  sync_directory(parent);
}

void FileSystem::remove_file(const std::string& path) {
  int error = attempt(FileOp::remove, path);
  if (error == 0 && ::unlink(path.c_str()) != 0) error = errno;
  if (error != 0 && error != ENOENT) fail_io("remove", path, error);
}

void FileSystem::remove_tree(const std::string& path) {
  const EntryKind found = kind(path);
  if (found == EntryKind::missing) return;
  if (found != EntryKind::directory) {
    remove_file(path);
    return;
  }
  for (const std::string& name : list(path)) remove_tree(path + "/" + name);
  int error = attempt(FileOp::remove, path);
  if (error == 0 && ::rmdir(path.c_str()) != 0) error = errno;
  if (error != 0 && error != ENOENT) fail_io("remove", path, error);
}

std::vector<std::string> FileSystem::list(const std::string& path) {
  int error = attempt(FileOp::list, path);
  std::vector<std::string> names;
  if (error == 0) {
    DIR* stream = ::opendir(path.c_str());
    if (stream == nullptr) {
      error = errno;
    } else {
      errno = 0;
      while (const dirent* entry = ::readdir(stream)) {
        const std::string name = entry->d_name;
        if (name != "." && name != "..") names.push_back(name);
      }
      error = errno;
      ::closedir(stream);
    }
  }
  if (error != 0) fail_io("list", path, error);
  std::sort(names.begin(), names.end());
  return names;
}

EntryKind FileSystem::kind(const std::string& path) {
  int error = attempt(FileOp::stat, path);
  struct stat status {};
  if (error == 0 && ::lstat(path.c_str(), &status) != 0) error = errno;
  if (error == ENOENT || error == ENOTDIR) return EntryKind::missing;
  if (error != 0) fail_io("stat", path, error);
  return kind_of(status.st_mode);
}

int64_t FileSystem::free_bytes(const std::string& path) {
  int error = attempt(FileOp::free_space, path);
  struct statvfs status {};
  if (error == 0 && ::statvfs(path.c_str(), &status) != 0) error = errno;
  if (error != 0) fail_io("ask for free space of", path, error);
  return static_cast<int64_t>(status.f_bavail) * static_cast<int64_t>(status.f_frsize);
}

std::string FileSystem::read_file(const std::string& path, int64_t most_bytes, Symlinks symlinks) {
  File file = open(path, symlinks);
  const int64_t bytes = size_bytes(file);
  if (bytes > most_bytes) {
    fail(ExitCode::corrupt_file,
         "'{}' has {} bytes, more than the {} that this kind of file may have", path, bytes,
         most_bytes);
  }
  std::string text(static_cast<size_t>(bytes), '\0');
  read_at(file, 0, text.data(), bytes);
  return text;
}

void FileSystem::write_file_atomic(const std::string& path, const std::string& text) {
  const std::string temporary = path + ".tmp";
  remove_file(temporary);
  File file = create(temporary);
  write(file, std::as_bytes(std::span(text)));
  sync(file);
  close(file);
  rename(temporary, path);
  sync_directory(parent_directory(path));
}

DirectoryLock::DirectoryLock(FileSystem& files, const std::string& directory) {
  const std::string path = directory + "/lock";
  int error = files.attempt(FileOp::lock, path);
  if (error == 0) {
    file_ = File(::open(path.c_str(), O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0644), path);
    if (!file_.is_open()) error = errno;
  }
  if (error != 0) fail_io("open lock", path, error);
  char text[512] = {};
  if (::flock(file_.descriptor(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) fail_io("lock", path, errno);
    const ssize_t count = ::pread(file_.descriptor(), text, sizeof(text) - 1, 0);
    std::string holder(text, static_cast<size_t>(std::max<ssize_t>(count, 0)));
    std::erase_if(holder, [](char c) { return c < ' ' || c > '~'; });
    fail(ExitCode::directory_in_use,
         "'{}' is in use by {}; wait for that process or choose another directory", directory,
         holder.empty() ? "another process" : holder);
  }
  char host[256] = {};
  if (::gethostname(host, sizeof(host) - 1) != 0) host[0] = '\0';
  const int length =
      std::snprintf(text, sizeof(text), "pid %ld on %s\n", static_cast<long>(::getpid()), host);
  if (::ftruncate(file_.descriptor(), 0) != 0 ||
      ::pwrite(file_.descriptor(), text, static_cast<size_t>(length), 0) != length) {
    fail_io("write", path, errno);
  }
}

std::string parent_directory(const std::string& path) {
  const size_t slash = path.find_last_of('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

bool is_plain_file_name(const std::string& name) {
  if (name.empty() || name.size() > 255 || name == "." || name == "..") return false;
  return std::none_of(name.begin(), name.end(), [](char c) {
    return c == '/' || static_cast<unsigned char>(c) < 0x20 || c == 0x7f;
  });
}

}  // namespace cambium
