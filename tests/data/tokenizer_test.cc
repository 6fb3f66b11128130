// Tokenizers: round trips, determinism, refusals.
#include "src/data/tokenizer.h"

#include "src/base/philox.h"
#include "src/data/token_file.h"
#include "tests/data/scratch.h"

namespace cambium {
namespace {

TEST(BytesTokenizer, EveryByteRoundTrips) {
  const Tokenizer tokenizer;
  std::string text;
  for (int byte = 0; byte < 256; ++byte) text.push_back(static_cast<char>(byte));
  std::vector<int32_t> tokens;
  EXPECT_EQ(tokenizer.encode(text, tokens), -1);
  ASSERT_EQ(tokens.size(), 256u);
  tokens.push_back(tokenizer.eos());
  EXPECT_EQ(tokenizer.decode(tokens), text);
  EXPECT_EQ(tokenizer.vocab(), 257);
  EXPECT_EQ(tokenizer.text_bytes(7), 1);
  EXPECT_EQ(tokenizer.text_bytes(tokenizer.eos()), 0);
}

// The library is present exactly when loading a missing file is not answered with exit 2.
bool has_sentencepiece() {
  return outcome_of([] { Tokenizer::load_sentencepiece("/none.model"); }).code != 2;
}

std::string english(int64_t words) {
  const char* kWords[] = {"truth", "universally", "acknowledged", "single", "man",  "possession",
                          "good",  "fortune",     "must",         "want",   "wife", "however"};
  std::string text;
  for (int64_t i = 0; i < words; ++i) {
    text += kWords[random_below(12, {.seed = 2}, static_cast<uint64_t>(i))];
    text += i % 9 == 8 ? (i % 4 == 0 ? ".\r\n" : ".\n") : i % 7 == 6 ? ",  " : " ";
  }
  return text;
}

class SentencePieceTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!has_sentencepiece()) GTEST_SKIP() << "this build has no SentencePiece";
    scratch_.write("text.txt", english(4000));
    train("a.model", 300);
  }
  void train(const std::string& name, int64_t vocab) const {
    train_sentencepiece({.text_paths = {scratch_.path("text.txt")},
                         .vocab = vocab,
                         .model_path = scratch_.path(name)});
  }
  ScratchDirectory scratch_;
};

TEST_F(SentencePieceTest, TextRoundTripsExactly) {
  const Tokenizer tokenizer = Tokenizer::load_sentencepiece(scratch_.path("a.model"));
  EXPECT_EQ(tokenizer.vocab(), 300);
  const std::string texts[] = {
      "",
      " ",
      "\n",
      "a",
      "  two  spaces, a\ttab \r\n\r\nand the end ",
      std::string("nul \0 inside", 12),
      "na\xc3\xafve caf\xc3\xa9 \xe2\x82\xac \xf0\x9f\x90\x98 \xef\xac\x81 \xe3\x80\x80",
      "fullwidth \xef\xbc\xa1 is not normalised",
      "<s></s><unk><0x0A>",
      english(500),
      std::string(5000, 'x'),
  };
  for (const std::string& text : texts) {
    std::vector<int32_t> tokens;
    EXPECT_EQ(tokenizer.encode(text, tokens), -1);
    int64_t bytes = 0;
    for (int32_t token : tokens) {
      ASSERT_TRUE(token >= 0 && token < tokenizer.vocab());
      EXPECT_NE(token, tokenizer.eos());
      bytes += tokenizer.text_bytes(token);
    }
    EXPECT_EQ(bytes, std::ssize(text));
    EXPECT_EQ(tokenizer.decode(tokens), text);
  }
  std::vector<int32_t> tokens;
  tokenizer.encode(english(500), tokens);
  EXPECT_LT(tokens.size() * 5, english(500).size() * 4);  // some pairs became pieces
}

TEST_F(SentencePieceTest, InvalidUtf8IsRefusedWithItsOffset) {
  const Tokenizer tokenizer = Tokenizer::load_sentencepiece(scratch_.path("a.model"));
  const std::pair<std::string, int64_t> texts[] = {
      {"ab\xff", 2},           {"\xc0\x80", 0},     {"x\xed\xa0\x80", 1}, {"\xf4\x90\x80\x80", 0},
      {"ok \xc3\xa9 \xc3", 6}, {"\xe0\x80\x80", 0}, {"\x80", 0},          {"abc\xe2\x82", 3}};
  for (const auto& [text, offset] : texts) {
    std::vector<int32_t> tokens;
    EXPECT_EQ(tokenizer.encode(text, tokens), offset) << text;
  }
  scratch_.write("bad.txt", "fine\fbad \xff byte");
  expect_fails(32, "record 2, byte 9", [&] {
    build_token_file(
        {.source_paths = {scratch_.path("bad.txt")}, .token_path = scratch_.path("bad.h5")},
        tokenizer);
  });
  EXPECT_FALSE(std::filesystem::exists(scratch_.path("bad.h5")));
}

TEST_F(SentencePieceTest, TheSameTextGivesTheSameModel) {
  train("b.model", 300);
  EXPECT_EQ(scratch_.read("a.model"), scratch_.read("b.model"));
  train("c.model", 310);
  const Tokenizer a = Tokenizer::load_sentencepiece(scratch_.path("a.model"));
  EXPECT_EQ(a.hash(), Tokenizer::load_sentencepiece(scratch_.path("b.model")).hash());
  EXPECT_NE(a.hash(), Tokenizer::load_sentencepiece(scratch_.path("c.model")).hash());
}

TEST_F(SentencePieceTest, BadModelsAndVocabulariesAreRefused) {
  expect_fails(31, "none.model",
               [&] { Tokenizer::load_sentencepiece(scratch_.path("none.model")); });
  scratch_.write("junk.model", "this is not a model");
  expect_fails(30, "junk.model",
               [&] { Tokenizer::load_sentencepiece(scratch_.path("junk.model")); });
  const std::string model = scratch_.read("a.model");
  scratch_.write("short.model", model.substr(0, model.size() / 2));
  EXPECT_NE(outcome_of([&] { Tokenizer::load_sentencepiece(scratch_.path("short.model")); }).code,
            0);
  expect_fails(2, "too small", [&] { train("d.model", 100); });
  expect_fails(2, "data.tokenizer_vocab", [&] { train("d.model", 100'000); });
  EXPECT_FALSE(std::filesystem::exists(scratch_.path("d.model")));
}

}  // namespace
}  // namespace cambium
