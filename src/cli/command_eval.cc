// cambium eval: loss, perplexity and bits per byte on held-out text.
#include <nlohmann/json.hpp>

#include "src/base/fmath.h"
#include "src/cli/commands.h"
#include "src/cli/launch.h"
#include "src/cli/model_source.h"
#include "src/train/train_run.h"

namespace cambium {

namespace {

struct EvalTotals {
  double loss = 0;  // nats, summed over targets
  int64_t tokens = 0;
  int64_t text_bytes = 0;  // that the targets stand for
};

// The bytes that the targets of batch `index` stand for.
int64_t target_bytes(const CorpusSequences& source, int64_t index, const Tokenizer& tokenizer) {
  Batch batch;
  source.fill(index, {0, source.source().options().global_batch_sequences}, batch);
  int64_t bytes = 0;
  for (const int32_t target : batch.target_T) {
    if (target != kIgnoredTarget) bytes += tokenizer.text_bytes(target);
  }
  return bytes;
}

Corpus eval_corpus(const EvalOptions& options, const Config& config) {
  DataOptions data = data_options(config);
  if (options.data.empty()) return open_data(data).validation;
  data.data.train = options.data;
  data.data.validation.clear();
  data.data.validation_fraction = 0;
  return open_data(data).train;
}

}  // namespace

int command_eval(const EvalOptions& options) {
  FileSystem files;
  LoadedModel model = load_model(files, options.model);
  set_device(model.config, options.model.device);
  if (options.sequence_length > 0) model.config.train.sequence_length = options.sequence_length;
  Config config = single_rank_config(model.config);
  BatchOptions batches;
  batches.sequence_length = config.train.sequence_length;
  batches.global_batch_sequences = 1;
  batches.order = BatchOrder::spread;
  batches.document_mask = config.data.document_mask ? DocumentMask::on : DocumentMask::off;
  batches.sequence_limit = options.sequences;
  const CorpusSequences source(BatchSource(eval_corpus(options, model.config), batches));
  EvalTotals totals;
  const LaunchOptions launch{.ranks = 1, .device = config.run.device, .workers = options.workers};
  launch_ranks(launch, [&](RankEnvironment& environment) {
    Rank rank(config, environment);
    TrainStep step(rank, config.model);
    load_weights(step, *model.weights, LoadState::weights);
    for (int64_t batch = 0; batch < source.source().spread_batches(); ++batch) {
      const TrainStep::Evaluation part = step.evaluate(source, batch, nullptr);
      totals.loss += part.loss_sum;
      totals.tokens += part.tokens;
      totals.text_bytes += target_bytes(source, batch, model.tokenizer);
    }
  });
  if (totals.tokens == 0) fail(ExitCode::bad_corpus, "no tokens to evaluate on");
  constexpr double kNatsPerBit = 0.69314718055994530942;
  const double loss = totals.loss / static_cast<double>(totals.tokens);
  const double bits_per_byte =
      totals.loss / kNatsPerBit / static_cast<double>(std::max<int64_t>(1, totals.text_bytes));
  if (options.format == OutputFormat::json) {
    const nlohmann::json object{{"loss", loss},
                                {"perplexity", fmath::exp(loss)},
                                {"bits_per_byte", bits_per_byte},
                                {"tokens", totals.tokens},
                                {"step", model.step}};
    fmt::print("{}\n", object.dump());
  } else {
    fmt::print("loss {:.6f} nats/token, perplexity {:.4f}, {:.4f} bits/byte over {} tokens\n", loss,
               fmath::exp(loss), bits_per_byte, totals.tokens);
  }
  return 0;
}

}  // namespace cambium
