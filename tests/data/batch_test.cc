// Batches: packing, masks, ignored targets, order for every layout, epochs, validation.
#include "src/data/batch.h"

#include <algorithm>
#include <numeric>

#include "tests/data/scratch.h"

namespace cambium {
namespace {

constexpr int64_t kS = 16;

// Documents of several lengths, one of them longer than a sequence, one of a single byte.
std::string sample_text() {
  std::string text;
  for (int document = 0; document < 40; ++document) {
    const int bytes = document == 7 ? 100 : 1 + document * 5 % 23;
    for (int i = 0; i < bytes; ++i) text.push_back(static_cast<char>('a' + (document + i) % 26));
    text.push_back('\f');
  }
  return text;
}

class BatchTest : public testing::Test {
 protected:
  BatchTest() {
    scratch_.write("text.txt", sample_text());
    build_token_file(
        {.source_paths = {scratch_.path("text.txt")}, .token_path = scratch_.path("text.h5")},
        Tokenizer());
    corpus_ = Corpus({TokenFile::open(scratch_.path("text.h5"))});
    all_.resize(static_cast<size_t>(corpus_.token_count()));
    corpus_.read(0, corpus_.token_count(), all_.data());
  }
  BatchSource source(BatchOptions options) const {
    options.sequence_length = kS;
    return BatchSource(corpus_, options);
  }
  // What the packing rule says, from the whole corpus and without the offsets.
  void expect_row(const Batch& batch, int64_t row, int64_t index, DocumentMask mask) const {
    int64_t start = 0;
    for (int64_t position = 0; position < kS; ++position) {
      const auto t = static_cast<size_t>(row * kS + position);
      const auto token = static_cast<size_t>(index * kS + position);
      if (position > 0 && all_[token - 1] == kByteTokenizerEos && mask == DocumentMask::on)
        start = position;
      EXPECT_EQ(batch.token_T[t], all_[token]);
      const bool is_end = all_[token] == kByteTokenizerEos;
      EXPECT_EQ(batch.target_T[t], is_end ? kIgnoredTarget : all_[token + 1]);
      EXPECT_EQ(batch.position_T[t], position - start);
      EXPECT_EQ(batch.document_start_T[t], row * kS + start);
    }
  }

