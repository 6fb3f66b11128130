// Checkpoints: round trips between layouts, retention, lock, replaced steps, misleading files.
#include "src/checkpoint/checkpoint.h"

#include <sys/wait.h>

#include <algorithm>
#include <fstream>

#include "gtest/gtest.h"
#include "src/checkpoint/manifest.h"
#include "tests/checkpoint/checkpoint_samples.h"
#include "tests/checkpoint/checkpoint_testing.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;

TEST(Checkpoint, EveryLayoutReadsEveryLayout) {
  for (const int64_t ranks : {1, 2, 3, 8}) {
    const TemporaryDirectory directory;
    FileSystem files;
    prepare_checkpoints(files, directory.path());
    save_sample(files, directory.path(), 12, ranks);
    const NewestCheckpoint newest = open_newest_checkpoint(files, directory.path());
    ASSERT_NE(newest.reader, nullptr);
    EXPECT_TRUE(newest.warnings.empty());
    EXPECT_EQ(newest.reader->ranks(), ranks);
    EXPECT_TRUE(is_sample(*newest.reader, 12));
    for (const int64_t readers : {1, 2, 5}) {
      for (int64_t rank = 0; rank < readers; ++rank) {
        const int64_t first = 9000 * rank / readers;
        std::vector<float> part(static_cast<size_t>(9000 * (rank + 1) / readers - first));
        newest.reader->read("m/embed", first, part);
        for (size_t i = 0; i < part.size(); ++i) {
          ASSERT_EQ(std::bit_cast<uint32_t>(part[i]),
                    std::bit_cast<uint32_t>(
                        sample_value("m/embed", 12, first + static_cast<int64_t>(i))));
        }
      }
    }
  }
}

TEST(Checkpoint, SavingTwiceGivesTheSameBytes) {
  const TemporaryDirectory one, two;
  FileSystem files;
  save_sample(files, one.path(), 3, 2);
  save_sample(files, two.path(), 3, 2);
  for (const std::string& name : files.list(checkpoint_path(one.path(), 3))) {
    EXPECT_EQ(
        files.read_file(checkpoint_path(one.path(), 3) + "/" + name, 1 << 30, Symlinks::refuse),
        files.read_file(checkpoint_path(two.path(), 3) + "/" + name, 1 << 30, Symlinks::refuse))
        << name;
  }
}

TEST(Checkpoint, NothingThereIsNoErrorAndUnfinishedIsNotThere) {
  const TemporaryDirectory directory;
  FileSystem files;
  EXPECT_EQ(open_newest_checkpoint(files, directory.path() + "/none").reader, nullptr);
  const SamplePieces sample = sample_pieces(5, 0, 1);
  write_checkpoint_shard(files, {.directory = directory.path(), .step = 5}, sample.pieces);
  EXPECT_EQ(open_newest_checkpoint(files, directory.path()).reader, nullptr);
  prepare_checkpoints(files, directory.path());
  EXPECT_TRUE(files.list(directory.path()).empty());
}

TEST(Checkpoint, ATensorWrittenInPartIsNotCommitted) {
  const TemporaryDirectory directory;
  FileSystem files;
  SamplePieces sample = sample_pieces(5, 0, 1);
  sample.pieces[1].elements -= 1;
  write_checkpoint_shard(files, {.directory = directory.path(), .step = 5}, sample.pieces);
  const Outcome outcome =
      outcome_of([&] { commit_checkpoint(files, directory.path(), 1, sample_state(5)); });
  EXPECT_EQ(outcome.code, 30);
  EXPECT_NE(outcome.message.find("layers.0.qkv"), std::string::npos) << outcome.message;
  EXPECT_TRUE(list_checkpoints(files, directory.path()).empty());
}

