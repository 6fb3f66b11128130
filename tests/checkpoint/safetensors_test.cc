// Safetensors: what is accepted, what is refused with which code, sharded directories, mutations.
#include "src/checkpoint/safetensors.h"

#include <sys/stat.h>

#include <bit>
#include <cmath>
#include <fstream>
#include <limits>

#include "gtest/gtest.h"
#include "tests/checkpoint/checkpoint_testing.h"
#include "tests/fuzz/safetensors_mutations.h"

namespace cambium {
namespace {

int parse_code(const std::string& bytes) {
  return outcome_of([&] { check_safetensors_bytes(bytes); }).code;
}

TEST(Safetensors, SampleIsAccepted) { EXPECT_EQ(parse_code(sample_safetensors()), 0); }

TEST(Safetensors, RefusesBrokenAndMisleadingHeaders) {
  struct Row {
    int code;
    const char* header;
    int64_t data_bytes;
  };
  const Row rows[] = {
      {0, R"({})", 0},
      {0, R"({"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}   )", 16},
      // Damage: exit 30.
      {30, R"({})", 1},
      {30, R"([])", 0},
      {30, R"( {})", 0},
      {30, R"({"w":1})", 0},
      {30, R"({"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]})", 16},
      {30, R"({"w":{"dtype":"F31","shape":[4],"data_offsets":[0,16]}})", 16},
      {30, R"({"w":{"dtype":7,"shape":[4],"data_offsets":[0,16]}})", 16},
      {30, R"({"w":{"dtype":"F32","shape":[4.0],"data_offsets":[0,16]}})", 16},
      {30, R"({"w":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}})", 16},
      {30, R"({"w":{"dtype":"F32","shape":"4","data_offsets":[0,16]}})", 16},
      {30, R"({"w":{"dtype":"F32","shape":[4],"data_offsets":[0,12]}})", 12},
      {30, R"({"w":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}})", 16},
      {30, R"({"w":{"dtype":"F32","shape":[4],"data_offsets":[0]}})", 16},
      {30, R"({"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}})", 15},  // truncated
      {30, R"({"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}})", 17},  // bytes behind
      {30, R"({"w":{"dtype":"F32","shape":[4],"data_offsets":[4,20]}})", 20},  // hole
      {30, R"({"w":{"dtype":"F32","shape":[4]}})", 16},
      {30, R"({"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16],"x":1}})", 16},
      {30, R"({"__metadata__":{"a":1}})", 0},
      {30, R"({"__metadata__":[]})", 0},
      {30,
       R"({"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
       R"("w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
       2},  // twice
      {30,
       R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
       R"("b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
       3},  // overlap
      {30, R"({"w":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}})", 1},
      {30, R"({"w":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,1]}})", 1},
      {30,
       R"({"w":{"dtype":"U8","shape":[9223372036854775807],)"
       R"("data_offsets":[0,9223372036854775807]}})",
       1},
      {30,
       R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8",)"
       R"("shape":[9223372036854775806],"data_offsets":[1,9223372036854775807]}})",
       1},
      // Built to mislead: exit 34.
      {34,
       R"({"w":{"dtype":"F32","shape":[4194305,4194305,211106198978564],)"
       R"("data_offsets":[0,16]}})",
       16},
      {34, R"({"w":{"dtype":"F64","shape":[4611686018427387904],"data_offsets":[0,0]}})", 0},
  };
  for (const Row& row : rows) {
    EXPECT_EQ(parse_code(safetensors_bytes(row.header, row.data_bytes)), row.code) << row.header;
  }
  EXPECT_EQ(parse_code(""), 30);
  EXPECT_EQ(parse_code("1234567"), 30);
  EXPECT_EQ(parse_code(std::string(8, '\0')), 30);
  EXPECT_EQ(parse_code(std::string(8, '\xff')), 34);
  EXPECT_EQ(parse_code(safetensors_bytes("{" + std::string(1000000, '['), 0)), 30);
}

TEST(Safetensors, HeaderCaps) {
  std::string many = "{";
  for (int64_t i = 0; i <= kMostSafetensorsTensors; ++i) {
    many += fmt::format("{}\"{}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}",
                        i == 0 ? "" : ",", i);
  }
  EXPECT_EQ(parse_code(safetensors_bytes(many + "}", 0)), 34);
  std::string large = "{}" + std::string(static_cast<size_t>(kMostSafetensorsHeaderBytes) - 2, ' ');
  EXPECT_EQ(parse_code(safetensors_bytes(large, 0)), 0);
  EXPECT_EQ(parse_code(safetensors_bytes(large + " ", 0)), 34);
}

