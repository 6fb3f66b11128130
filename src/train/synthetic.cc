#include "src/train/synthetic.h"

#include <algorithm>

#include "src/base/philox.h"

namespace cambium {

void SyntheticSequences::fill(int64_t batch_index, SequenceRange range, Batch& batch) const {
  batch = Batch{};
  for (int64_t s = 0; s < range.sequence_count; ++s) {
    add_sequence(batch_index, range.first_sequence + s, s, batch);
  }
}

int64_t SyntheticSequences::target_count(int64_t batch_index) const {
  Batch batch;
  fill(batch_index, {0, config_.train.global_batch_sequences}, batch);
  return std::ranges::count_if(batch.target_T,
                               [](int32_t target) { return target != kIgnoredTarget; });
}

void SyntheticSequences::add_sequence(int64_t batch_index, int64_t sequence, int64_t slot,
                                      Batch& batch) const {
  const int64_t length = config_.train.sequence_length;
  const RandomSequence random{config_.run.seed, RandomStream::data,
                              static_cast<uint64_t>(batch_index << 32 | sequence)};
  auto token = [&](int64_t i) {
    const double u = random_uniform(random, static_cast<uint64_t>(i));
    return static_cast<int32_t>(u * u * u * static_cast<double>(config_.model.vocab));
  };
  int64_t document = 0;
  for (int64_t i = 0; i < length; ++i) {
    const bool ends = random_below(37, random, static_cast<uint64_t>(length + 1 + i)) == 0;
    batch.token_T.push_back(token(i));
    batch.target_T.push_back(ends ? kIgnoredTarget : token(i + 1));
    batch.position_T.push_back(static_cast<int32_t>(i - document));
    batch.document_start_T.push_back(static_cast<int32_t>(slot * length + document));
    if (ends) document = i + 1;
  }
}

}  // namespace cambium
