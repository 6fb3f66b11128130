// `cambium data build|inspect` and `cambium tokenizer train|inspect`.
#include <sys/stat.h>

#include <algorithm>

#include "fmt/format.h"
#include "nlohmann/json.hpp"
#include "src/base/error.h"
#include "src/cli/commands.h"
#include "src/data/text_reader.h"
#include "src/data/token_file.h"
#include "src/data/tokenizer.h"

namespace cambium {

namespace {

// One line a key, or one JSON object on one line.
void print_facts(const nlohmann::ordered_json& facts, OutputFormat format) {
  if (format == OutputFormat::json) {
    fmt::print("{}\n", facts.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
    return;
  }
  for (const auto& [key, value] : facts.items())
    fmt::print("{:<18}{}\n", key, value.is_string() ? value.get<std::string>() : value.dump());
}

// The inputs are there and of the kind that is asked for, before anything is made.
void check_inputs(const std::vector<std::string>& inputs) {
  if (inputs.empty()) fail(ExitCode::usage, "name at least one .txt, .jsonl or .zst file");
  for (const std::string& path : inputs) {
    const SourceKind kind = source_kind(path);
    if (kind != SourceKind::text && kind != SourceKind::jsonl)
      fail(ExitCode::bad_corpus,
           "{}: not a text source; Cambium reads .txt .jsonl .txt.zst .jsonl.zst", path);
    struct stat status {};
    if (stat(path.c_str(), &status) != 0)
      fail(ExitCode::bad_corpus, "{}: no such file; check the path", path);
  }
}

nlohmann::ordered_json token_file_facts(const std::string& path) {
  const auto file = TokenFile::open(path);
  const std::vector<int64_t>& offsets = file->document_offsets();
  int64_t longest = 0;
  for (size_t d = 1; d < offsets.size(); ++d)
    longest = std::max(longest, offsets[d] - offsets[d - 1]);
  return {{"file", path},
          {"tokens", file->token_count()},
          {"documents", file->document_count()},
          {"longest_document", longest},
          {"vocab", file->vocab()},
          {"eos_id", file->eos()},
          {"tokenizer", file->tokenizer_name()},
          {"tokenizer_hash", file->tokenizer_hash()},
          {"source_hash", file->source_hash()}};
}

// The start of the text on one line, control characters replaced.
std::string one_line(std::string text) {
  constexpr size_t kMostBytes = 60;
  if (text.size() > kMostBytes) text.resize(kMostBytes);
  for (char& byte : text)
    if (static_cast<uint8_t>(byte) < 0x20 || byte == 0x7F) byte = ' ';
  return text;
}

nlohmann::ordered_json tokenizer_facts(const std::string& name) {
  const Tokenizer tokenizer = name == "bytes" ? Tokenizer() : Tokenizer::load_sentencepiece(name);
  int64_t longest = 0;
  std::string longest_text;
  for (int32_t token = 0; token < tokenizer.vocab(); ++token) {
    if (tokenizer.text_bytes(token) <= longest) continue;
    longest = tokenizer.text_bytes(token);
    longest_text = tokenizer.decode(std::span<const int32_t>(&token, 1));
  }
  nlohmann::ordered_json facts = {{"tokenizer", tokenizer_kind_name(tokenizer.kind())},
                                  {"vocab", tokenizer.vocab()},
                                  {"eos_id", tokenizer.eos()},
                                  {"hash", tokenizer.hash().hex()}};
  if (tokenizer.kind() == TokenizerKind::sentencepiece) {
    facts["file"] = name;
    facts["longest_piece"] = one_line(longest_text);
  }
  return facts;
}

}  // namespace

int command_data_build(const DataBuildOptions& options) {
  check_inputs(options.inputs);
  if (source_kind(options.out) != SourceKind::token_file)
    fail(ExitCode::usage, "--out {}: a token file's name ends with .h5", options.out);
  const Tokenizer tokenizer =
      options.tokenizer == "bytes" ? Tokenizer() : Tokenizer::load_sentencepiece(options.tokenizer);
  build_token_file({.source_paths = options.inputs, .token_path = options.out}, tokenizer);
  print_facts(token_file_facts(options.out), options.format);
  return 0;
}

int command_data_inspect(const InspectOptions& options) {
  print_facts(token_file_facts(options.path), options.format);
  return 0;
}

int command_tokenizer_train(const TokenizerTrainOptions& options) {
  check_inputs(options.inputs);
  if (options.out.empty()) fail(ExitCode::usage, "--out: name the .model file to write");
  train_sentencepiece(
      {.text_paths = options.inputs, .vocab = options.vocab, .model_path = options.out});
  print_facts(tokenizer_facts(options.out), options.format);
  return 0;
}

int command_tokenizer_inspect(const InspectOptions& options) {
  print_facts(tokenizer_facts(options.path), options.format);
  return 0;
}

}  // namespace cambium
