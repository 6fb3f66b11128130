// embedding against its oracle: gathered bits, and the sparse weight gradient in both modes.
#include "tests/ops/cuda_test.h"
#include "tests/ops/embedding_cases.h"

namespace cambium::test {
namespace {

constexpr int64_t kSlots = 3;

struct EmbeddingTensors {
  EmbeddingTensors(const EmbeddingCase& shape, InputFamily family, DType dtype = DType::f32)
      : c(shape),
        w(Shape(c.V, c.D), dtype),
        token(Shape(c.T()), DType::i32),
        x(Shape(c.T(), c.D), dtype),
        d_x(Shape(c.T(), c.D), dtype),
        d_w(Shape(kSlots, c.V, c.D), DType::f32, c.V * c.D + 16),
        present(Shape(kSlots, c.V), DType::u8) {
    TestRandom random(static_cast<uint64_t>(c.T() * 1000 + c.V));
    w.fill_family(random, family);
    d_x.fill_family(random, family);
    // A few ids take most tokens, as in text.
    for (int64_t t = 0; t < c.T(); ++t) {
      token.set(t, t % 3 == 0 ? random.integer(0, std::min<int64_t>(3, c.V - 1))
                              : random.integer(0, c.V - 1));
    }
    present.fill(0);
  }
  void forward(int threads = 2) {
    run_op(
        embedding,
        EmbeddingArgs{.w_VD = w.in<Real>(), .token_T = token.in<int32_t>(), .x_TD = x.out<Real>()},
        threads);
  }
  EmbeddingWgradArgs accumulate_args() {
    return {
        .d_x_TD = d_x.in<Real>(), .token_T = token.in<int32_t>(), .d_w_SVD = d_w.inout<float>()};
  }
  void accumulate(int threads = 2) { run_op(embedding_wgrad, accumulate_args(), threads); }
  // Rows of `nodes`: first, end, destination, fold count, folds.
  EmbeddingWgradArgs fold_args(const std::vector<std::vector<int>>& nodes,
                               int64_t first_block = 0) {
    table = TestTensor(Shape(static_cast<int64_t>(nodes.size()), kNodeColumns), DType::i32);
    for (size_t node = 0; node < nodes.size(); ++node) {
      for (size_t column = 0; column < nodes[node].size(); ++column) {
        table.set(static_cast<int64_t>(node) * kNodeColumns + column, nodes[node][column]);
      }
    }
    EmbeddingWgradArgs args{.d_x_TD = d_x.in<Real>(),
                            .token_T = token.in<int32_t>(),
                            .d_w_SVD = d_w.inout<float>(),
                            .present_SV = present.inout<uint8_t>()};
    args.target = {GradMode::nodes, table.in<int32_t>(), first_block + c.blocks};
    args.first_block = first_block;
    args.block_tokens = c.block_tokens;
    return args;
  }
  void fold(const std::vector<std::vector<int>>& nodes, int64_t first_block = 0, int threads = 2) {
    run_op(embedding_wgrad, fold_args(nodes, first_block), threads);
  }
  // Value of (slot, id), absent when its presence is 0.
  std::optional<std::vector<float>> value(int64_t slot, int64_t id) const {
    if (present.at(slot * c.V + id) == 0) return std::nullopt;
    std::vector<float> values;
    for (int64_t i = 0; i < c.D; ++i) {
      values.push_back(static_cast<float>(d_w.at((slot * c.V + id) * c.D + i)));
    }
    return values;
  }
  EmbeddingCase c;
  TestTensor w, token, x, d_x, d_w, present;
  TestTensor table{Shape(1, kNodeColumns), DType::i32};
};

TEST(Embedding, ForwardCopiesRowsBitForBit) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const EmbeddingCase& c : kEmbeddingCases) {
      EmbeddingTensors t(c, InputFamily::normals, dtype);
      t.forward();
      std::vector<double> expected;
      for (int64_t row = 0; row < c.T(); ++row) {
        const int64_t id = static_cast<int64_t>(t.token.at(row));
        for (int64_t i = 0; i < c.D; ++i) expected.push_back(t.w.at(id * c.D + i));
      }
      EXPECT_TRUE(bits_equal(t.x, expected));
    }
  }
}

TEST(Embedding, WgradStoresWhatItWouldAddToZeros) {
  for (const EmbeddingCase& c : kEmbeddingCases) {
    EmbeddingTensors added(c, InputFamily::normals), stored(c, InputFamily::normals);
    const int64_t slot = c.V * c.D;
    for (int64_t i = 0; i < slot; ++i) added.d_w.set(i, 0);
    added.accumulate();
    EmbeddingWgradArgs args = stored.accumulate_args();
    args.target.mode = GradMode::store;
    run_op(embedding_wgrad, args);
    EXPECT_TRUE(bits_equal(stored.d_w, added.d_w));  // the other slots' poison too
  }
}

TEST(Embedding, AccumulateAddsEveryRowToItsId) {
  for (const InputFamily family : {InputFamily::integers, InputFamily::normals}) {
    for (const EmbeddingCase& c : kEmbeddingCases) {
      EmbeddingTensors t(c, family);
      t.d_w.fill(2.0);
      t.accumulate();
      std::vector<double> expected(kSlots * c.V * c.D, 2.0);
      for (int64_t row = 0; row < c.T(); ++row) {
        const int64_t id = static_cast<int64_t>(t.token.at(row));
        for (int64_t i = 0; i < c.D; ++i) expected[id * c.D + i] += t.d_x.at(row * c.D + i);
      }
      if (family == InputFamily::integers) {
        EXPECT_TRUE(bits_equal(t.d_w, expected));
      } else {
        EXPECT_TRUE(within(t.d_w, expected, tolerance(1, c.T())));
      }
    }
  }
}

