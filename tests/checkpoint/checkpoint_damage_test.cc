// Batteries against wrong files: random damage to every file of a checkpoint (never a wrong
// success, always the newest good one), and forged checkpoints whose hashes are right.
#include <hdf5.h>
#include <sys/stat.h>

#include <fstream>

#include "gtest/gtest.h"
#include "src/base/digest.h"
#include "src/checkpoint/manifest.h"
#include "tests/checkpoint/checkpoint_samples.h"
#include "tests/checkpoint/checkpoint_testing.h"
#include "tests/fuzz/safetensors_mutations.h"

namespace cambium {
namespace {

constexpr int64_t kDamagedStep = 15;
constexpr int64_t kSpareStep = 10;

class DamageBattery : public ::testing::Test {
 protected:
  DamageBattery() {
    save_sample(files_, directory_.path(), kSpareStep, 2);
    save_sample(files_, directory_.path(), kDamagedStep, 2);
    newest_ = checkpoint_path(directory_.path(), kDamagedStep);
  }
  std::string read(const std::string& name) {
    return files_.read_file(newest_ + "/" + name, int64_t{1} << 30, Symlinks::refuse);
  }
  // Opens what there is; the step that loads, or the negated exit code.
  int64_t open_step() {
    int64_t step = 0;
    const Outcome outcome = outcome_of([&] {
      const NewestCheckpoint newest = open_newest_checkpoint(files_, directory_.path());
      step = newest.reader->state().step;
      EXPECT_EQ(newest.reader->state(), sample_state(step));
      EXPECT_EQ(newest.warnings.size(), step == kDamagedStep ? 0u : 1u);
    });
    return outcome.code == 0 ? step : -outcome.code;
  }