TEST(Checkpoint, FallsBackToTheNewestGoodOneAndSaysSo) {
  const TemporaryDirectory directory;
  FileSystem files;
  for (const int64_t step : {5, 10, 15}) save_sample(files, directory.path(), step, 2);
  const std::string shard = checkpoint_path(directory.path(), 15) + "/" + shard_file_name(1, 2);
  std::string bytes = files.read_file(shard, 1 << 30, Symlinks::refuse);
  bytes[bytes.size() / 2] = static_cast<char>(bytes[bytes.size() / 2] ^ 1);
  write_text(shard, bytes);
  fs::remove(checkpoint_path(directory.path(), 10) + "/manifest.json");
  NewestCheckpoint newest = open_newest_checkpoint(files, directory.path());
  ASSERT_NE(newest.reader, nullptr);
  EXPECT_TRUE(is_sample(*newest.reader, 5));
  ASSERT_EQ(newest.warnings.size(), 2u);
  EXPECT_NE(newest.warnings[0].find("shard-00001-of-00002.h5"), std::string::npos);
  EXPECT_NE(newest.warnings[1].find("manifest.json"), std::string::npos);
  write_text(checkpoint_path(directory.path(), 5) + "/" + index_file_name(0, 2), "{}");
  EXPECT_EQ(outcome_of([&] { open_newest_checkpoint(files, directory.path()); }).code, 30);
}

TEST(Checkpoint, AStepSavedAgainReplacesTheOldOne) {
  const TemporaryDirectory directory;
  FileSystem files;
  save_sample(files, directory.path(), 5, 3);
  save_sample(files, directory.path(), 5, 2);
  const NewestCheckpoint newest = open_newest_checkpoint(files, directory.path());
  EXPECT_EQ(newest.reader->ranks(), 2);
  EXPECT_TRUE(is_sample(*newest.reader, 5));
  EXPECT_EQ(files.list(directory.path()), std::vector<std::string>{"step-00000005"});
}

TEST(Checkpoint, RetentionKeepsTheNewestAndVerifiesFirst) {
  const TemporaryDirectory directory;
  FileSystem files;
  for (const int64_t step : {1, 2, 3, 4, 9}) save_sample(files, directory.path(), step, 1);
  retain_checkpoints(files, directory.path(), 4, 0);
  EXPECT_EQ(list_checkpoints(files, directory.path()).size(), 5u);
  retain_checkpoints(files, directory.path(), 4, 2);  // 9 is of an earlier run and later steps
  EXPECT_EQ(list_checkpoints(files, directory.path()), (std::vector<int64_t>{3, 4, 9}));
  write_text(checkpoint_path(directory.path(), 4) + "/manifest.json", "broken");
  EXPECT_EQ(outcome_of([&] { retain_checkpoints(files, directory.path(), 4, 1); }).code, 30);
  EXPECT_EQ(list_checkpoints(files, directory.path()), (std::vector<int64_t>{3, 4, 9}));
}

TEST(Checkpoint, TooLittleSpaceIsRefusedBeforehand) {
  const TemporaryDirectory directory;
  FileSystem files;
  const Outcome outcome =
      outcome_of([&] { check_free_space(files, directory.path(), int64_t{1} << 60); });
  EXPECT_EQ(outcome.code, 31);
  EXPECT_NE(outcome.message.find(std::to_string(int64_t{1} << 60)), std::string::npos);
}

TEST(DirectoryLock, OneHolderAndItDiesWithItsProcess) {
  const TemporaryDirectory directory;
  FileSystem files;
  int ready[2];
  ASSERT_EQ(::pipe(ready), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    const DirectoryLock lock(files, directory.path());
    if (::write(ready[1], "x", 1) != 1) ::_exit(1);
    ::pause();
  }
  char byte = 0;
  ASSERT_EQ(::read(ready[0], &byte, 1), 1);
  const Outcome outcome = outcome_of([&] { DirectoryLock lock(files, directory.path()); });
  EXPECT_EQ(outcome.code, 33);
  EXPECT_NE(outcome.message.find(fmt::format("pid {} on ", child)), std::string::npos)
      << outcome.message;
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  EXPECT_EQ(outcome_of([&] { DirectoryLock lock(files, directory.path()); }).code, 0);
}

}  // namespace
}  // namespace cambium