TEST(Embedding, ANodeHoldsTheTreeSumsOfItsIds) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const EmbeddingCase& c : kEmbeddingCases) {
      EmbeddingTensors t(c, InputFamily::normals, dtype);
      for (int64_t id = 0; id < c.V; ++id) t.present.set(c.V + id, 1);  // a reused slot
      t.fold({{64, static_cast<int>(64 + c.blocks), 1, 0}}, 64);
      const auto d_x = t.d_x.values(), token = t.token.values();
      for (int64_t id = 0; id < c.V; ++id) {
        const auto expected = embedding_tree_oracle<float>(d_x, token, c, id, 0, c.blocks);
        ASSERT_EQ(t.value(1, id), expected) << "id " << id;
        ASSERT_EQ(t.value(0, id), std::nullopt);
      }
      EXPECT_TRUE(t.d_w.guards_intact());
    }
  }
}

TEST(Embedding, AnyCutIntoNodesEndsInTheSameBits) {
  const EmbeddingCase c{13, 4, 29, 10};
  EmbeddingTensors whole(c, InputFamily::normals), cut = whole;
  whole.fold({{0, 13, 0, 0}});
  cut.fold({{0, 8, 0, 0}, {8, 12, 1, 0}, {12, 13, 1, 2, 1, 0}});
  for (int64_t id = 0; id < c.V; ++id) ASSERT_EQ(cut.value(1, id), whole.value(0, id)) << id;
}

TEST(Embedding, GradientAgreesWithFiniteDifferences) {
  const EmbeddingCase c{4, 4, 9, 6};
  EmbeddingTensors t(c, InputFamily::normals);
  t.d_w.fill(0.0);
  t.accumulate();
  std::vector<double> gradient = t.d_w.values();
  gradient.resize(c.V * c.D);
  auto loss = [&](const std::vector<double>& w) {
    double total = 0.0;
    for (int64_t i = 0; i < c.T() * c.D; ++i) {
      const int64_t id = static_cast<int64_t>(t.token.at(i / c.D));
      total += t.d_x.at(i) * w[id * c.D + i % c.D];
    }
    return total;
  };
  TestRandom random(5);
  EXPECT_LT(finite_difference_error(loss, t.w.values(), gradient, random), 1e-4);
}

TEST(Embedding, ThreadsDoNotChangeBits) {
  expect_thread_independent([](int threads) {
    EmbeddingTensors t({16, 32, 500, 96}, InputFamily::normals);
    t.d_w.fill(0.0);
    t.forward(threads);
    t.accumulate(threads);
    t.fold({{0, 8, 1, 0}, {8, 16, 2, 1, 1}}, 0, threads);
    std::vector<std::byte> bits = t.x.bits();
    for (const TestTensor* tensor : {&t.d_w, &t.present}) {
      const std::vector<std::byte> more = tensor->bits();
      bits.insert(bits.end(), more.begin(), more.end());
    }
    return bits;
  });
}

TEST(Embedding, MustFailWhenAbsentIsZeroAndForBadIds) {
  const EmbeddingCase c{4, 4, 40, 8};
  EmbeddingTensors t(c, InputFamily::normals);
  t.fold({{0, 4, 0, 0}});
  int64_t absent = 0;
  for (int64_t id = 0; id < c.V; ++id) absent += t.value(0, id) ? 0 : 1;
  EXPECT_GT(absent, 20);  // ids that never occur are absent, not zero
  t.token.set(5, 40);
  EXPECT_THROW(t.forward(), Error);
  EXPECT_THROW(t.fold({{0, 4, 0, 0}}), Error);
  t.token.set(5, -1);
  EXPECT_THROW(t.accumulate(), Error);
}

TEST(Embedding, CudaGivesTheReferencesBits) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  std::vector<EmbeddingCase> cases = kEmbeddingCases;
  cases.push_back({24, 32, 50, 2056});  // more columns than a block has at once
  cases.push_back({40, 16, 2, 72});     // ids of more rows than are under way at once
  cases.push_back({40, 16, 2, 71});     // the same where rows are no vectors
  for (const EmbeddingCase& c : cases) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      SCOPED_TRACE(testing::Message() << c.T() << " tokens, " << c.V << " ids of " << c.D);
      EmbeddingTensors t(c, InputFamily::normals, dtype);
      expect_cuda_agrees(embedding, EmbeddingArgs{.w_VD = t.w.in<Real>(),
                                                  .token_T = t.token.in<int32_t>(),
                                                  .x_TD = t.x.out<Real>()});
      t.d_w.fill(0.75);
      expect_cuda_agrees(embedding_wgrad, t.accumulate_args());
      EmbeddingWgradArgs store = t.accumulate_args();
      store.target.mode = GradMode::store;
      expect_cuda_agrees(embedding_wgrad, store);
      for (int64_t i = 0; i < 3 * c.V; ++i) t.present.set(i, i % 3 == 0 ? 1 : 0);
      const int blocks = static_cast<int>(c.blocks), split = blocks > 1 ? 1 : 0;
      expect_cuda_agrees(embedding_wgrad, t.fold_args({{64, 64 + blocks, 1, 0}}, 64));
      expect_cuda_agrees(embedding_wgrad, t.fold_args({{64, 64 + blocks, 2, 2, 2, 0}}, 64));
      if (split == 0) continue;
      const int middle = static_cast<int>(canonical_split(blocks));
      expect_cuda_agrees(embedding_wgrad,
                         t.fold_args({{0, middle, 0, 0}, {middle, blocks, 1, 1, 0}}));
    }
  }
}

}  // namespace
}  // namespace cambium::test