  FileSystem files_;
  TemporaryDirectory directory_;
  std::string newest_;
};

TEST_F(DamageBattery, RandomDamageIsAlwaysFound) {
  constexpr int kMutations = 24000;
  MutationRandom random(20260102);
  const std::vector<std::string> names = files_.list(newest_);
  ASSERT_EQ(names.size(), 5u);
  std::vector<std::string> contents;
  for (const std::string& name : names) contents.push_back(read(name));
  int unchanged = 0;
  for (int i = 0; i < kMutations; ++i) {
    const size_t chosen = random.below(names.size());
    const std::string bytes = mutate(contents[chosen], random);
    write_text(newest_ + "/" + names[chosen], bytes);
    const bool same = bytes == contents[chosen];
    ASSERT_EQ(open_step(), same ? kDamagedStep : kSpareStep) << names[chosen] << " mutation " << i;
    write_text(newest_ + "/" + names[chosen], contents[chosen]);
    unchanged += same ? 1 : 0;
  }
  EXPECT_LT(unchanged, kMutations / 50);
  EXPECT_EQ(open_step(), kDamagedStep);
  fmt::print("{} mutations of a checkpoint's files: {} changed nothing, the rest were found\n",
             kMutations, unchanged);
}

TEST_F(DamageBattery, TruncationAtEveryLengthIsFound) {
  for (const std::string& name : files_.list(newest_)) {
    const std::string bytes = read(name);
    const size_t stride = bytes.size() > 4096 ? 257 : 1;
    for (size_t length = 0; length < bytes.size(); length += stride) {
      write_text(newest_ + "/" + name, bytes.substr(0, length));
      ASSERT_EQ(open_step(), kSpareStep) << name << " " << length;
    }
    write_text(newest_ + "/" + name, bytes);
  }
}

TEST_F(DamageBattery, AMissingFileIsFound) {
  for (const std::string& name : files_.list(newest_)) {
    const std::string bytes = read(name);
    files_.remove_file(newest_ + "/" + name);
    ASSERT_EQ(open_step(), kSpareStep) << name;
    write_text(newest_ + "/" + name, bytes);
  }
}

TEST_F(DamageBattery, FilesExchangedBetweenCheckpointsAreFound) {
  const std::string older = checkpoint_path(directory_.path(), kSpareStep);
  for (const std::string& name : files_.list(newest_)) {
    const std::string bytes = read(name);
    write_text(newest_ + "/" + name,
               files_.read_file(older + "/" + name, int64_t{1} << 30, Symlinks::refuse));
    ASSERT_EQ(open_step(), kSpareStep) << name;
    write_text(newest_ + "/" + name, bytes);
  }
}

TEST_F(DamageBattery, LinksAndPipesAreRefused) {
  const TemporaryDirectory elsewhere;
  for (const std::string& name : files_.list(newest_)) {
    const std::string path = newest_ + "/" + name;
    const std::string moved = elsewhere.path() + "/" + name;
    std::filesystem::rename(path, moved);
    std::filesystem::create_symlink(moved, path);
    ASSERT_EQ(open_step(), -34) << name;
    files_.remove_file(path);
    ASSERT_EQ(::mkfifo(path.c_str(), 0600), 0);
    ASSERT_EQ(open_step(), -34) << name;
    files_.remove_file(path);
    std::filesystem::rename(moved, path);
  }
  std::filesystem::rename(newest_, elsewhere.path() + "/step");
  std::filesystem::create_symlink(elsewhere.path() + "/step", newest_);
  EXPECT_EQ(open_step(), -34);
}

// Forgeries: manifest, indexes and hashes agree with each other, and the content is hostile.
class ForgeryBattery : public DamageBattery {
 protected:
  ForgeryBattery() {
    manifest_ = decode_manifest(read("manifest.json"), "manifest");
    index_ = decode_index(read(index_file_name(0, 2)), "index");
  }
  void write_manifest() { write_text(newest_ + "/manifest.json", encode_manifest(manifest_)); }
  void write_index(const std::string& text) {
    write_text(newest_ + "/" + index_file_name(0, 2), text);
    manifest_.indexes[0].bytes = static_cast<int64_t>(text.size());
    manifest_.indexes[0].hash = xxh3_128(text.data(), text.size()).hex();
    write_manifest();
  }
  // Makes the file that stands there as shard 0 part of a consistent checkpoint.
  void adopt_shard() {
    const std::string bytes = read(shard_file_name(0, 2));
    index_.shard.bytes = manifest_.shards[0].bytes = static_cast<int64_t>(bytes.size());
    index_.shard.hash = manifest_.shards[0].hash = xxh3_128(bytes.data(), bytes.size()).hex();
    write_index(encode_index(index_));
  }
  int open_and_read() {
    return outcome_of([&] {
             CheckpointReader reader(files_, newest_, ShardCheck::at_open);
             for (const auto& [name, elements] : reader.tensors()) {
               std::vector<float> values(static_cast<size_t>(elements));
               reader.read(name, 0, values);
             }
           })
        .code;
  }
  Manifest manifest_;
  ShardIndex index_;
};

TEST_F(ForgeryBattery, FileNamesInTheManifest) {
  write_manifest();
  ASSERT_EQ(open_and_read(), 0);  // the forging tools alone change nothing
  for (const char* name : {"../x.h5", "/etc/passwd", "..", "", "a/b", "a\nb"}) {
    Manifest saved = manifest_;
    manifest_.shards[1].file = name;
    write_manifest();
    EXPECT_EQ(open_and_read(), 34) << name;
    manifest_ = saved;
    manifest_.indexes[1].file = name;
    write_manifest();
    EXPECT_EQ(open_and_read(), 34) << name;
    manifest_ = saved;
  }
  manifest_.shards[1].file = shard_file_name(0, 2);  // one shard twice
  write_manifest();
  EXPECT_EQ(open_and_read(), 30);
}

TEST_F(ForgeryBattery, SizesAndListsInTheManifest) {
  manifest_.shards[0].bytes = INT64_MAX;
  write_manifest();
  EXPECT_EQ(open_and_read(), 30);
  manifest_.shards.clear();
  write_manifest();
  EXPECT_EQ(open_and_read(), 30);
  ASSERT_EQ(::truncate((newest_ + "/manifest.json").c_str(), int64_t{1} << 40), 0);
  EXPECT_EQ(open_and_read(), 30);
}

TEST_F(ForgeryBattery, PiecesInTheIndex) {
  struct Row {
    const char* name;
    int64_t first, elements, total;
  };
  const Row rows[] = {
      {"embed", INT64_MAX, 1, 9000},
      {"embed", INT64_MAX - 1, INT64_MAX, INT64_MAX},
      {"embed", 0, INT64_MAX, INT64_MAX},  // overlaps the other shard
      {"embed", 0, 4500, 9001},            // totals disagree
      {"embed", 1, 4499, 9000},            // a hole
      {"embed", 0, 0, 9000},
      {"em bed", 0, 4500, 9000},
      {"", 0, 4500, 9000},
  };
  const ShardIndex saved = index_;
  for (const Row& row : rows) {
    index_ = saved;
    for (ShardPiece& piece : index_.pieces) {
      if (piece.name != "embed") continue;
      piece = {.name = row.name,
               .first_element = row.first,
               .elements = row.elements,
               .total_elements = row.total};
    }
    write_index(encode_index(index_));
    EXPECT_EQ(open_and_read(), 30) << row.name << " " << row.first << " " << row.elements;
  }
  for (const char* text : {"", "{}", "[]", "null", "{\"pieces\":1}"}) {
    write_index(text);
    EXPECT_EQ(open_and_read(), 30) << text;
  }
  write_index(std::string(1000000, '['));
  EXPECT_EQ(open_and_read(), 30);
}

// A shard whose dataset is shorter, of another type, or reached through a link.
TEST_F(ForgeryBattery, ShardsThatAreNotWhatTheIndexSays) {
  const std::string path = newest_ + "/" + shard_file_name(0, 2);
  const std::string dataset = dataset_name(index_.pieces[0]);
  const auto forge = [&](auto&& make) {
    files_.remove_file(path);
    const hid_t file = H5Fcreate(path.c_str(), H5F_ACC_EXCL, H5P_DEFAULT, H5P_DEFAULT);
    make(file);
    H5Fclose(file);
    adopt_shard();
    return open_and_read();
  };
  const auto add = [&](hid_t file, hid_t type, hsize_t extent) {
    const hid_t space = H5Screate_simple(1, &extent, nullptr);
    H5Dclose(H5Dcreate2(file, dataset.c_str(), type, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
    H5Sclose(space);
  };
  EXPECT_EQ(forge([](hid_t) {}), 30);
  EXPECT_EQ(forge([&](hid_t file) { add(file, H5T_IEEE_F32LE, 10); }), 30);
  EXPECT_EQ(forge([&](hid_t file) { add(file, H5T_STD_I32LE, 4500); }), 30);
  EXPECT_EQ(forge([&](hid_t file) { add(file, H5T_IEEE_F64BE, 4500); }), 34);
  EXPECT_EQ(forge([&](hid_t file) {
              H5Lcreate_external("/etc/passwd", "/", file, dataset.c_str(), H5P_DEFAULT,
                                 H5P_DEFAULT);
            }),
            34);
  EXPECT_EQ(forge([&](hid_t file) {
              H5Lcreate_soft("/elsewhere", file, dataset.c_str(), H5P_DEFAULT, H5P_DEFAULT);
            }),
            34);
  write_text(path, "not HDF5 at all");
  adopt_shard();
  EXPECT_EQ(open_and_read(), 30);
}

}  // namespace
}  // namespace cambium
