// `cambium config show` and `cambium config schema`.
#include "fmt/format.h"
#include "nlohmann/json.hpp"
#include "src/cli/commands.h"
#include "src/config/derive.h"

namespace cambium {

namespace {

nlohmann::ordered_json derived_json(const Derived& derived) {
  nlohmann::ordered_json row;
  row["ranks"] = derived.ranks;
  row["edp"] = derived.edp;
  row["experts_per_rank"] = derived.experts_per_rank;
  row["sequences_per_data_rank"] = derived.sequences_per_data_rank;
  row["micro_batches"] = derived.micro_batches;
  row["tokens_per_micro_batch"] = derived.tokens_per_micro_batch;
  row["tokens_per_step"] = derived.tokens_per_step;
  row["blocks_per_sequence"] = derived.blocks_per_sequence;
  row["total_blocks"] = derived.total_blocks;
  row["warmup_steps"] = derived.warmup_steps;
  row["decay_steps"] = derived.decay_steps;
  row["checkpoint_every_steps"] = derived.checkpoint_every_steps;
  row["eval_every_steps"] = derived.eval_every_steps;
  row["parameters"] = derived.parameters;
  row["active_parameters"] = derived.active_parameters;
  row["training_flops_per_token"] = derived.training_flops_per_token;
  return row;
}

}  // namespace

int command_config_show(const ConfigShowOptions& options) {
  const Config config = load_config(options.config.path, options.config.sets);
  const nlohmann::ordered_json derived = derived_json(derive(config));
  const std::string resolved = resolved_toml(config);
  if (options.format == OutputFormat::json) {
    nlohmann::ordered_json output;
    output["resolved_toml"] = resolved;
    output["derived"] = derived;
    fmt::print("{}\n", output.dump());
    return 0;
  }
  fmt::print("{}\n# What follows from it:\n", resolved);
  for (const auto& [name, value] : derived.items()) fmt::print("# {} = {}\n", name, value.dump());
  return 0;
}

int command_config_schema(OutputFormat format) {
  fmt::print("{}\n", format == OutputFormat::json ? schema_json() : schema_text());
  return 0;
}

}  // namespace cambium
