// Packing of sequences, targets and document starts (batch.h).
#include "src/data/batch.h"

#include <algorithm>

#include "src/base/check.h"
#include "src/base/philox.h"

namespace cambium {

BatchSource::BatchSource(Corpus corpus, const BatchOptions& options)
    : corpus_(std::move(corpus)), options_(options) {
  CHECK_GT(options.sequence_length, 0);
  CHECK_GT(options.global_batch_sequences, 0);
  CHECK_GE(options.sequence_limit, 0);
  corpus_sequences_ = std::max<int64_t>(0, corpus_.token_count() - 1) / options.sequence_length;
  if (corpus_sequences_ == 0)
    fail(ExitCode::bad_corpus,
         "the corpus has {} tokens, fewer than one sequence of train.sequence_length = {} and its "
         "last target; give more text or shorten the sequence",
         corpus_.token_count(), options.sequence_length);
  sequences_ = corpus_sequences_;
  if (options.order == BatchOrder::spread && options.sequence_limit > 0)
    sequences_ = std::min(sequences_, options.sequence_limit);
}

int64_t BatchSource::spread_batches() const {
  CHECK(options_.order == BatchOrder::spread);
  return (sequences_ + options_.global_batch_sequences - 1) / options_.global_batch_sequences;
}

int64_t BatchSource::sequence_index(int64_t number) const {
  CHECK_GE(number, 0);
  if (options_.order == BatchOrder::spread) {
    if (number >= sequences_) return -1;
    // Evenly spaced, the first at 0: floor(number * corpus_sequences / sequences), which fits.
    const int64_t whole = corpus_sequences_ / sequences_, rest = corpus_sequences_ % sequences_;
    return number * whole + number * rest / sequences_;
  }
  const auto sequences = static_cast<uint64_t>(sequences_);
  const uint64_t epoch = static_cast<uint64_t>(number) / sequences;
  const uint64_t place = static_cast<uint64_t>(number) % sequences;
  return static_cast<int64_t>(permute_index(place, sequences, options_.seed, epoch));
}

void BatchSource::fill(int64_t batch_index, SequenceRange range, Batch& batch) const {
  CHECK(batch_index >= 0 && range.first_sequence >= 0 && range.sequence_count >= 0);
  CHECK_LE(range.first_sequence + range.sequence_count, options_.global_batch_sequences);
  const auto tokens = static_cast<size_t>(range.sequence_count * options_.sequence_length);
  batch.token_T.resize(tokens);
  batch.target_T.resize(tokens);
  batch.position_T.resize(tokens);
  batch.document_start_T.resize(tokens);
  const int64_t first = batch_index * options_.global_batch_sequences + range.first_sequence;
  for (int64_t slot = 0; slot < range.sequence_count; ++slot)
    fill_sequence(first + slot, slot, batch);
}

void BatchSource::fill_sequence(int64_t number, int64_t slot, Batch& batch) const {
  const int64_t S = options_.sequence_length;
  const int64_t row = slot * S;
  const int64_t index = sequence_index(number);
  int32_t* token_S = &batch.token_T[static_cast<size_t>(row)];
  int32_t* target_S = &batch.target_T[static_cast<size_t>(row)];
  if (index < 0) {
    std::fill_n(token_S, S, corpus_.eos());
    std::fill_n(target_S, S, kIgnoredTarget);
  } else {
    corpus_.read(index * S, S, token_S);
    corpus_.read(index * S + 1, S, target_S);
  }
  // Document ends within the sequence: no target there, and the mask starts anew after it.
  const std::vector<int64_t>& ends = corpus_.document_offsets();
  auto end = index < 0 ? ends.end() : std::upper_bound(ends.begin(), ends.end(), index * S);
  int64_t start = 0;
  for (int64_t position = 0; position < S; ++position) {
    if (end != ends.end() && *end == index * S + position) {
      if (options_.document_mask == DocumentMask::on) start = position;
      ++end;
    }
    if (end != ends.end() && *end == index * S + position + 1) target_S[position] = kIgnoredTarget;
    const auto t = static_cast<size_t>(row + position);
    batch.position_T[t] = static_cast<int32_t>(position - start);
    batch.document_start_T[t] = static_cast<int32_t>(row + start);
  }
}

int64_t BatchSource::target_count(int64_t batch_index) const {
  const int64_t S = options_.sequence_length, B = options_.global_batch_sequences;
  const std::vector<int64_t>& ends = corpus_.document_offsets();
  int64_t count = 0;
  for (int64_t number = batch_index * B; number < (batch_index + 1) * B; ++number) {
    const int64_t index = sequence_index(number);
    if (index < 0) continue;
    // Each document end in (begin, begin + S] takes one target.
    const auto first = std::upper_bound(ends.begin(), ends.end(), index * S);
    const auto last = std::upper_bound(first, ends.end(), (index + 1) * S);
    count += S - (last - first);
  }
  return count;
}

}  // namespace cambium
