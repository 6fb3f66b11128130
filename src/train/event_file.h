// EventFile: TensorBoard's event file, scalars only.
//
// A file is a sequence of TFRecords: u64 length, masked CRC32C of the length, payload, masked
// CRC32C of the payload, little-endian. The payload is an `Event` protocol buffer, of which four
// fields are written: wall_time (1), step (2), file_version (3) or summary (5) or session_log (7).
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "src/base/io.h"

namespace cambium {

struct Scalar {
  std::string tag;
  double value = 0;
};

// CRC-32C (Castagnoli), and the rotation and offset that TFRecord adds to it.
uint32_t crc32c(const std::string& bytes);
uint32_t masked_crc32c(const std::string& bytes);

class EventFile {
 public:
  // Creates events.out.tfevents.<Unix seconds>.<host> in `directory`. With `first_step` > 1 readers
  // are told to drop what earlier files hold from that step on (SessionLog START).
  EventFile(FileSystem& files, const std::string& directory, int64_t first_step);
  // One record; numbers are stored as float, as the format has it.
  void write(int64_t step, std::span<const Scalar> scalars);

 private:
  void write_record(const std::string& payload);
  FileSystem& files_;
  File file_;
};

}  // namespace cambium
