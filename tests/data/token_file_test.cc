// Token files: round trips, and damage of every kind, which must never pass and never crash.
#include "src/data/token_file.h"

#include <algorithm>

#include "src/base/hdf5_file.h"
#include "src/base/philox.h"
#include "src/data/output_file.h"
#include "tests/data/scratch.h"

namespace cambium {
namespace {

std::vector<int32_t> all_tokens(const TokenFile& file) {
  std::vector<int32_t> tokens(static_cast<size_t>(file.token_count()));
  file.read(0, file.token_count(), tokens.data());
  return tokens;
}

class TokenFileTest : public testing::Test {
 protected:
  std::string build(const std::string& text) {
    scratch_.write("text.txt", text);
    build_token_file({.source_paths = {scratch_.path("text.txt")}, .token_path = h5_}, Tokenizer());
    return scratch_.read("text.h5");
  }
  ScratchDirectory scratch_;
  std::string h5_ = scratch_.path("text.h5");
};

TEST_F(TokenFileTest, RoundTripsAndSaysWhereItComesFrom) {
  build("one\ftwo\fthree");
  const auto file = TokenFile::open(h5_);
  EXPECT_EQ(file->document_offsets(), (std::vector<int64_t>{0, 4, 8, 14}));
  EXPECT_EQ(Tokenizer().decode(all_tokens(*file)), "onetwothree");
  EXPECT_EQ(file->vocab(), 257);
  EXPECT_EQ(file->eos(), 256);
  EXPECT_EQ(file->tokenizer_name(), "bytes");
  EXPECT_EQ(file->tokenizer_hash(), Tokenizer().hash().hex());
  EXPECT_EQ(file->source_hash().size(), 32u);
  EXPECT_EQ(scratch_.entries(), 2);  // the text and the token file: no temporary is left
}

TEST_F(TokenFileTest, SeveralHashedBlocksAndUnalignedReads) {
  std::string text;
  for (int i = 0; i < 1'500'000; ++i) text.push_back(static_cast<char>(i * 31 % 251));
  std::replace(text.begin(), text.end(), '\f', ' ');
  build(text);
  const auto file = TokenFile::open(h5_);
  ASSERT_EQ(file->token_count(), 1'500'001);
  const std::vector<int32_t> all = all_tokens(*file);
  for (size_t i = 0; i < text.size(); ++i) ASSERT_EQ(all[i], static_cast<uint8_t>(text[i]));
  std::vector<int32_t> piece(9999);
  file->read(777'777, 9999, piece.data());
  EXPECT_TRUE(std::equal(piece.begin(), piece.end(), all.begin() + 777'777));
}

TEST_F(TokenFileTest, TheSameSourceGivesTheSameBytes) {
  EXPECT_EQ(build("one\ftwo"), build("one\ftwo"));
}

// A token file made by hand, with one thing wrong.
struct HandMade {
  std::vector<uint16_t> tokens{1, 2, 256, 3, 256};
  std::vector<uint64_t> offsets{0, 3, 5};
  std::vector<uint64_t> hashes;  // empty = the right ones
  uint64_t vocab = 257, eos = 256, token_count = 5, document_count = 2, version = 1;
  std::string format = "cambium-tokens";
  Hdf5Storage storage = Hdf5Storage::contiguous;

  Outcome open_at(const std::string& path) const {
    std::filesystem::remove(path);
    Hdf5Writer writer(path);
    writer.write_attribute("format", format);
    writer.write_attribute("version", version);
    writer.write_attribute("token_count", token_count);
    writer.write_attribute("document_count", document_count);
    writer.write_attribute("vocab", vocab);
    writer.write_attribute("eos_id", eos);
    writer.write_attribute("tokenizer", "bytes");
    writer.write_attribute("tokenizer_hash", Tokenizer().hash().hex());
    writer.write_attribute("source_hash", std::string(32, '0'));
    writer.write_dataset<uint16_t>("tokens", storage, tokens);
    writer.write_dataset<uint64_t>("document_offsets", Hdf5Storage::checked, offsets);
    const std::vector<uint64_t> right{xxh3_64(tokens.data(), tokens.size() * 2)};
    writer.write_dataset<uint64_t>("block_xxh3", Hdf5Storage::checked,
                                   hashes.empty() ? right : hashes);
    writer.close();
    return outcome_of([&] { TokenFile::open(path); });
  }
};

TEST_F(TokenFileTest, InconsistentFilesAreRefused) {
  EXPECT_EQ(HandMade{}.open_at(h5_).code, 0);
  auto damage = [&](auto&& change) {
    HandMade file;
    change(file);
    return file.open_at(h5_).code;
  };
  EXPECT_EQ(damage([](HandMade& f) { f.tokens[1] = 300; }), 30);  // an id beyond the vocabulary
  EXPECT_EQ(damage([](HandMade& f) { f.tokens[2] = 7; }), 30);    // no eos at a document's end
  EXPECT_EQ(damage([](HandMade& f) { f.offsets = {0, 3, 3, 5}; }), 30);
  EXPECT_EQ(damage([](HandMade& f) { f.offsets = {0, 4, 3, 5}; }), 30);
  EXPECT_EQ(damage([](HandMade& f) { f.offsets = {0, 3, 6}; }), 30);
  EXPECT_EQ(damage([](HandMade& f) { f.offsets = {1, 3, 5}; }), 30);
  EXPECT_EQ(damage([](HandMade& f) { f.offsets = {0}; }), 30);
  EXPECT_EQ(damage([](HandMade& f) { f.offsets = {}; }), 30);
  EXPECT_EQ(damage([](HandMade& f) { f.offsets = {0, ~uint64_t{0}, 5}; }), 30);
  EXPECT_EQ(damage([](HandMade& f) { f.hashes = {1}; }), 30);
  EXPECT_EQ(damage([](HandMade& f) { f.hashes = {1, 2}; }), 30);
  EXPECT_EQ(damage([](HandMade& f) { f.vocab = 100'000; }), 30);  // then the type is u32
  EXPECT_EQ(damage([](HandMade& f) { f.vocab = ~uint64_t{0}; }), 30);
  EXPECT_EQ(damage([](HandMade& f) { f.eos = 257; }), 30);
  EXPECT_EQ(damage([](HandMade& f) { f.token_count = 6; }), 30);
  EXPECT_EQ(damage([](HandMade& f) { f.document_count = 3; }), 30);
  EXPECT_EQ(damage([](HandMade& f) { f.version = 2; }), 30);
  EXPECT_EQ(damage([](HandMade& f) { f.format = "other"; }), 30);
  EXPECT_EQ(damage([](HandMade& f) { f.storage = Hdf5Storage::checked; }), 30);
}

TEST_F(TokenFileTest, MutationsNeverPassWithOtherTokens) {
  const std::string good = build("It is a truth universally\facknowledged, that a single man");
  const auto original = TokenFile::open(h5_);
  const std::vector<int32_t> tokens = all_tokens(*original);
  const std::string mutated_path = scratch_.path("mutated.h5");
  constexpr uint64_t kTrials = 4000;
  int refused = 0;
  for (uint64_t trial = 0; trial < kTrials; ++trial) {
    std::string bad = good;
    const RandomSequence random{.seed = 5, .entity = trial};
    const size_t at = random_below(bad.size(), random, 0);
    switch (trial % 5) {
      case 0:
      case 1:
        bad[at] = static_cast<char>(random_below(256, random, 1));
        break;
      case 2:
        bad[at] = static_cast<char>(bad[at] ^ (1 << random_below(8, random, 1)));
        break;
      case 3:
        bad.resize(at);
        break;
      case 4:
        std::fill(bad.begin() + static_cast<int64_t>(at),
                  bad.begin() + static_cast<int64_t>(std::min(bad.size(), at + 64)), '\0');
    }
    scratch_.write("mutated.h5", bad);
    const Outcome outcome = outcome_of([&] {
      const auto file = TokenFile::open(mutated_path);
      EXPECT_EQ(all_tokens(*file), tokens) << "trial " << trial;
      EXPECT_EQ(file->document_offsets(), original->document_offsets()) << "trial " << trial;
      EXPECT_EQ(file->tokenizer_hash(), original->tokenizer_hash()) << "trial " << trial;
    });
    refused += outcome.code != 0 ? 1 : 0;
    ASSERT_TRUE(outcome.code == 0 || outcome.code == 30 || outcome.code == 34) << outcome.message;
  }
  EXPECT_GT(refused, 1000);
}

TEST_F(TokenFileTest, AStaleTemporaryFileIsReplacedAndAFailedBuildKeepsTheOldFile) {
  scratch_.write("text.h5.tmp", "left by a process that was killed");
  const std::string good = build("one");
  EXPECT_FALSE(std::filesystem::exists(scratch_.path("text.h5.tmp")));
  scratch_.write("bad.jsonl", "{\"text\": \"a\"}\n{");
  expect_fails(32, "record 2", [&] {
    build_token_file({.source_paths = {scratch_.path("bad.jsonl")}, .token_path = h5_},
                     Tokenizer());
  });
  EXPECT_EQ(scratch_.read("text.h5"), good);
}

TEST_F(TokenFileTest, UnwritablePlacesAreIoErrors) {
  scratch_.write("text.txt", "x");
  scratch_.write("file", "x");
  expect_fails(31, "file", [&] {
    build_token_file(
        {.source_paths = {scratch_.path("text.txt")}, .token_path = scratch_.path("file/out.h5")},
        Tokenizer());
  });
}

}  // namespace
}  // namespace cambium
