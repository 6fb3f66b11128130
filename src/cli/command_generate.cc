// cambium generate: text from a run, a checkpoint or a Hugging Face directory.
#include <nlohmann/json.hpp>

#include "src/cli/commands.h"
#include "src/cli/model_source.h"

namespace cambium {

int command_generate(const GenerateOptions& options) {
  FileSystem files;
  LoadedModel model = load_model(files, options.model);
  set_device(model.config, options.model.device);
  model.config.run.workers = options.workers;
  GenerateRequest request;
  request.prompt = options.prompt;
  request.tokens = options.tokens;
  request.temperature = options.temperature;
  request.top_k = options.top_k;
  request.seed = options.seed;
  const std::string text = generate_text(model.config, *model.weights, model.tokenizer, request);
  if (options.format == OutputFormat::json) {
    const nlohmann::json object{{"prompt", options.prompt}, {"text", text}, {"step", model.step}};
    fmt::print("{}\n", object.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
  } else {
    fmt::print("{}{}\n", options.prompt, text);
  }
  return 0;
}

}  // namespace cambium
