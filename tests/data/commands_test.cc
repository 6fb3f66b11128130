// `cambium data` and `cambium tokenizer` from outside: exit codes and what they print.
#include "src/cli/commands.h"
#include "fmt/format.h"
#include "nlohmann/json.hpp"
#include "src/data/tokenizer.h"
#include "tests/data/scratch.h"

namespace cambium {
namespace {

// What `body` prints to stdout.
template <class Body>
std::string output_of(Body&& body) {
  testing::internal::CaptureStdout();
  body();
  std::fflush(stdout);
  return testing::internal::GetCapturedStdout();
}

TEST(DataCommands, BuildAndInspectAgree) {
  const ScratchDirectory scratch;
  const std::string text = scratch.write("a.txt", "one\ftwo");
  const std::string lines = scratch.write("b.jsonl", "{\"text\": \"three\"}\n");
  const std::string out = scratch.path("new/directory/out.h5");
  const std::string built = output_of([&] {
    EXPECT_EQ(
        command_data_build({.inputs = {text, lines}, .out = out, .format = OutputFormat::json}), 0);
  });
  const std::string inspected = output_of(
      [&] { EXPECT_EQ(command_data_inspect({.path = out, .format = OutputFormat::json}), 0); });
  EXPECT_EQ(built, inspected);
  const auto facts = nlohmann::json::parse(inspected);
  EXPECT_EQ(facts.at("tokens"), 14);
  EXPECT_EQ(facts.at("documents"), 3);
  EXPECT_EQ(facts.at("longest_document"), 6);
  EXPECT_EQ(facts.at("vocab"), 257);
  EXPECT_EQ(facts.at("tokenizer"), "bytes");
  EXPECT_EQ(facts.at("tokenizer_hash"), Tokenizer().hash().hex());
  const std::string readable = output_of([&] { command_data_inspect({.path = out}); });
  EXPECT_NE(readable.find("documents         3\n"), std::string::npos) << readable;
}

TEST(DataCommands, RefuseBadInputsBeforeAnythingIsMade) {
  const ScratchDirectory scratch;
  const std::string text = scratch.write("a.txt", "one");
  const std::string out = scratch.path("out.h5");
  const auto build = [&](const std::string& input, const std::string& output) {
    return outcome_of([&] { command_data_build({.inputs = {input}, .out = output}); }).code;
  };
  EXPECT_EQ(build(scratch.path("none.txt"), out), 32);
  EXPECT_EQ(build(scratch.write("a.pdf", "x"), out), 32);
  EXPECT_EQ(build(text, scratch.path("out.bin")), 2);
  EXPECT_EQ(build(scratch.write("empty.txt", ""), out), 32);
  EXPECT_EQ(scratch.entries(), 3);
  expect_fails(30, "a.txt", [&] { command_data_inspect({.path = text}); });
  expect_fails(31, "none.h5", [&] { command_data_inspect({.path = scratch.path("none.h5")}); });
  expect_fails(32, "none.txt", [&] {
    command_tokenizer_train({.inputs = {scratch.path("none.txt")}, .out = scratch.path("m.model")});
  });
}

TEST(DataCommands, TokenizerInspectKnowsBytes) {
  const std::string printed =
      output_of([] { command_tokenizer_inspect({.path = "bytes", .format = OutputFormat::json}); });
  const auto facts = nlohmann::json::parse(printed);
  EXPECT_EQ(facts.at("vocab"), 257);
  EXPECT_EQ(facts.at("eos_id"), 256);
}

}  // namespace
}  // namespace cambium
