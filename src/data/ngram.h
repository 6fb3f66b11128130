// Smoothed unigram and bigram models of the training tokens: the bar that a trained model must beat
// on the same validation targets.
//
//   unigram  p(b)     = (c(b) + alpha) / (n + alpha V)
//   bigram   p(b | a) = max(c(a b) - d, 0) / c(a) + d N(a .) / c(a) * lower(b)
//            interpolated absolute discounting (Ney, Essen and Kneser 1994), N(a .) = distinct
//            followers of a; `lower` is the unigram or the continuation counts of Kneser and Ney
//            (1995), p(b) ~ N(. b), smoothed by alpha as above.
//
// alpha, d and the kind of `lower` are tuned on the last tenth of the training tokens, counted on
// the rest; the counts are then taken from all of them. Pairs across documents do not count, as in
// the batches. At most the first 2^25 tokens are used.
#pragma once

#include <cstdint>

#include "src/data/batch.h"

namespace cambium {

enum class LowerOrder { unigram, continuation };

struct NgramBaselines {
  double unigram_nats = 0;  // cross entropy per target
  double bigram_nats = 0;
  int64_t targets = 0;  // of the validation pass
  double alpha = 0;
  double discount = 0;
  LowerOrder lower_order = LowerOrder::unigram;
};

// `validation` is a spread source; every target of its pass that is not ignored counts once.
NgramBaselines ngram_baselines(const Corpus& train, const BatchSource& validation, int64_t vocab);

}  // namespace cambium
