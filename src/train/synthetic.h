// Synthetic documents: the data of checks, tests and benchmarks, a pure function of the seed.
#pragma once

#include "src/config/config.h"
#include "src/train/train_step.h"

namespace cambium {

// Documents of random lengths with Zipf-like random tokens: low ids are common, so that experts'
// loads are uneven and some ids never occur. A pure function of (seed, batch, sequence).
class SyntheticSequences : public SequenceSource {
 public:
  explicit SyntheticSequences(const Config& config) : config_(config) {}
  void fill(int64_t batch_index, SequenceRange range, Batch& batch) const override;
  int64_t target_count(int64_t batch_index) const override;

 private:
  void add_sequence(int64_t batch_index, int64_t sequence, int64_t slot, Batch& batch) const;
  Config config_;
};

}  // namespace cambium
