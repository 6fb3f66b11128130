// Counting, tuning and scoring of the n-gram baselines (ngram.h).
#include "src/data/ngram.h"

#include <algorithm>

#include "src/base/check.h"
#include "src/base/fmath.h"

namespace cambium {
namespace {

constexpr int64_t kMaxTokens = int64_t{1} << 25;  // 256 MiB of sorted pairs
constexpr double kAlphas[] = {0.001, 0.01, 0.1, 0.5, 1.0, 3.0};
constexpr double kDiscounts[] = {0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95};
constexpr int64_t kTuningShare = 10;  // the last 1/10 of the training pairs

// A token b after a token a, as one sortable number.
using TokenPair = uint64_t;
TokenPair make_pair_key(int32_t a, int32_t b) {
  return uint64_t{static_cast<uint32_t>(a)} << 32 | static_cast<uint32_t>(b);
}
size_t first_of(TokenPair pair) { return pair >> 32; }
size_t second_of(TokenPair pair) { return pair & 0xFFFFFFFF; }

std::vector<TokenPair> training_pairs(const Corpus& train) {
  const int64_t count = std::min(train.token_count(), kMaxTokens);
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  train.read(0, count, tokens.data());
  std::vector<TokenPair> pairs;
  pairs.reserve(tokens.size());
  const std::vector<int64_t>& ends = train.document_offsets();
  auto end = ends.begin() + 1;
  for (int64_t i = 0; i + 1 < count; ++i) {
    while (*end <= i) ++end;
    const auto at = static_cast<size_t>(i);
    if (*end != i + 1) pairs.push_back(make_pair_key(tokens[at], tokens[at + 1]));
  }
  return pairs;
}

std::vector<TokenPair> validation_pairs(const BatchSource& validation) {
  std::vector<TokenPair> pairs;
  Batch batch;
  for (int64_t b = 0; b < validation.spread_batches(); ++b) {
    validation.fill(b, {0, validation.options().global_batch_sequences}, batch);
    for (size_t t = 0; t < batch.token_T.size(); ++t)
      if (batch.target_T[t] != kIgnoredTarget)
        pairs.push_back(make_pair_key(batch.token_T[t], batch.target_T[t]));
  }
  return pairs;
}

// What a set of pairs says: c(a b), c(a), c(b), N(a .), N(. b).
struct PairCounts {
  std::vector<TokenPair> distinct;  // sorted
  std::vector<int64_t> count_of_distinct;
  std::vector<int64_t> context_V, follower_V;                // c(a), c(b)
  std::vector<int64_t> distinct_after_V, distinct_before_V;  // N(a .), N(. b)
  int64_t total = 0;