TEST(Safetensors, WrittenFilesReadBackInEveryType) {
  const TemporaryDirectory directory;
  FileSystem files;
  const std::string path = directory.path() + "/t.safetensors";
  const std::vector<float> values = {1.0f, -0.0f, 1.00390625f, 3.4e38f, -1e-40f, 0.1f};
  SafetensorsWriter writer(files, path,
                           {{.name = "z", .type = StoredType::f32, .shape = {2, 3}},
                            {.name = "a", .type = StoredType::bf16, .shape = {6}}});
  EXPECT_EQ(writer.order()[0].name, "a");
  writer.append(values);
  writer.append(std::span(values).first(4));
  writer.append(std::span(values).subspan(4));
  EXPECT_EQ(files.kind(path), EntryKind::missing);
  writer.finish();
  SafetensorsReader reader = SafetensorsReader::open_file(files, path);
  std::vector<float> read(6);
  reader.read_f32("z", 0, read);
  for (size_t i = 0; i < 6; ++i) {
    EXPECT_EQ(std::bit_cast<uint32_t>(read[i]), std::bit_cast<uint32_t>(values[i]));
  }
  reader.read_f32("a", 0, read);
  EXPECT_EQ(read[0], 1.0f);
  EXPECT_TRUE(std::signbit(read[1]));
  EXPECT_EQ(read[2], 1.0f);  // a tie goes to even
  EXPECT_EQ(read[3], std::numeric_limits<float>::infinity());
  EXPECT_NEAR(read[5], 0.1f, 0.1f / 256);
  EXPECT_EQ(outcome_of([&] { reader.at("b"); }).code, 30);
}

TEST(Safetensors, HalfPrecisionConvertsExactly) {
  const TemporaryDirectory directory;
  FileSystem files;
  const std::string path = directory.path() + "/t.safetensors";
  const uint16_t halves[] = {0x3c00, 0xc000, 0x0001, 0x03ff, 0x0400, 0x7bff, 0x7c00, 0x8000};
  const float expected[] = {1.0f,
                            -2.0f,
                            0x1p-24f,
                            1023 * 0x1p-24f,
                            0x1p-14f,
                            65504,
                            std::numeric_limits<float>::infinity(),
                            -0.0f};
  std::string bytes =
      safetensors_bytes(R"({"h":{"dtype":"F16","shape":[8],"data_offsets":[0,16]}})", 0);
  bytes.append(reinterpret_cast<const char*>(halves), sizeof(halves));
  write_text(path, bytes);
  SafetensorsReader reader = SafetensorsReader::open_file(files, path);
  std::vector<float> read(8);
  reader.read_f32("h", 0, read);
  for (size_t i = 0; i < 8; ++i) {
    EXPECT_EQ(std::bit_cast<uint32_t>(read[i]), std::bit_cast<uint32_t>(expected[i])) << i;
  }
}

class ShardedDirectory : public ::testing::Test {
 protected:
  ShardedDirectory() {
    for (const char* name : {"one", "two"}) {
      const std::string header =
          fmt::format(R"({{"{}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}})", name);
      write_text(file(name), safetensors_bytes(header, 4));
    }
  }
  std::string file(const std::string& name) const {
    return directory_.path() + "/" + name + ".safetensors";
  }
  int open_with(const std::string& weight_map) {
    write_text(directory_.path() + "/model.safetensors.index.json",
               R"({"metadata":{},"weight_map":)" + weight_map + "}");
    return outcome_of([&] { SafetensorsReader::open_directory(files_, directory_.path()); }).code;
  }
  TemporaryDirectory directory_;
  FileSystem files_;
};

TEST_F(ShardedDirectory, ShardsAreReadAndTheirNamesChecked) {
  EXPECT_EQ(open_with(R"({"one":"one.safetensors","two":"two.safetensors"})"), 0);
  EXPECT_EQ(open_with(R"({"one":"two.safetensors","two":"one.safetensors"})"), 30);
  EXPECT_EQ(open_with(R"({"one":"one.safetensors","three":"two.safetensors"})"), 30);
  EXPECT_EQ(open_with(R"({"one":"none.safetensors"})"), 30);
  EXPECT_EQ(open_with(R"({"one":"../one.safetensors"})"), 34);
  EXPECT_EQ(open_with(R"({"one":"/etc/passwd"})"), 34);
  EXPECT_EQ(open_with(R"({"one":".."})"), 34);
  EXPECT_EQ(open_with(R"({"one":"a\u0000b"})"), 34);
  EXPECT_EQ(open_with(R"({"one":1})"), 34);
  EXPECT_EQ(open_with(R"([])"), 30);
  write_text(file("two"),
             safetensors_bytes(R"({"one":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4));
  EXPECT_EQ(open_with(R"({"one":"one.safetensors","two":"two.safetensors"})"), 30);  // twice
}

TEST_F(ShardedDirectory, OnlyRegularFilesAreOpened) {
  ASSERT_EQ(::mkfifo(file("pipe").c_str(), 0600), 0);
  EXPECT_EQ(open_with(R"({"one":"pipe.safetensors"})"), 34);
  EXPECT_EQ(outcome_of([&] { SafetensorsReader::open_file(files_, "/dev/zero"); }).code, 34);
  std::filesystem::remove(directory_.path() + "/model.safetensors.index.json");
  EXPECT_EQ(outcome_of([&] { SafetensorsReader::open_directory(files_, directory_.path()); }).code,
            2);
}

}  // namespace
}  // namespace cambium
