// N-gram baselines: agreement with sources whose entropy is known, and with a count by hand.
#include "src/data/ngram.h"

#include <algorithm>
#include <cmath>

#include "src/base/philox.h"
#include "tests/data/scratch.h"

namespace cambium {
namespace {

class NgramTest : public testing::Test {
 protected:
  // Baselines of a text whose last fifth is the validation corpus.
  NgramBaselines baselines(const std::string& text) {
    scratch_.write("text.txt", text);
    build_token_file(
        {.source_paths = {scratch_.path("text.txt")}, .token_path = scratch_.path("text.h5")},
        Tokenizer());
    const Corpus all({TokenFile::open(scratch_.path("text.h5"))});
    const int64_t train = all.token_count() * 4 / 5;
    const BatchSource validation(
        all.cut(train, all.token_count() - train),
        {.sequence_length = 32, .global_batch_sequences = 4, .order = BatchOrder::spread});
    int64_t targets = 0;
    for (int64_t b = 0; b < validation.spread_batches(); ++b) targets += validation.target_count(b);
    const NgramBaselines result = ngram_baselines(all.cut(0, train), validation, 257);
    EXPECT_EQ(result.targets, targets);
    return result;
  }
  ScratchDirectory scratch_;
};

TEST_F(NgramTest, UniformTextCostsLogOfItsAlphabet) {
  std::string text;
  for (uint64_t i = 0; i < 60'000; ++i)
    text.push_back(static_cast<char>('a' + random_below(16, {.seed = 3}, i)));
  const NgramBaselines result = baselines(text);
  EXPECT_NEAR(result.unigram_nats, std::log(16.0), 0.003);
  EXPECT_NEAR(result.bigram_nats, std::log(16.0), 0.02);
}

TEST_F(NgramTest, AMarkovChainCostsItsEntropyRate) {
  // Each letter is followed by one of two: ln 2 for the bigram, ln 16 for the unigram.
  std::string text;
  int state = 0;
  for (uint64_t i = 0; i < 60'000; ++i) {
    state = (state * 2 + static_cast<int>(random_below(2, {.seed = 4}, i))) % 16;
    text.push_back(static_cast<char>('a' + state));
  }
  const NgramBaselines result = baselines(text);
  EXPECT_NEAR(result.unigram_nats, std::log(16.0), 0.003);
  EXPECT_NEAR(result.bigram_nats, std::log(2.0), 0.003);
}

TEST_F(NgramTest, TunedSettingsAreTakenFromTheirGridsAndTheBigramWinsOnEnglish) {
  std::string text;
  const char* words[] = {"the ", "cat ", "sat ", "on ", "a ", "mat ", "and ", "then ", "ran "};
  for (uint64_t i = 0; i < 9000; ++i) text += words[random_below(9, {.seed = 5}, i)];
  const NgramBaselines result = baselines(text);
  EXPECT_LT(result.bigram_nats, result.unigram_nats);
  EXPECT_GT(result.bigram_nats, std::log(9.0) / 4);  // below the words' entropy per letter: a leak
  EXPECT_GT(result.discount, 0);
  EXPECT_LT(result.discount, 1);
  EXPECT_GT(result.alpha, 0);
}

TEST_F(NgramTest, ProbabilitiesOfUnseenContextsFallBackAndStayFinite) {
  std::string text(8000, 'a');
  text += std::string(2000, 'z');  // the validation part holds only z
  const NgramBaselines result = baselines(text);
  EXPECT_TRUE(std::isfinite(result.bigram_nats));
  EXPECT_GT(result.bigram_nats, 5.0);
}

TEST_F(NgramTest, TooLittleTextIsRefused) {
  expect_fails(32, "n-gram", [&] {
    const Corpus none;
    scratch_.write("text.txt", "abcdefghijkl");
    build_token_file(
        {.source_paths = {scratch_.path("text.txt")}, .token_path = scratch_.path("text.h5")},
        Tokenizer());
    const Corpus all({TokenFile::open(scratch_.path("text.h5"))});
    ngram_baselines(
        all.cut(0, 6),
        BatchSource(
            all, {.sequence_length = 4, .global_batch_sequences = 1, .order = BatchOrder::spread}),
        257);
  });
}

}  // namespace
}  // namespace cambium