  int64_t count(TokenPair pair) const {
    const auto found = std::lower_bound(distinct.begin(), distinct.end(), pair);
    if (found == distinct.end() || *found != pair) return 0;
    return count_of_distinct[static_cast<size_t>(found - distinct.begin())];
  }
};

PairCounts count_pairs(std::vector<TokenPair> pairs, int64_t vocab) {
  PairCounts counts;
  const auto V = static_cast<size_t>(vocab);
  counts.context_V.resize(V);
  counts.follower_V.resize(V);
  counts.distinct_after_V.resize(V);
  counts.distinct_before_V.resize(V);
  counts.total = std::ssize(pairs);
  std::sort(pairs.begin(), pairs.end());
  for (size_t i = 0; i < pairs.size();) {
    const size_t first = i;
    while (i < pairs.size() && pairs[i] == pairs[first]) ++i;
    const auto times = static_cast<int64_t>(i - first);
    const size_t a = first_of(pairs[first]), b = second_of(pairs[first]);
    CHECK(a < V && b < V);
    counts.distinct.push_back(pairs[first]);
    counts.count_of_distinct.push_back(times);
    counts.context_V[a] += times;
    counts.follower_V[b] += times;
    ++counts.distinct_after_V[a];
    ++counts.distinct_before_V[b];
  }
  return counts;
}

// Additively smoothed shares of `count_V`.
std::vector<double> smoothed(const std::vector<int64_t>& count_V, double alpha) {
  double total = 0;
  for (int64_t count : count_V) total += static_cast<double>(count);
  const double scale = 1.0 / (total + alpha * static_cast<double>(count_V.size()));
  std::vector<double> share_V;
  for (int64_t count : count_V) share_V.push_back((static_cast<double>(count) + alpha) * scale);
  return share_V;
}

double unigram_nats(const std::vector<double>& share_V, const std::vector<TokenPair>& targets) {
  double sum = 0;
  for (TokenPair pair : targets) sum -= fmath::log(share_V[second_of(pair)]);
  return sum / static_cast<double>(targets.size());
}

// A target with the counts that its bigram probability needs.
struct CountedTarget {
  double pair_count, context_count, followers;
  size_t token;
};

std::vector<CountedTarget> look_up(const PairCounts& counts,
                                   const std::vector<TokenPair>& targets) {
  std::vector<CountedTarget> counted;
  counted.reserve(targets.size());
  for (TokenPair pair : targets) {
    const size_t a = first_of(pair);
    counted.push_back({static_cast<double>(counts.count(pair)),
                       static_cast<double>(counts.context_V[a]),
                       static_cast<double>(counts.distinct_after_V[a]), second_of(pair)});
  }
  return counted;
}

double bigram_nats(const std::vector<CountedTarget>& targets, const std::vector<double>& lower_V,
                   double discount) {
  double sum = 0;
  for (const CountedTarget& target : targets) {
    double probability = lower_V[target.token];
    if (target.context_count > 0)
      probability = (std::max(target.pair_count - discount, 0.0) +
                     discount * target.followers * probability) /
                    target.context_count;
    sum -= fmath::log(probability);
  }
  return sum / static_cast<double>(targets.size());
}

const std::vector<int64_t>& lower_counts(const PairCounts& counts, LowerOrder lower) {
  return lower == LowerOrder::unigram ? counts.follower_V : counts.distinct_before_V;
}

// The settings that do best on `held_out`, counted on the pairs before it: first alpha, by the
// unigram, then the discount and the lower order.
void tune(const PairCounts& counts, const std::vector<TokenPair>& held_out,
          NgramBaselines& settings) {
  double best_unigram = 1e300, best_bigram = 1e300;
  for (double alpha : kAlphas) {
    const double nats = unigram_nats(smoothed(counts.follower_V, alpha), held_out);
    if (nats >= best_unigram) continue;
    best_unigram = nats;
    settings.alpha = alpha;
  }
  const std::vector<CountedTarget> targets = look_up(counts, held_out);
  for (LowerOrder lower : {LowerOrder::unigram, LowerOrder::continuation}) {
    const std::vector<double> lower_V = smoothed(lower_counts(counts, lower), settings.alpha);
    for (double discount : kDiscounts) {
      const double nats = bigram_nats(targets, lower_V, discount);
      if (nats >= best_bigram) continue;
      best_bigram = nats;
      settings.discount = discount;
      settings.lower_order = lower;
    }
  }
}

}  // namespace

NgramBaselines ngram_baselines(const Corpus& train, const BatchSource& validation, int64_t vocab) {
  NgramBaselines result;
  const std::vector<TokenPair> targets = validation_pairs(validation);
  const std::vector<TokenPair> pairs = training_pairs(train);
  result.targets = std::ssize(targets);
  if (targets.empty() || std::ssize(pairs) < 2 * kTuningShare)
    fail(ExitCode::bad_corpus,
         "the n-gram baselines need more than {} training and {} validation tokens; give more text",
         pairs.size(), targets.size());
  const auto split = pairs.end() - std::ssize(pairs) / kTuningShare;
  tune(count_pairs({pairs.begin(), split}, vocab), {split, pairs.end()}, result);
  const PairCounts counts = count_pairs(pairs, vocab);
  result.unigram_nats = unigram_nats(smoothed(counts.follower_V, result.alpha), targets);
  const std::vector<double> lower_V =
      smoothed(lower_counts(counts, result.lower_order), result.alpha);
  result.bigram_nats = bigram_nats(look_up(counts, targets), lower_V, result.discount);
  return result;
}

}  // namespace cambium
