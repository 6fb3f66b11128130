// TensorBoard event files, read back by a plain decoder of TFRecord and protocol buffers.
#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <sstream>

#include "src/train/event_file.h"
#include "src/train/metrics_writer.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;

template <class Value>
Value raw(const std::string& bytes, size_t at) {
  Value value{};
  std::memcpy(&value, bytes.data() + at, sizeof(Value));
  return value;
}

// One field of a message: a number for wire types 0, 1, 5 (raw bits), bytes for 2.
struct Field {
  uint32_t number = 0;
  uint64_t bits = 0;
  std::string bytes;
};

uint64_t take_varint(const std::string& bytes, size_t& at) {
  uint64_t value = 0;
  for (int shift = 0;; shift += 7) {
    const auto byte = static_cast<uint8_t>(bytes.at(at++));
    value |= static_cast<uint64_t>(byte & 0x7f) << shift;
    if ((byte & 0x80) == 0) return value;
  }
}

std::vector<Field> decode(const std::string& message) {
  std::vector<Field> fields;
  for (size_t at = 0; at < message.size();) {
    const uint64_t key = take_varint(message, at);
    Field field;
    field.number = static_cast<uint32_t>(key >> 3);
    switch (key & 7) {
      case 0:
        field.bits = take_varint(message, at);
        break;
      case 1:
        field.bits = raw<uint64_t>(message, at);
        at += 8;
        break;
      case 2: {
        const size_t length = take_varint(message, at);
        field.bytes = message.substr(at, length);
        at += length;
        break;
      }
      case 5:
        field.bits = raw<uint32_t>(message, at);
        at += 4;
        break;
      default:
        ADD_FAILURE() << "wire type " << (key & 7);
        return fields;
    }
    fields.push_back(field);
  }
  return fields;
}

struct DecodedEvent {
  double wall_time = 0;
  int64_t step = 0;
  std::string version;
  std::map<std::string, float> scalars;
  std::optional<uint64_t> session_status;
};

DecodedEvent decode_event(const std::string& message) {
  DecodedEvent event;
  for (const Field& field : decode(message)) {
    if (field.number == 1) std::memcpy(&event.wall_time, &field.bits, 8);
    if (field.number == 2) event.step = static_cast<int64_t>(field.bits);
    if (field.number == 3) event.version = field.bytes;
    if (field.number == 7) event.session_status = decode(field.bytes).at(0).bits;
    if (field.number != 5) continue;
    for (const Field& value : decode(field.bytes)) {
      std::string tag;
      float scalar = 0;
      for (const Field& part : decode(value.bytes)) {
        if (part.number == 1) tag = part.bytes;
        if (part.number == 2) std::memcpy(&scalar, &part.bits, 4);
      }
      event.scalars[tag] = scalar;
    }
  }
  return event;
}

std::vector<DecodedEvent> decode_file(const fs::path& path) {
  std::ifstream stream(path, std::ios::binary);
  std::ostringstream text;
  text << stream.rdbuf();
  const std::string bytes = text.str();
  std::vector<DecodedEvent> events;
  for (size_t at = 0; at < bytes.size();) {
    const auto length = raw<uint64_t>(bytes, at);
    EXPECT_EQ(raw<uint32_t>(bytes, at + 8), masked_crc32c(bytes.substr(at, 8)));
    const std::string payload = bytes.substr(at + 12, length);
    EXPECT_EQ(raw<uint32_t>(bytes, at + 12 + length), masked_crc32c(payload));
    events.push_back(decode_event(payload));
    at += 16 + length;
  }
  return events;
}

std::vector<fs::path> event_files(const std::string& directory) {
  std::vector<fs::path> paths;
  for (const auto& entry : fs::directory_iterator(directory)) {
    if (entry.path().filename().string().rfind("events.out.tfevents.", 0) == 0) {
      paths.push_back(entry.path());
    }
  }
  std::sort(paths.begin(), paths.end());
  return paths;
}

TEST(EventFile, Crc32cKnownAnswers) {
  EXPECT_EQ(crc32c("123456789"), 0xE3069283u);
  EXPECT_EQ(crc32c(std::string(32, '\0')), 0x8A9136AAu);    // RFC 3720, B.4
  EXPECT_EQ(crc32c(std::string(32, '\xff')), 0x62A8AB43u);  // RFC 3720, B.4
  EXPECT_EQ(crc32c(""), 0u);
}

TEST(EventFile, AttemptsWriteTheirOwnFilesAndTellWhereTheyResume) {
  std::string pattern = (fs::temp_directory_path() / "cambium-events-XXXXXX").string();
  ASSERT_NE(mkdtemp(pattern.data()), nullptr);
  StepMetrics metrics;
  metrics.expert_load = {{}, {30, 10}};
  {
    MetricsWriter writer(pattern, 0, EventFiles::on);
    for (metrics.step = 1; metrics.step <= 300; ++metrics.step) {
      metrics.loss = 1.0 / static_cast<double>(metrics.step);
      writer.write_step(metrics);
    }
  }
  {
    MetricsWriter writer(pattern, 200, EventFiles::on);
    metrics.step = 201;
    metrics.validation_loss = 0.25;
    writer.write_step(metrics);
  }
  const std::vector<fs::path> paths = event_files(pattern);
  ASSERT_EQ(paths.size(), 2u);
  const std::vector<DecodedEvent> first = decode_file(paths[0]);
  ASSERT_EQ(first.size(), 301u);
  EXPECT_EQ(first[0].version, "brain.Event:2");
  EXPECT_GT(first[0].wall_time, 1.7e9);
  EXPECT_EQ(first[300].step, 300);
  EXPECT_EQ(first[300].scalars.at("train/loss"), static_cast<float>(1.0 / 300.0));
  EXPECT_EQ(first[300].scalars.at("expert_imbalance/layer_1"), 1.5f);
  EXPECT_EQ(first[300].scalars.count("expert_imbalance/layer_0"), 0u);
  EXPECT_EQ(first[300].scalars.count("validation/loss"), 0u);
  const std::vector<DecodedEvent> second = decode_file(paths[1]);
  ASSERT_EQ(second.size(), 3u);
  EXPECT_EQ(second[1].session_status, 1u);
  EXPECT_EQ(second[1].step, 201);
  EXPECT_EQ(second[2].scalars.at("validation/loss"), 0.25f);
  fs::remove_all(pattern);
}

}  // namespace
}  // namespace cambium
