// leaf_fold against its oracle: the tree's bits in fp32, nodes and folds, and that any cut of the
// leaves into nodes ends in the same bits (D3).
#include "tests/ops/cuda_test.h"
#include "tests/ops/leaf_fold_cases.h"

namespace cambium::test {
namespace {

struct LeafFoldTensors {
  LeafFoldTensors(const LeafFoldCase& shape, InputFamily family, int64_t slots = 4)
      : c(shape),
        leaf(Shape(c.blocks * c.rows_per_block, c.N)),
        d_w(Shape(slots, c.N), DType::f32, c.N + 8),
        present(Shape(slots), DType::u8) {
    TestRandom random(static_cast<uint64_t>(c.blocks * 1000 + c.N));
    leaf.fill_family(random, family);
    present.fill(0);
  }
  std::vector<float> slot(int64_t index) const {
    std::vector<float> values;
    for (int64_t i = 0; i < c.N; ++i) values.push_back(static_cast<float>(d_w.at(index * c.N + i)));
    return values;
  }
  LeafFoldArgs accumulate_args() {
    LeafFoldArgs args{.leaf_BN = leaf.in<float>(), .d_w_SN = d_w.inout<float>()};
    args.rows_per_block = c.rows_per_block;
    return args;
  }
  void accumulate(int threads = 2) { run_op(leaf_fold, accumulate_args(), threads); }
  // `nodes` holds first, end, destination, fold count and folds, a row per node, for leaves that
  // begin at canonical block `first_block`.
  LeafFoldArgs fold_args(const std::vector<std::vector<int>>& nodes, int64_t first_block = 0) {
    table = TestTensor(Shape(static_cast<int64_t>(nodes.size()), kNodeColumns), DType::i32);
    for (size_t node = 0; node < nodes.size(); ++node) {
      for (size_t column = 0; column < nodes[node].size(); ++column) {
        table.set(static_cast<int64_t>(node) * kNodeColumns + column, nodes[node][column]);
      }
    }
    LeafFoldArgs args{.leaf_BN = leaf.in<float>(),
                      .d_w_SN = d_w.inout<float>(),
                      .present_S = present.inout<uint8_t>()};
    args.target = {GradMode::nodes, table.in<int32_t>(), first_block + c.blocks};
    args.first_block = first_block;
    args.rows_per_block = c.rows_per_block;
    return args;
  }
  void fold(const std::vector<std::vector<int>>& nodes, int64_t first_block = 0, int threads = 2) {
    run_op(leaf_fold, fold_args(nodes, first_block), threads);
  }
  LeafFoldCase c;
  TestTensor leaf, d_w, present;
  TestTensor table{Shape(1, kNodeColumns), DType::i32};
};

TEST(LeafFold, AccumulateAddsTheTreeSumToSlotZero) {
  for (const InputFamily family : {InputFamily::integers, InputFamily::normals}) {
    for (const LeafFoldCase& c : kLeafFoldCases) {
      LeafFoldTensors t(c, family);
      t.d_w.fill(3.0);
      t.accumulate();
      const auto tree = leaf_tree_oracle<float>(t.leaf.values(), c, 0, c.blocks);
      for (int64_t i = 0; i < c.N; ++i) ASSERT_EQ(t.d_w.at(i), 3.0f + tree[i]);
      for (int64_t i = c.N; i < 2 * c.N; ++i) ASSERT_EQ(t.d_w.at(i), 3.0);
      EXPECT_TRUE(t.d_w.guards_intact());
      const auto wide = leaf_tree_oracle<double>(t.leaf.values(), c, 0, c.blocks);
      std::vector<double> sum(wide.begin(), wide.end()), actual;
      for (int64_t i = 0; i < c.N; ++i) actual.push_back(tree[i]);
      EXPECT_LE(compare(actual, sum).relative_l2, tolerance(2, c.blocks * c.rows_per_block));
    }
  }
}

TEST(LeafFold, StoresWhatItWouldAddToZeros) {
  std::vector<LeafFoldCase> cases = kLeafFoldCases;
  cases.push_back({0, 5, 1});
  for (const LeafFoldCase& c : cases) {
    LeafFoldTensors added(c, InputFamily::normals), stored(c, InputFamily::normals);
    for (int64_t i = 0; i < c.N; ++i) added.d_w.set(i, 0);
    added.accumulate();
    LeafFoldArgs args = stored.accumulate_args();
    args.target.mode = GradMode::store;
    run_op(leaf_fold, args);
    EXPECT_TRUE(bits_equal(stored.d_w, added.d_w));  // the other slots' poison too
  }
}

TEST(LeafFold, ANodeHoldsTheTreeSumOfItsBlocks) {
  for (const LeafFoldCase& c : kLeafFoldCases) {
    LeafFoldTensors t(c, InputFamily::normals);
    t.fold({{64, static_cast<int>(64 + c.blocks), 2, 0}}, 64);
    EXPECT_EQ(t.slot(2), leaf_tree_oracle<float>(t.leaf.values(), c, 0, c.blocks));
    EXPECT_EQ(t.present.values(), (std::vector<double>{0, 0, 1, 0}));
    EXPECT_TRUE(t.d_w.guards_intact());
  }
}

TEST(LeafFold, AnyCutIntoNodesEndsInTheSameBits) {
  const LeafFoldCase c{13, 70, 1};
  LeafFoldTensors whole(c, InputFamily::normals);
  whole.fold({{0, 13, 0, 0}});
  // 13 = 8 + (4 + 1): left siblings folded where the right one is finished, slots reused.
  LeafFoldTensors cut(c, InputFamily::normals);
  cut.fold({{0, 8, 0, 0}, {8, 12, 1, 0}, {12, 13, 1, 2, 1, 0}});
  EXPECT_EQ(cut.slot(1), whole.slot(0));
  LeafFoldTensors fine(c, InputFamily::normals);
  fine.fold({{0, 4, 0, 0},
             {4, 6, 1, 0},
             {6, 8, 3, 2, 1, 0},
             {8, 10, 1, 0},
             {10, 12, 1, 1, 1},
             {12, 13, 2, 2, 1, 3}});
  EXPECT_EQ(fine.slot(2), whole.slot(0));
}

TEST(LeafFold, AbsentLeftSlotsAreSkipped) {
  const LeafFoldCase c{4, 20, 1};
  LeafFoldTensors t(c, InputFamily::normals);
  t.fold({{0, 4, 1, 1, 3}});  // slot 3 is absent and holds NaN
  EXPECT_EQ(t.slot(1), leaf_tree_oracle<float>(t.leaf.values(), c, 0, 4));
}

TEST(LeafFold, ThreadsDoNotChangeBits) {
  expect_thread_independent([](int threads) {
    LeafFoldTensors t({32, 3000, 1}, InputFamily::normals);
    t.fold({{0, 16, 0, 0}, {16, 32, 0, 1, 0}}, 0, threads);
    return t.d_w.bits();
  });
}

TEST(LeafFold, MustFailForASequentialSumAndABadNode) {
  const LeafFoldCase c{32, 200, 1};
  LeafFoldTensors t(c, InputFamily::normals);
  t.fold({{0, 32, 0, 0}});
  std::vector<float> sequential(200, 0.0f);
  for (int64_t b = 0; b < 32; ++b) {
    for (int64_t i = 0; i < 200; ++i) sequential[i] += static_cast<float>(t.leaf.at(b * 200 + i));
  }
  EXPECT_NE(t.slot(0), sequential);
  EXPECT_THROW(t.fold({{0, 33, 0, 0}}), Error);
  EXPECT_THROW(t.fold({{0, 32, 0, 1, 9}}), Error);
}

TEST(LeafFold, CudaGivesTheReferencesBits) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  std::vector<LeafFoldCase> cases = kLeafFoldCases;
  cases.push_back({512, 300, 1});
  cases.push_back({777, 1, 8});
  for (const LeafFoldCase& c : cases) {
    SCOPED_TRACE(testing::Message() << c.blocks << " leaves of " << c.N);
    LeafFoldTensors t(c, InputFamily::normals);
    t.d_w.fill(3.0);
    expect_cuda_agrees(leaf_fold, t.accumulate_args());
    LeafFoldArgs store = t.accumulate_args();
    store.target.mode = GradMode::store;
    expect_cuda_agrees(leaf_fold, store);
    t.present.set(3, 1);
    const int blocks = static_cast<int>(c.blocks);
    expect_cuda_agrees(leaf_fold, t.fold_args({{1024, 1024 + blocks, 2, 2, 3, 1}}, 1024));
    if (blocks == 1) continue;
    const int middle = static_cast<int>(canonical_split(blocks));
    expect_cuda_agrees(leaf_fold, t.fold_args({{0, middle, 0, 0}, {middle, blocks, 1, 2, 0, 3}}));
  }
}

}  // namespace
}  // namespace cambium::test
