#include "src/train/event_file.h"

#include <unistd.h>

#include <array>
#include <bit>
#include <chrono>
#include <cstring>

#include "src/base/check.h"

namespace cambium {
namespace {

static_assert(std::endian::native == std::endian::little, "the format is little-endian");

constexpr std::array<uint32_t, 256> make_crc_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t index = 0; index < 256; ++index) {
    uint32_t value = index;
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1) != 0 ? 0x82f63b78u : 0u);
    table[index] = value;
  }
  return table;
}
constexpr std::array<uint32_t, 256> kCrcTable = make_crc_table();

// Protocol buffer wire types.
constexpr uint32_t kVarint = 0;
constexpr uint32_t kFixed64 = 1;
constexpr uint32_t kLengthDelimited = 2;
constexpr uint32_t kFixed32 = 5;

void append_varint(std::string& out, uint64_t value) {
  for (; value >= 0x80; value >>= 7) out += static_cast<char>(value | 0x80);
  out += static_cast<char>(value);
}

void append_key(std::string& out, uint32_t field, uint32_t wire_type) {
  append_varint(out, field << 3 | wire_type);
}

template <class Value>
void append_raw(std::string& out, Value value) {
  char bytes[sizeof(Value)];
  std::memcpy(bytes, &value, sizeof(Value));
  out.append(bytes, sizeof(Value));
}

void append_bytes(std::string& out, uint32_t field, const std::string& bytes) {
  append_key(out, field, kLengthDelimited);
  append_varint(out, bytes.size());
  out += bytes;
}

std::string event_head(int64_t step) {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  std::string event;
  append_key(event, 1, kFixed64);
  append_raw(event, std::chrono::duration<double>(now).count());
  append_key(event, 2, kVarint);
  append_varint(event, static_cast<uint64_t>(step));
  return event;
}

std::string host_name() {
  std::array<char, 256> name{};
  if (gethostname(name.data(), name.size() - 1) != 0 || name[0] == '\0') return "host";
  std::string host = name.data();
  for (char& letter : host) {
    if (letter == '/') letter = '_';
  }
  return host;
}

}  // namespace

uint32_t crc32c(const std::string& bytes) {
  uint32_t crc = 0xffffffffu;
  for (const char byte : bytes) {
    crc = kCrcTable[(crc ^ static_cast<uint8_t>(byte)) & 0xff] ^ (crc >> 8);
  }
  return ~crc;
}

uint32_t masked_crc32c(const std::string& bytes) {
  return std::rotr(crc32c(bytes), 15) + 0xa282ead8u;
}

EventFile::EventFile(FileSystem& files, const std::string& directory, int64_t first_step)
    : files_(files) {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  int64_t seconds = std::chrono::duration_cast<std::chrono::seconds>(now).count();
  const std::string host = host_name();
  const auto path_at = [&](int64_t at) {
    return fmt::format("{}/events.out.tfevents.{:010}.{}", directory, at, host);
  };
  // An attempt that ended within this second has left its own file.
  while (files_.kind(path_at(seconds)) != EntryKind::missing) ++seconds;
  file_ = files_.create(path_at(seconds));

  std::string version = event_head(0);
  append_bytes(version, 3, "brain.Event:2");
  write_record(version);
  if (first_step > 1) {
    std::string session;
    append_key(session, 1, kVarint);
    append_varint(session, 1);  // START
    std::string event = event_head(first_step);
    append_bytes(event, 7, session);
    write_record(event);
  }
}

void EventFile::write(int64_t step, std::span<const Scalar> scalars) {
  CHECK_GE(step, 0);
  std::string summary;
  for (const Scalar& scalar : scalars) {
    std::string value;
    append_bytes(value, 1, scalar.tag);
    append_key(value, 2, kFixed32);
    append_raw(value, static_cast<float>(scalar.value));
    append_bytes(summary, 1, value);
  }
  std::string event = event_head(step);
  append_bytes(event, 5, summary);
  write_record(event);
}

void EventFile::write_record(const std::string& payload) {
  std::string length;
  append_raw(length, static_cast<uint64_t>(payload.size()));
  std::string record = length;
  append_raw(record, masked_crc32c(length));
  record += payload;
  append_raw(record, masked_crc32c(payload));
  files_.write(file_, std::as_bytes(std::span(record)));
}

}  // namespace cambium