  ScratchDirectory scratch_;
  Corpus corpus_;
  std::vector<int32_t> all_;
};

TEST_F(BatchTest, RowsFollowThePackingRule) {
  for (DocumentMask mask : {DocumentMask::off, DocumentMask::on}) {
    const BatchSource batches = source({.global_batch_sequences = 5, .document_mask = mask});
    Batch batch;
    for (int64_t b = 0; b < 20; ++b) {
      batches.fill(b, {0, 5}, batch);
      for (int64_t row = 0; row < 5; ++row)
        expect_row(batch, row, batches.sequence_index(b * 5 + row), mask);
      const auto targets = std::count_if(batch.target_T.begin(), batch.target_T.end(),
                                         [](int32_t target) { return target != kIgnoredTarget; });
      EXPECT_EQ(batches.target_count(b), targets);
    }
  }
}

TEST_F(BatchTest, EveryLayoutSeesTheSameOrder) {
  constexpr int64_t kB = 12;
  const BatchSource batches = source({.global_batch_sequences = kB});
  for (int64_t part : {1, 2, 3, 4, 6, 12}) {
    std::vector<int32_t> tokens, whole_tokens, targets, whole_targets;
    Batch batch;
    for (int64_t b = 0; b < 6; ++b) {
      batches.fill(b, {0, kB}, batch);
      whole_tokens.insert(whole_tokens.end(), batch.token_T.begin(), batch.token_T.end());
      whole_targets.insert(whole_targets.end(), batch.target_T.begin(), batch.target_T.end());
      for (int64_t first = 0; first < kB; first += part) {
        batches.fill(b, {first, part}, batch);
        ASSERT_EQ(std::ssize(batch.token_T), part * kS);
        EXPECT_EQ(batch.document_start_T[0], 0);
        tokens.insert(tokens.end(), batch.token_T.begin(), batch.token_T.end());
        targets.insert(targets.end(), batch.target_T.begin(), batch.target_T.end());
      }
    }
    EXPECT_EQ(tokens, whole_tokens);
    EXPECT_EQ(targets, whole_targets);
  }
}

TEST_F(BatchTest, EachEpochIsAnotherPermutationOfAllSequences) {
  const BatchSource batches = source({.global_batch_sequences = 4, .seed = 9});
  const int64_t sequences = batches.sequences();
  ASSERT_EQ(sequences, (corpus_.token_count() - 1) / kS);
  std::vector<std::vector<int64_t>> epochs;
  for (int64_t epoch = 0; epoch < 3; ++epoch) {
    std::vector<int64_t> order;
    for (int64_t place = 0; place < sequences; ++place)
      order.push_back(batches.sequence_index(epoch * sequences + place));
    epochs.push_back(order);
    std::sort(order.begin(), order.end());
    std::vector<int64_t> all(static_cast<size_t>(sequences));
    std::iota(all.begin(), all.end(), 0);
    EXPECT_EQ(order, all);
  }
  EXPECT_NE(epochs[0], epochs[1]);
  EXPECT_NE(epochs[1], epochs[2]);
  const BatchSource other_seed = source({.global_batch_sequences = 4, .seed = 10});
  std::vector<int64_t> other;
  for (int64_t place = 0; place < sequences; ++place)
    other.push_back(other_seed.sequence_index(place));
  EXPECT_NE(epochs[0], other);
}

TEST_F(BatchTest, TheCursorIsTheBatchNumberAlone) {
  const BatchSource first = source({.global_batch_sequences = 4});
  Batch batch, again;
  for (int64_t b = 0; b < 9; ++b) first.fill(b, {0, 4}, batch);
  const BatchSource resumed = source({.global_batch_sequences = 4});
  resumed.fill(8, {0, 4}, again);
  EXPECT_EQ(batch.token_T, again.token_T);
  EXPECT_EQ(batch.target_T, again.target_T);
  EXPECT_EQ(first.target_count(8), resumed.target_count(8));
}

TEST_F(BatchTest, ValidationIsSpreadAndFilledUpWithIgnoredTargets) {
  const BatchSource batches =
      source({.global_batch_sequences = 4, .order = BatchOrder::spread, .sequence_limit = 10});
  EXPECT_EQ(batches.sequences(), 10);
  EXPECT_EQ(batches.spread_batches(), 3);
  const int64_t corpus_sequences = (corpus_.token_count() - 1) / kS;
  for (int64_t number = 0; number < 10; ++number)
    EXPECT_EQ(batches.sequence_index(number), number * corpus_sequences / 10);
  EXPECT_EQ(batches.sequence_index(10), -1);
  Batch batch;
  batches.fill(2, {0, 4}, batch);
  int64_t targets = 0;
  for (size_t t = 0; t < batch.target_T.size(); ++t) {
    if (t < 2 * kS) {
      targets += batch.target_T[t] != kIgnoredTarget ? 1 : 0;
    } else {
      EXPECT_EQ(batch.target_T[t], kIgnoredTarget);
      EXPECT_EQ(batch.token_T[t], kByteTokenizerEos);
    }
  }
  EXPECT_EQ(batches.target_count(2), targets);
  const BatchSource every = source({.global_batch_sequences = 4, .order = BatchOrder::spread});
  EXPECT_EQ(every.sequences(), corpus_sequences);
  for (int64_t number = 0; number < corpus_sequences; ++number)
    EXPECT_EQ(every.sequence_index(number), number);
}

TEST_F(BatchTest, ACutCorpusReadsLikeThePartOfTheWhole) {
  const Corpus twice(
      {TokenFile::open(scratch_.path("text.h5")), TokenFile::open(scratch_.path("text.h5"))});
  std::vector<int32_t> both = all_;
  both.insert(both.end(), all_.begin(), all_.end());
  ASSERT_EQ(twice.token_count(), std::ssize(both));
  EXPECT_EQ(twice.document_count(), 2 * corpus_.document_count());
  for (int64_t first : {int64_t{0}, int64_t{1}, std::ssize(all_) - 1, std::ssize(all_)}) {
    for (int64_t count : {int64_t{1}, int64_t{7}, std::ssize(both) - first}) {
      const Corpus part = twice.cut(first, count);
      ASSERT_EQ(part.token_count(), count);
      std::vector<int32_t> tokens(static_cast<size_t>(count));
      part.read(0, count, tokens.data());
      EXPECT_TRUE(std::equal(tokens.begin(), tokens.end(), both.begin() + first));
      // Documents end where eos stands, and the last one where the part ends.
      std::vector<int64_t> ends{0};
      for (int64_t i = 0; i < count; ++i)
        if (tokens[static_cast<size_t>(i)] == kByteTokenizerEos) ends.push_back(i + 1);
      if (ends.back() != count) ends.push_back(count);
      EXPECT_EQ(part.document_offsets(), ends);
    }
  }
}

TEST_F(BatchTest, ACorpusShorterThanASequenceIsRefused) {
  expect_fails(32, "train.sequence_length", [&] {
    BatchSource(corpus_.cut(0, kS), {.sequence_length = kS, .global_batch_sequences = 1});
  });
  EXPECT_EQ(
      BatchSource(corpus_.cut(0, kS + 1), {.sequence_length = kS, .global_batch_sequences = 1})
          .sequences(),
      1);
}

// ---- The [data] section.

class OpenDataTest : public testing::Test {
 protected:
  TrainingData open(DataConfig data) const {
    return open_data({.data = std::move(data),
                      .model_vocab = 300,
                      .sequence_length = kS,
                      .cache_directory = scratch_.path("cache")});
  }
  std::string text_of(const TrainingData& data, const Corpus& corpus) const {
    std::vector<int32_t> tokens(static_cast<size_t>(corpus.token_count()));
    corpus.read(0, corpus.token_count(), tokens.data());
    return data.tokenizer.decode(tokens);
  }
  ScratchDirectory scratch_;
};

TEST_F(OpenDataTest, HoldsOutTheLastDocuments) {
  DataConfig data;
  data.train = {scratch_.write("a.txt", sample_text())};
  data.validation_fraction = 0.1;
  const TrainingData result = open(data);
  const int64_t total = result.train.token_count() + result.validation.token_count();
  EXPECT_EQ(total, std::ssize(sample_text()));  // an eos stands for each form feed
  EXPECT_GE(result.validation.token_count(), (total + 9) / 10);
  // One document fewer would be too few.
  EXPECT_LT(result.validation.token_count() - result.validation.document_offsets()[1],
            (total + 9) / 10);
  EXPECT_EQ(result.train.document_count() + result.validation.document_count(), 40);
  std::string documents = sample_text();
  std::erase(documents, '\f');
  EXPECT_EQ(text_of(result, result.train) + text_of(result, result.validation), documents);
}

TEST_F(OpenDataTest, CutsASingleDocument) {
  DataConfig data;
  data.train = {scratch_.write("a.txt", std::string(1000, 'x'))};
  const TrainingData result = open(data);
  EXPECT_EQ(result.train.token_count(), 1001 - 51);
  EXPECT_EQ(result.validation.token_count(), 51);
  data.validation_fraction = 0;
  EXPECT_EQ(open(data).validation.token_count(), 0);
  data.train = {scratch_.write("b.txt", std::string(20, 'x'))};
  data.validation_fraction = 0.05;
  expect_fails(32, "too few", [&] { open(data); });
}

TEST_F(OpenDataTest, CachesByContentAndTakesNamedValidationFiles) {
  DataConfig data;
  data.train = {scratch_.write("a.txt", sample_text()),
                scratch_.write("b.jsonl", "{\"text\": \"one more document of some length\"}\n")};
  data.validation = {scratch_.write("v.txt", "held out text which is long enough")};
  const TrainingData result = open(data);
  EXPECT_EQ(text_of(result, result.validation), "held out text which is long enough");
  EXPECT_EQ(result.train.document_count(), 41);
  auto entries = [&] {
    return std::distance(std::filesystem::directory_iterator(scratch_.path("cache")), {});
  };
  EXPECT_EQ(entries(), 3);
  open(data);
  EXPECT_EQ(entries(), 3);
  data.validation = {scratch_.write("w.txt", "held out text which is long enough")};
  open(data);
  EXPECT_EQ(entries(), 3);  // the same content under another name
  scratch_.write("w.txt", "held out text which is long enough, and changed");
  open(data);
  EXPECT_EQ(entries(), 4);
}

TEST_F(OpenDataTest, RebuildsADamagedCacheFile) {
  DataConfig data;
  data.train = {scratch_.write("a.txt", sample_text())};
  const std::string text = text_of(open(data), open(data).train);
  const auto entry = *std::filesystem::directory_iterator(scratch_.path("cache"));
  std::filesystem::resize_file(entry.path(), 700);
  const TrainingData again = open(data);
  EXPECT_EQ(text_of(again, again.train), text);
}

TEST_F(OpenDataTest, RefusesWhatCannotBeUsed) {
  DataConfig data;
  expect_fails(32, "data.train", [&] { open(data); });
  data.train = {scratch_.path("data/quickstart.txt")};
  expect_fails(32, "scripts/setup.sh", [&] { open(data); });
  data.train = {scratch_.path("other.txt")};
  expect_fails(32, "other.txt", [&] { open(data); });
  data.train = {scratch_.write("a.pdf", "x")};
  expect_fails(32, "a.pdf", [&] { open(data); });
  data.train = {scratch_.write("a.txt", sample_text())};
  data.validation = {scratch_.path("none.txt")};
  expect_fails(32, "data.validation", [&] { open(data); });
  data.validation.clear();
  expect_fails(2, "model.vocab",
               [&] { open_data({.data = data, .model_vocab = 256, .sequence_length = kS}); });
  std::filesystem::create_directory(scratch_.path("dir.txt"));
  data.train = {scratch_.path("dir.txt")};
  expect_fails(32, "not a regular file", [&] { open(data); });
}

}  // namespace
}  // namespace cambium
