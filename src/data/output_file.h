// An output file that appears whole or not at all: temporary file, fsync, rename, directory fsync.
//
// The directory is locked meanwhile (flock, which ends with the process however it ends), so of two
// processes that make the same file the second waits and finds it, and a temporary file left by a
// process that was killed is known to be nobody's and is replaced.
#pragma once

#include <string>

namespace cambium {

class OutputFile {
 public:
  // Makes missing directories, waits for the directory's lock, removes a stale temporary file.
  // Errors: exit 31.
  explicit OutputFile(const std::string& path);
  // Removes the temporary file unless `commit` was called.
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  const std::string& path() const { return path_; }
  // Where to write; does not exist yet.
  const std::string& temporary_path() const { return temporary_path_; }
  // Whether the final file is there, which another process may have made while this one waited.
  enum class Existing { no, yes };
  Existing existing() const;
  // Syncs the temporary file, which must be complete and closed, and renames it to `path`.
  void commit();

 private:
  std::string path_, directory_, temporary_path_;
  int directory_descriptor_ = -1;
  enum class State { writing, committed } state_ = State::writing;
};

}  // namespace cambium
