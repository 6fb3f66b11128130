// Batches: packed sequences in an order that is a pure function of (seed, epoch, position).
//
// Sequence i of a corpus is its tokens [i*S, i*S + S), its targets the tokens one further on, so
// floor((tokens - 1) / S) sequences make an epoch and the rest of the tokens is left over. The
// target of a document's last token (its eos) is ignored: the loss never crosses from one document
// into the next. The cursor of a run is one integer, the number of sequences consumed; sequence
// number n of a run is place n % sequences of epoch n / sequences, and a shuffled epoch visits
// sequence permute_index(place, sequences, seed, epoch). Batch b holds the sequence numbers
// [b*B, b*B + B), whatever the layout: ranks ask for the part that they need.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cross_entropy.h"
#include "src/data/corpus.h"

namespace cambium {

enum class BatchOrder {
  shuffled,  // training: epochs without end, each a permutation
  spread,    // validation: one pass over `sequence_limit` sequences spread evenly over the corpus
};
enum class DocumentMask { off, on };

struct BatchOptions {
  int64_t sequence_length = 0;         // S
  int64_t global_batch_sequences = 0;  // B
  BatchOrder order = BatchOrder::shuffled;
  DocumentMask document_mask = DocumentMask::on;
  uint64_t seed = 1;
  int64_t sequence_limit = 0;  // spread: at most so many sequences; 0 = all
};

// T = sequences * S tokens, sequence by sequence.
struct Batch {
  std::vector<int32_t> token_T;
  std::vector<int32_t> target_T;    // kIgnoredTarget or the next token
  std::vector<int32_t> position_T;  // within the sequence; within the document's part of it when
                                    // the document mask is on
  // The index in this batch of the first token that t may attend to: its document's first token in
  // the sequence, or the sequence's first token when the mask is off.
  std::vector<int32_t> document_start_T;
};

// Sequences of a batch, counted within the global batch.
struct SequenceRange {
  int64_t first_sequence = 0;
  int64_t sequence_count = 0;
};

// Immutable after construction; used from any thread.
class BatchSource {
 public:
  // A corpus shorter than one sequence is an Error with exit code 32.
  BatchSource(Corpus corpus, const BatchOptions& options);

  const BatchOptions& options() const { return options_; }
  // Sequences of one epoch, or of the one validation pass.
  int64_t sequences() const { return sequences_; }
  // Batches of the one validation pass; the last one may be filled up.
  int64_t spread_batches() const;

  // Fills `batch` with sequences [first, first + count) of global batch `batch_index` (0 = the
  // run's first). `spread`: sequences after the last are eos throughout, with ignored targets.
  void fill(int64_t batch_index, SequenceRange range, Batch& batch) const;
  // N: the targets of the whole global batch that are not ignored.
  int64_t target_count(int64_t batch_index) const;
  // The index in the corpus of sequence number `number` of the run; -1 = after the last (spread).
  int64_t sequence_index(int64_t number) const;

 private:
  void fill_sequence(int64_t number, int64_t slot, Batch& batch) const;
  Corpus corpus_;
  BatchOptions options_;
  int64_t corpus_sequences_ = 0;
  int64_t sequences_ = 0;
};

}  // namespace cambium
