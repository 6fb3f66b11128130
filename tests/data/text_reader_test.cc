// Text sources: documents, JSON lines, zstd, and the place of every fault.
#include "src/data/text_reader.h"

#include <zstd.h>

#include <vector>

#include "src/base/philox.h"
#include "src/data/token_file.h"
#include "tests/data/scratch.h"

namespace cambium {
namespace {

using Texts = std::vector<std::string>;

std::string compressed(const std::string& text) {
  std::string out(ZSTD_compressBound(text.size()), '\0');
  out.resize(ZSTD_compress(out.data(), out.size(), text.data(), text.size(), 3));
  return out;
}

class TextReaderTest : public testing::Test {
 protected:
  Texts read(const std::string& name, const std::string& content) {
    Texts texts;
    TextReader reader(scratch_.write(name, content));
    TextDocument document;
    while (reader.next(document) == TextReader::Step::document) texts.push_back(document.text);
    return texts;
  }
  // Reading and building fail alike, and building leaves nothing behind.
  void expect_bad(const std::string& name, const std::string& content, const std::string& text) {
    expect_fails(32, text, [&] { read(name, content); });
    const int64_t entries = scratch_.entries();
    expect_fails(32, text, [&] {
      build_token_file(
          {.source_paths = {scratch_.path(name)}, .token_path = scratch_.path("out.h5")},
          Tokenizer());
    });
    EXPECT_EQ(scratch_.entries(), entries);
  }
  ScratchDirectory scratch_;
};

TEST_F(TextReaderTest, TextIsCutAtFormFeedsAndKeptOtherwise) {
  EXPECT_EQ(read("a.txt", "one\ftwo\f\fthree"), (Texts{"one", "two", "three"}));
  EXPECT_EQ(read("a.txt", "\f\f"), Texts{});
  EXPECT_EQ(read("a.txt", ""), Texts{});
  const std::string odd("a\r\n\0\xff\xfe b", 8);
  EXPECT_EQ(read("a.txt", odd), Texts{odd});
  const std::string long_text(3'000'000, 'x');
  EXPECT_EQ(read("a.txt", long_text + "\f" + long_text), (Texts{long_text, long_text}));
}

TEST_F(TextReaderTest, JsonLinesWithEveryLineEnd) {
  EXPECT_EQ(
      read("a.jsonl",
           "{\"text\": \"one\"}\n{\"id\": [1, {\"text\": \"no\"}], \"text\": \"two\\n\\u00e9\"}"
           "\r\n\n   \r\n{\"text\": \"\"}\n{\"text\":\"nul \\u0000\"}"),
      (Texts{"one", "two\n\xc3\xa9", std::string("nul \0", 5)}));
}

TEST_F(TextReaderTest, BadJsonNamesRecordAndByte) {
  const std::string good = "{\"text\": \"fine\"}\n";  // 17 bytes
  expect_bad("a.jsonl", good + "{\"text\": 5}\n", "record 2, byte 17: \"text\" is a number");
  expect_bad("a.jsonl", good + "{\"text\": null}", "record 2, byte 17: \"text\" is null");
  expect_bad("a.jsonl", good + "{\"text\": [\"x\"]}", "record 2, byte 17: \"text\" is an array");
  expect_bad("a.jsonl", good + "{\"test\": \"x\"}", "record 2, byte 17: no key \"text\"");
  expect_bad("a.jsonl", good + "[\"text\"]", "record 2, byte 17: an array");
  expect_bad("a.jsonl", good + "\"text\"", "record 2, byte 17: a string");
  expect_bad("a.jsonl", good + "7", "record 2, byte 17: a number");
  expect_bad("a.jsonl", good + "{\"text\": \"a\", \"text\": \"b\"}", "twice");
  expect_bad("a.jsonl", good + "\n{\"text\": \"a\"", "record 3, byte 30");
  expect_bad("a.jsonl", good + "{\"text\": \"a\"} x", "record 2, byte 31");
  expect_bad("a.jsonl", good + "{\"text\": \"\xff\"}", "record 2, byte 27");
  expect_bad("a.jsonl", good + "{\"text\": \"\\ud800\"}", "record 2, byte 3");
  expect_bad("a.jsonl", good + "{\"text\": NaN}", "record 2");
  expect_bad("a.jsonl", good + "{\"a\": " + std::string(70, '[') + std::string(70, ']') + "}",
             "64 levels");
  expect_bad("a.jsonl", std::string(100'000, '['), "record 1");
  expect_bad("a.jsonl", good + std::string("{\"text\": \"a\0\"}", 14), "record 2, byte 28");
  EXPECT_EQ(read("a.jsonl", "\n \n"), Texts{});
  expect_fails(32, "no text", [&] {
    build_token_file(
        {.source_paths = {scratch_.path("a.jsonl")}, .token_path = scratch_.path("out.h5")},
        Tokenizer());
  });
}

TEST_F(TextReaderTest, LinesHaveACap) {
  std::string line = "{\"text\": \"" + std::string(70 << 20, 'x') + "\"}";
  expect_fails(32, "record 1, byte 0: longer", [&] { read("a.jsonl", line); });
}

TEST_F(TextReaderTest, ZstdFramesAreReadOneAfterAnother) {
  std::string text;
  for (uint64_t i = 0; i < 700'000; ++i)
    text.push_back(static_cast<char>('a' + random_below(20, {.seed = 1}, i)));
  EXPECT_EQ(read("a.txt.zst", compressed(text)), Texts{text});
  EXPECT_EQ(read("a.txt.zst", compressed("one\ftw") + compressed("o")), (Texts{"one", "two"}));
  EXPECT_EQ(read("a.jsonl.zst", compressed("{\"text\": \"one\"}\n")), Texts{"one"});
  EXPECT_EQ(read("a.txt.zst", compressed("")), Texts{});
}

TEST_F(TextReaderTest, BadZstdIsRefused) {
  std::string text;
  for (uint64_t i = 0; i < 300'000; ++i)
    text.push_back(static_cast<char>('a' + random_below(20, {.seed = 1}, i)));
  const std::string whole = compressed(text);
  expect_bad("a.txt.zst", whole.substr(0, whole.size() - 1), "cut short");
  expect_bad("a.txt.zst", whole.substr(0, whole.size() / 2), "cut short");
  expect_bad("a.txt.zst", "not zstd at all", "zstd");
  expect_bad("a.txt.zst", whole + "tail", "zstd");
  expect_bad("a.txt.zst", compressed(std::string(100 << 20, 'x')), "200 times");
  expect_bad("a.jsonl.zst", compressed("{\"text\": \"a\"}\n{\"tex"), "record 2, byte 1");
}

TEST_F(TextReaderTest, MutatedJsonLinesGiveTextOrAnErrorWithItsPlace) {
  std::string good;
  for (int i = 0; i < 6; ++i)
    good += "{\"id\": " + std::to_string(i) + ", \"text\": \"some \\u00e9 text \xc3\xa9\"}\n";
  int refused = 0;
  for (uint64_t trial = 0; trial < 2000; ++trial) {
    std::string bad = good;
    const RandomSequence random{.seed = 11, .entity = trial};
    for (uint64_t i = 0; i <= trial % 3; ++i)
      bad[random_below(bad.size(), random, i * 2)] =
          static_cast<char>(random_below(256, random, i * 2 + 1));
    const Outcome outcome = outcome_of([&] { read("m.jsonl", bad); });
    if (outcome.code == 0) continue;
    ++refused;
    ASSERT_EQ(outcome.code, 32) << outcome.message;
    ASSERT_NE(outcome.message.find("record "), std::string::npos) << outcome.message;
    ASSERT_NE(outcome.message.find("byte "), std::string::npos) << outcome.message;
  }
  EXPECT_GT(refused, 500);
  EXPECT_LT(refused, 1995);
}

TEST_F(TextReaderTest, OtherFilesAreRefused) {
  expect_fails(32, "not a text source", [&] { read("a.pdf", "x"); });
  expect_fails(32, "no such file", [&] { TextReader reader(scratch_.path("none.txt")); });
}

}  // namespace
}  // namespace cambium
