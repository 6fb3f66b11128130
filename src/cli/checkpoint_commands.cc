// `cambium checkpoint inspect | verify | export-hf | import-hf`.
#include <algorithm>

#include "fmt/format.h"
#include "nlohmann/json.hpp"
#include "src/checkpoint/checkpoint.h"
#include "src/checkpoint/hf_weights.h"
#include "src/cli/commands.h"
#include "src/config/config.h"

namespace cambium {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kImportShardElements = int64_t{256} << 20;  // 1 GiB of fp32 at a time

int64_t count_elements(const CheckpointReader& checkpoint) {
  int64_t elements = 0;
  for (const auto& [name, count] : checkpoint.tensors()) {
    if (name.find('/') == std::string::npos) elements += count;  // "m/embed" is a state of embed
  }
  return elements;
}

Json describe(const CheckpointReader& checkpoint) {
  const CheckpointState& state = checkpoint.state();
  Json found;
  found["path"] = checkpoint.path();
  found["step"] = state.step;
  found["layout"] = state.layout;
  found["seed"] = state.seed;
  found["shards"] = checkpoint.ranks();
  found["bytes"] = checkpoint.total_bytes();
  found["tensors"] = checkpoint.tensors().size();
  found["parameters"] = count_elements(checkpoint);
  found["integers"] = state.integers;
  Json arrays = Json::object();
  for (const auto& [name, values] : state.integer_arrays) arrays[name] = values.size();
  for (const auto& [name, values] : state.float_arrays) arrays[name] = values.size();
  found["array_lengths"] = std::move(arrays);
  return found;
}

// The step directory that `path` means: itself, or the newest good one of a run.
std::unique_ptr<CheckpointReader> open_named(FileSystem& files, const std::string& path) {
  if (files.kind(path + "/manifest.json") != EntryKind::missing) {
    return std::make_unique<CheckpointReader>(files, path, ShardCheck::at_open);
  }
  NewestCheckpoint newest = open_newest_checkpoint(files, checkpoints_directory(files, path));
  for (const std::string& warning : newest.warnings) fmt::print(stderr, "warning: {}\n", warning);
  if (!newest.reader) {
    fail(ExitCode::usage,
         "'{}' holds no checkpoint; name a run directory or one of its checkpoints/step-*", path);
  }
  return std::move(newest.reader);
}

// Compares everything in one checkpoint; what is wrong with it, or nothing.
std::string find_damage(FileSystem& files, const std::string& path) {
  try {
    CheckpointReader checkpoint(files, path, ShardCheck::at_open);
    std::vector<float> values;
    for (const auto& [name, elements] : checkpoint.tensors()) {
      constexpr int64_t kPart = int64_t{1} << 22;
      for (int64_t first = 0; first < elements; first += kPart) {
        values.resize(static_cast<size_t>(std::min(kPart, elements - first)));
        checkpoint.read(name, first, values);
      }
    }
    return "";
  } catch (const Error& error) {
    if (error.exit_code() != ExitCode::corrupt_file) throw;
    return error.what();
  }
}

int inspect(FileSystem& files, const CheckpointOptions& options) {
  const auto checkpoint = open_named(files, options.path);
  const Json found = describe(*checkpoint);
  if (options.format == OutputFormat::json) {
    fmt::print("{}\n", found.dump());
    return 0;
  }
  for (const auto& [key, value] : found.items()) {
    fmt::print("{:<14}{}\n", key, value.is_string() ? value.get<std::string>() : value.dump());
  }
  return 0;
}

// One checkpoint, or all of a run: exit 30 when any is damaged.
int verify(FileSystem& files, const CheckpointOptions& options) {
  std::vector<std::string> paths;
  if (files.kind(options.path + "/manifest.json") != EntryKind::missing) {
    paths.push_back(options.path);
  } else {
    const std::string directory = checkpoints_directory(files, options.path);
    for (const int64_t step : list_checkpoints(files, directory)) {
      paths.push_back(checkpoint_path(directory, step));
    }
  }
  if (paths.empty()) {
    fail(ExitCode::usage,
         "'{}' holds no checkpoint; name a run directory or one of its checkpoints/step-*",
         options.path);
  }
  Json report = Json::array();
  bool all_good = true;
  for (const std::string& path : paths) {
    const std::string damage = find_damage(files, path);
    all_good = all_good && damage.empty();
    report.push_back({{"path", path}, {"good", damage.empty()}, {"damage", damage}});
    if (options.format == OutputFormat::text) {
      fmt::print("{:<8}{}{}{}\n", damage.empty() ? "good" : "DAMAGED", path,
                 damage.empty() ? "" : ": ", damage);
    }
  }
  if (options.format == OutputFormat::json) {
    fmt::print("{}\n", Json{{"good", all_good}, {"checkpoints", report}}.dump());
  }
  return static_cast<int>(all_good ? ExitCode::done : ExitCode::corrupt_file);
}

void refuse_existing(FileSystem& files, const std::string& path) {
  const EntryKind kind = files.kind(path);
  const bool is_free =
      kind == EntryKind::missing || (kind == EntryKind::directory && files.list(path).empty());
  if (!is_free) {
    fail(ExitCode::directory_in_use, "'{}' exists and is not an empty directory; name a new one",
         path);
  }
}

int export_checkpoint(FileSystem& files, const CheckpointOptions& options) {
  refuse_existing(files, options.out);
  const auto checkpoint = open_named(files, options.path);
  const Config config = parse_config(checkpoint->state().config, checkpoint->path(), {});
  const HfStorage storage = options.storage == "bf16" ? HfStorage::bf16 : HfStorage::f32;
  export_hf(files, config.model, *checkpoint, storage, options.out);
  if (options.format == OutputFormat::json) {
    const Json result = {{"path", options.out},
                         {"step", checkpoint->state().step},
                         {"parameters", count_elements(*checkpoint)},
                         {"storage", options.storage}};
    fmt::print("{}\n", result.dump());
    return 0;
  }
  fmt::print("{}: config.json and model.safetensors ({} parameters, {}) of step {}\n", options.out,
             count_elements(*checkpoint), options.storage, checkpoint->state().step);
  fmt::print("The tokenizer is not part of it: the model was trained with {}.\n",
             config.data.tokenizer == TokenizerKind::bytes
                 ? std::string("bytes (token = byte)")
                 : fmt::format("SentencePiece '{}'", config.data.tokenizer_path));
  return 0;
}

// Pieces of the canonical tensors that lie in elements [first, end) of all of them in a row.
struct ImportShard {
  std::vector<std::vector<float>> values;
  std::vector<ShardPiece> pieces;
};

ImportShard read_shard(const ModelConfig& model, HfWeights& weights, int64_t first, int64_t end) {
  ImportShard shard;
  int64_t offset = 0;
  for (const CanonicalTensor& tensor : canonical_tensors(model)) {
    const int64_t begin = std::max(first - offset, int64_t{0});
    const int64_t stop = std::min(end - offset, tensor.elements());
    offset += tensor.elements();
    if (begin >= stop) continue;
    std::vector<float>& values = shard.values.emplace_back(static_cast<size_t>(stop - begin));
    weights.read(tensor.name, begin, values);
    shard.pieces.push_back({.name = tensor.name,
                            .first_element = begin,
                            .elements = stop - begin,
                            .total_elements = tensor.elements(),
                            .data = values.data()});
  }
  return shard;
}

int import_directory(FileSystem& files, const CheckpointOptions& options) {
  refuse_existing(files, options.out);
  Config config;
  config.model = load_hf_config(files, options.path);
  HfWeights weights(files, options.path, config.model);
  config.model.path.clear();
  int64_t elements = 0;
  for (const CanonicalTensor& tensor : canonical_tensors(config.model)) {
    elements += tensor.elements();
  }
  prepare_checkpoints(files, options.out);
  check_free_space(files, options.out, elements * 4 + elements / 16);
  const int64_t shards = (elements + kImportShardElements - 1) / kImportShardElements;
  for (int64_t shard = 0; shard < shards; ++shard) {
    const ImportShard part = read_shard(config.model, weights, elements * shard / shards,
                                        elements * (shard + 1) / shards);
    write_checkpoint_shard(
        files, {.directory = options.out, .step = 0, .rank = shard, .ranks = shards}, part.pieces);
  }
  CheckpointState state;
  state.config = resolved_toml(config);
  state.layout = "imported from Hugging Face";
  state.integers["imported"] = 1;  // parameters only: the optimizer starts from zero
  const std::string path = commit_checkpoint(files, options.out, shards, state);
  if (options.format == OutputFormat::json) {
    fmt::print("{}\n", Json{{"path", path}, {"parameters", elements}}.dump());
  } else {
    fmt::print("{}: {} parameters\n", path, elements);
  }
  return 0;
}

}  // namespace

int command_checkpoint(const CheckpointOptions& options) {
  FileSystem files;
  switch (options.action) {
    case CheckpointAction::inspect:
      return inspect(files, options);
    case CheckpointAction::verify:
      return verify(files, options);
    case CheckpointAction::export_hf:
      return export_checkpoint(files, options);
    case CheckpointAction::import_hf:
      return import_directory(files, options);
  }
  return 0;
}

}  // namespace cambium
