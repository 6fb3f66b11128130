// Temporary file, fsync, rename under a directory lock (output_file.h).
#include "src/data/output_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "src/base/check.h"

namespace cambium {
namespace {

[[noreturn]] void output_failed(const std::string& path, const char* action, int error) {
  fail(ExitCode::io, "{}: cannot {}: {}; check the path, its permissions and the free space", path,
       action, std::strerror(error));
}

void sync_path(const std::string& path, int flags) {
  const int descriptor = open(path.c_str(), flags | O_CLOEXEC);
  if (descriptor < 0) output_failed(path, "open for syncing", errno);
  int error = fsync(descriptor) == 0 ? 0 : errno;
  if (close(descriptor) != 0 && error == 0) error = errno;
  if (error != 0) output_failed(path, "sync to the disk", error);
}

int lock_directory(const std::string& directory) {
  const int descriptor = open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) output_failed(directory, "open", errno);
  while (flock(descriptor, LOCK_EX) != 0) {
    if (errno == EINTR) continue;
    const int error = errno;
    close(descriptor);
    output_failed(directory, "lock (does its file system support flock?)", error);
  }
  return descriptor;
}

}  // namespace

OutputFile::OutputFile(const std::string& path) : path_(path) {
  const std::filesystem::path parent = std::filesystem::path(path).parent_path();
  directory_ = parent.empty() ? "." : parent.string();
  temporary_path_ = path + ".tmp";
  std::error_code error;
  std::filesystem::create_directories(directory_, error);
  if (error) output_failed(directory_, "make the directory", error.value());
  directory_descriptor_ = lock_directory(directory_);
  if (unlink(temporary_path_.c_str()) == 0 || errno == ENOENT) return;
  const int unlink_error = errno;
  close(directory_descriptor_);
  output_failed(temporary_path_, "remove the stale temporary file", unlink_error);
}

OutputFile::~OutputFile() {
  if (state_ != State::committed) unlink(temporary_path_.c_str());
  close(directory_descriptor_);
}

OutputFile::Existing OutputFile::existing() const {
  struct stat status {};
  return stat(path_.c_str(), &status) == 0 ? Existing::yes : Existing::no;
}

void OutputFile::commit() {
  CHECK(state_ == State::writing);
  sync_path(temporary_path_, O_RDONLY);
  if (std::rename(temporary_path_.c_str(), path_.c_str()) != 0)
    output_failed(path_, "rename the finished file", errno);
  state_ = State::committed;
  sync_path(directory_, O_RDONLY | O_DIRECTORY);
}

}  // namespace cambium
