// HDF5 files: round trips, and refusal of everything that reaches outside the file or is damaged.
#include "src/base/hdf5_file.h"

#include <gtest/gtest.h>
#include <hdf5.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>

#include "src/base/error.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;

// A directory of one test, removed at its end.
class Hdf5FileTest : public testing::Test {
 protected:
  Hdf5FileTest() {
    directory_ = fs::temp_directory_path() / ("cambium-hdf5-" + std::to_string(getpid()));
    fs::remove_all(directory_);
    fs::create_directories(directory_);
    path_ = (directory_ / "file.h5").string();
  }
  ~Hdf5FileTest() override { fs::remove_all(directory_); }

  int read_exit_code(const std::string& name) const {
    try {
      Hdf5Reader(path_).dataset_info(name);
    } catch (const Error& error) {
      return static_cast<int>(error.exit_code());
    }
    return 0;
  }
  // A raw file made with the C API by `make(file)`.
  template <class Make>
  void raw_file(Make&& make) {
    const hid_t file = H5Fcreate(path_.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    ASSERT_GE(file, 0);
    make(file);
    ASSERT_GE(H5Fclose(file), 0);
  }

  fs::path directory_;
  std::string path_;
};

template <class T>
std::vector<T> ramp(int64_t count) {
  std::vector<T> values(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) values[static_cast<size_t>(i)] = static_cast<T>(i * 7 + 1);
  return values;
}

template <class T>
void write_both(Hdf5Writer& writer, const std::string& name, int64_t count) {
  writer.write_dataset<T>(name + "_contiguous", Hdf5Storage::contiguous, ramp<T>(count));
  writer.write_dataset<T>(name + "_checked", Hdf5Storage::checked, ramp<T>(count));
}

template <class T>
void expect_both(const Hdf5Reader& reader, const std::string& name, int64_t count) {
  EXPECT_EQ(reader.read_dataset<T>(name + "_contiguous"), ramp<T>(count));
  EXPECT_EQ(reader.read_dataset<T>(name + "_checked"), ramp<T>(count));
}

TEST_F(Hdf5FileTest, EveryTypeAndStorageRoundTrips) {
  for (int64_t count : {0, 1, 1000, 300'001}) {
    fs::remove(path_);
    Hdf5Writer writer(path_);
    write_both<uint8_t>(writer, "u8", count);
    write_both<uint16_t>(writer, "u16", count);
    write_both<uint32_t>(writer, "u32", count);
    write_both<uint64_t>(writer, "u64", count);
    write_both<int32_t>(writer, "i32", count);
    write_both<float>(writer, "f32", count);
    write_both<double>(writer, "f64", count);
    writer.close();
    const Hdf5Reader reader(path_);
    expect_both<uint8_t>(reader, "u8", count);
    expect_both<uint16_t>(reader, "u16", count);
    expect_both<uint32_t>(reader, "u32", count);
    expect_both<uint64_t>(reader, "u64", count);
    expect_both<int32_t>(reader, "i32", count);
    expect_both<float>(reader, "f32", count);
    expect_both<double>(reader, "f64", count);
    EXPECT_EQ(reader.dataset_presence("absent"), Hdf5Reader::Presence::absent);
  }
}

TEST_F(Hdf5FileTest, AttributesRoundTrip) {
  Hdf5Writer writer(path_);
  writer.write_attribute("text", "Emma \xc3\xa9");
  writer.write_attribute("empty", "");
  writer.write_attribute("large", std::string(9000, 'x'));
  writer.write_attribute("count", ~uint64_t{0});
  writer.write_attribute("ratio", 0.1);
  writer.close();
  const Hdf5Reader reader(path_);
  EXPECT_EQ(reader.string_attribute("text"), "Emma \xc3\xa9");
  EXPECT_EQ(reader.string_attribute("empty"), "");
  EXPECT_EQ(reader.string_attribute("large"), std::string(9000, 'x'));
  EXPECT_EQ(reader.u64_attribute("count"), ~uint64_t{0});
  EXPECT_EQ(reader.f64_attribute("ratio"), 0.1);
  EXPECT_THROW(reader.u64_attribute("text"), Error);
  EXPECT_THROW(reader.u64_attribute("absent"), Error);
}

TEST_F(Hdf5FileTest, RangesAreWrittenAndReadInPieces) {
  const std::vector<uint16_t> all = ramp<uint16_t>(1'000'000);
  for (Hdf5Storage storage : {Hdf5Storage::contiguous, Hdf5Storage::checked}) {
    fs::remove(path_);
    Hdf5Writer writer(path_);
    writer.create_dataset("tokens", Hdf5Type::u16, storage, all.size());
    for (uint64_t first = 0; first < all.size(); first += 333'333)
      writer.write_range("tokens", Hdf5Type::u16,
                         {first, std::min<uint64_t>(333'333, all.size() - first)}, &all[first]);
    writer.close();
    const Hdf5Reader reader(path_);
    std::vector<uint16_t> piece(70'000);
    reader.read_range("tokens", Hdf5Type::u16, {555'555, piece.size()}, piece.data());
    EXPECT_TRUE(std::equal(piece.begin(), piece.end(), all.begin() + 555'555));
    EXPECT_THROW(reader.read_range("tokens", Hdf5Type::u16, {999'999, 2}, piece.data()), Error);
    EXPECT_THROW(reader.read_range("tokens", Hdf5Type::u32, {0, 2}, piece.data()), Error);
  }
}

TEST_F(Hdf5FileTest, ContiguousBytesLieWhereTheInfoSays) {
  const std::vector<uint32_t> all = ramp<uint32_t>(5000);
  Hdf5Writer writer(path_);
  writer.write_dataset<uint32_t>("tokens", Hdf5Storage::contiguous, all);
  writer.close();
  const Hdf5DatasetInfo info = Hdf5Reader(path_).dataset_info("tokens");
  EXPECT_EQ(info.element_count, 5000u);
  std::ifstream file(path_, std::ios::binary);
  file.seekg(static_cast<std::streamoff>(info.file_offset_bytes));
  std::vector<uint32_t> read(all.size());
  file.read(reinterpret_cast<char*>(read.data()), 20'000);
  EXPECT_EQ(read, all);
}

TEST_F(Hdf5FileTest, SameContentGivesTheSameBytes) {
  std::string bytes[2];
  for (std::string& content : bytes) {
    fs::remove(path_);
    Hdf5Writer writer(path_);
    writer.write_attribute("count", uint64_t{3});
    write_both<float>(writer, "x", 100);
    writer.close();
    std::ifstream file(path_, std::ios::binary);
    content.assign(std::istreambuf_iterator<char>(file), {});
    usleep(1'100'000);  // HDF5's time stamps count seconds
  }
  EXPECT_EQ(bytes[0], bytes[1]);
}

TEST_F(Hdf5FileTest, WriterRefusesAnExistingFileAndAMissingDirectory) {
  { Hdf5Writer writer(path_); }
  EXPECT_THROW(Hdf5Writer writer(path_), Error);
  EXPECT_THROW(Hdf5Writer writer((directory_ / "none" / "x.h5").string()), Error);
}

TEST_F(Hdf5FileTest, MissingAndForeignFilesHaveTheirExitCodes) {
  EXPECT_EQ(read_exit_code("x"), 31);
  std::ofstream(path_) << "this is not HDF5";
  EXPECT_EQ(read_exit_code("x"), 30);
  path_ = directory_.string();
  EXPECT_EQ(read_exit_code("x"), 34);
}

TEST_F(Hdf5FileTest, AFileBeingWrittenIsRefusedWithTheLockingVariable) {
  Hdf5Writer writer(path_);
  // The same process may not open its own file twice with different access either.
  EXPECT_NE(read_exit_code("x"), 0);
}

// Rows of an inner axis, in any order, land where row-major numbers say; chunks are whole or not.
TEST_F(Hdf5FileTest, ArraysOfSeveralAxesKeepRowMajorOrder) {
  const std::vector<uint64_t> extents = {3, 10, 250, 100};  // a chunk holds 10 rows of 250 x 100
  const uint64_t rows = 3 * 10, row = 250 * 100;
  std::vector<int32_t> values(rows * row);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<int32_t>(i * 7);
  std::vector<std::string> files;
  for (const char* name : {"a.h5", "b.h5"}) {
    Hdf5Writer writer((directory_ / name).string());
    writer.create_dataset("x", Hdf5Type::i32, Hdf5Storage::checked, extents);
    for (uint64_t r = 0; r < rows; r += 2) {  // pairs of rows: not a whole outer row
      writer.write_range("x", Hdf5Type::i32, {r * row, 2 * row}, values.data() + r * row);
    }
    writer.close();
    std::ifstream file(directory_ / name, std::ios::binary);
    files.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  EXPECT_TRUE(files[0] == files[1]);
  const Hdf5Reader reader((directory_ / "a.h5").string());
  EXPECT_EQ(reader.dataset_info("x", 4).extents, extents);
  EXPECT_THROW(reader.dataset_info("x", 2), Error);
  std::vector<int32_t> part(3 * 100);
  reader.read_range("x", Hdf5Type::i32, {23 * row + 100 * 17, part.size()}, part.data());
  EXPECT_TRUE(std::equal(part.begin(), part.end(), values.begin() + 23 * row + 100 * 17));
  std::vector<int32_t> all(values.size());
  reader.read_range("x", Hdf5Type::i32, {0, all.size()}, all.data());
  EXPECT_TRUE(all == values);
}

// ---- Files that no writer of ours makes.

TEST_F(Hdf5FileTest, RefusesLinks) {
  raw_file([](hid_t file) {
    ASSERT_GE(H5Lcreate_external("/etc/hostname", "/x", file, "x", H5P_DEFAULT, H5P_DEFAULT), 0);
    ASSERT_GE(H5Lcreate_soft("/other", file, "y", H5P_DEFAULT, H5P_DEFAULT), 0);
    H5Gclose(H5Gcreate2(file, "group", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
  });
  EXPECT_EQ(read_exit_code("x"), 34);
  EXPECT_EQ(read_exit_code("y"), 34);
  EXPECT_EQ(read_exit_code("group"), 34);
  EXPECT_EQ(read_exit_code("absent"), 30);
}

// Creates dataset "x" with the given type, extents and creation properties.
void raw_dataset(hid_t file, hid_t type, std::vector<hsize_t> extents, hid_t creation) {
  const hid_t space = H5Screate_simple(static_cast<int>(extents.size()), extents.data(), nullptr);
  const hid_t dataset = H5Dcreate2(file, "x", type, space, H5P_DEFAULT, creation, H5P_DEFAULT);
  ASSERT_GE(dataset, 0);
  H5Dclose(dataset);
  H5Sclose(space);
}

TEST_F(Hdf5FileTest, RefusesExternalStorage) {
  raw_file([](hid_t file) {
    const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
    ASSERT_GE(H5Pset_external(creation, "/etc/hostname", 0, 4), 0);
    raw_dataset(file, H5T_STD_U8LE, {4}, creation);
    H5Pclose(creation);
  });
  EXPECT_EQ(read_exit_code("x"), 34);
}

TEST_F(Hdf5FileTest, RefusesVirtualDatasets) {
  raw_file([](hid_t file) {
    const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
    const hsize_t extent = 4;
    const hid_t space = H5Screate_simple(1, &extent, nullptr);
    ASSERT_GE(H5Pset_virtual(creation, space, "/etc/hostname", "x", space), 0);
    raw_dataset(file, H5T_STD_U8LE, {4}, creation);
    H5Sclose(space);
    H5Pclose(creation);
  });
  EXPECT_EQ(read_exit_code("x"), 34);
}

TEST_F(Hdf5FileTest, RefusesOtherFiltersTypesAndRanks) {
  raw_file([](hid_t file) {
    const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
    const hsize_t chunk = 64;
    H5Pset_chunk(creation, 1, &chunk);
    ASSERT_GE(H5Pset_nbit(creation), 0);
    raw_dataset(file, H5T_STD_U8LE, {64}, creation);
    H5Pclose(creation);
  });
  EXPECT_EQ(read_exit_code("x"), 34);
  const hid_t text = H5Tcopy(H5T_C_S1);
  H5Tset_size(text, H5T_VARIABLE);
  for (hid_t type : {text, H5T_STD_U16BE, H5T_STD_I64LE}) {
    raw_file([&](hid_t file) { raw_dataset(file, type, {4}, H5P_DEFAULT); });
    EXPECT_EQ(read_exit_code("x"), 34);
  }
  H5Tclose(text);
  raw_file([](hid_t file) { raw_dataset(file, H5T_STD_U8LE, {4, 4}, H5P_DEFAULT); });
  EXPECT_EQ(read_exit_code("x"), 34);
}

TEST_F(Hdf5FileTest, RefusesDeclaredSizesBeyondTheFile) {
  raw_file([](hid_t file) {
    // Nothing is allocated for these elements: reading would invent zeros.
    raw_dataset(file, H5T_STD_U64LE, {1'000'000'000'000}, H5P_DEFAULT);
  });
  EXPECT_EQ(read_exit_code("x"), 30);
}

}  // namespace
}  // namespace cambium
