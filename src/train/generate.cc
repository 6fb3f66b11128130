#include "src/train/generate.h"

#include <algorithm>
#include <numeric>

#include "src/base/fmath.h"
#include "src/base/philox.h"
#include "src/train/train_run.h"

namespace cambium {

Config single_rank_config(const Config& config) {
  Config single = config;
  single.parallel = ParallelConfig{};
  single.train.global_batch_sequences = 1;
  single.train.micro_batch_sequences = 1;
  single.balance.loss = BalanceLoss::none;
  single.balance.z_loss_weight = 0;
  single.numerics.reduction = ReductionMode::fast;
  single.faults.clear();
  return single;
}

namespace {

// Draws from softmax(logits / temperature) restricted to the top_k largest.
int32_t draw_token(const float* logits_V, int64_t vocab, const GenerateRequest& request,
                   uint64_t draw) {
  std::vector<int32_t> order(static_cast<size_t>(vocab));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return logits_V[a] > logits_V[b]; });
  if (request.temperature <= 0) return order.front();
  const int64_t kept = request.top_k > 0 ? std::min(request.top_k, vocab) : vocab;
  std::vector<double> cumulative(static_cast<size_t>(kept));
  double total = 0;
  for (int64_t i = 0; i < kept; ++i) {
    const double gap = static_cast<double>(logits_V[order[i]]) - logits_V[order[0]];
    total += fmath::exp(gap / request.temperature);
    cumulative[i] = total;
  }
  const double at =
      total * random_uniform({request.seed, RandomStream::data, mix_u64(request.seed)}, draw);
  const auto found = std::upper_bound(cumulative.begin(), cumulative.end(), at);
  return order[std::min<int64_t>(found - cumulative.begin(), kept - 1)];
}

}  // namespace

std::string generate_on_rank(RankEnvironment& environment, const Config& single_rank,
                             TensorSource& weights, const Tokenizer& tokenizer,
                             const GenerateRequest& request) {
  Rank rank(single_rank, environment);
  TrainStep step(rank, single_rank.model);
  load_weights(step, weights, LoadState::weights);
  const int64_t window = single_rank.train.sequence_length, vocab = single_rank.model.vocab;
  std::vector<int32_t> tokens{tokenizer.eos()};
  if (tokenizer.encode(request.prompt, tokens) >= 0) {
    fail(ExitCode::usage, "the prompt is not valid UTF-8 text for this tokenizer");
  }
  const size_t prompt_end = tokens.size();
  const Buffer logits = rank.workspace(4 * window * vocab, "logits");
  for (int64_t draw = 0; draw < request.tokens; ++draw) {
    const int64_t count = std::min<int64_t>(window, std::ssize(tokens));
    const std::vector<int32_t> token_T(tokens.end() - count, tokens.end());
    const std::vector<int32_t> target_T(static_cast<size_t>(count), kIgnoredTarget);
    std::vector<int32_t> position_T(static_cast<size_t>(count));
    std::iota(position_T.begin(), position_T.end(), 0);
    const MicroBatch batch = step.model().upload({.token_T = &token_T,
                                                  .target_T = &target_T,
                                                  .position_T = &position_T,
                                                  .sequence_length = count},
                                                 {});
    step.model().forward({.batch = batch, .x_TD = {}, .logits_TV = logits.f32()});
    const std::vector<float> last = rank.read<float>(logits.f32() + (count - 1) * vocab, vocab);
    rank.finish_step();
    // Ids that the tokenizer does not have are never drawn.
    const int64_t drawable = std::min(vocab, tokenizer.vocab());
    const int32_t next = draw_token(last.data(), drawable, request, static_cast<uint64_t>(draw));
    if (next == tokenizer.eos() && request.at_document_end == DocumentEnd::stop) break;
    tokens.push_back(next);
  }
  return tokenizer.decode(std::span(tokens).subspan(prompt_end));
}

}  // namespace cambium
