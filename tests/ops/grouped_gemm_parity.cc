// Parity of the grouped GEMM: exact integers, normals, D1, D2, D3, and finite differences.
#include "tests/ops/grouped_gemm_cases.h"

#include "tests/ops/forest_test.h"

namespace cambium::test {
namespace {

// Chains of K roundings, through up to three products and SwiGLU.
constexpr double kChainFactor = 4;

enum class RowWeights { absent, given };

// Inputs and outputs of one expert layer. Expert strides are padded, as canonical tensors are.
struct ExpertLayer {
  static constexpr int64_t kPadding = 11;
  GroupedCase c;
  TestTensor offsets{offsets_tensor(c)};
  TestTensor x{Shape(c.R(), c.D)};
  TestTensor w_up{Shape(c.experts(), 2 * c.F, c.D), DType::f32, 2 * c.F* c.D + kPadding};
  TestTensor w_down{Shape(c.experts(), c.D, c.F), DType::f32, c.F* c.D + kPadding};
  TestTensor weight{Shape(c.R())};
  TestTensor d_y{Shape(c.R(), c.D)};
  TestTensor gate_up{Shape(c.R(), 2 * c.F)};
  TestTensor h{Shape(c.R(), c.F), DType::f32, c.F + 2};
  TestTensor y{Shape(c.R(), c.D), DType::f32, c.D + 1};
  TestTensor d_gate_up{Shape(c.R(), 2 * c.F), DType::f32, 2 * c.F + 3};
  TestTensor d_weight{Shape(c.R())};
  TestTensor weighted_h{Shape(c.R(), c.F)};
  TestTensor d_x{Shape(c.R(), c.D), DType::f32, c.D + 5};

  ExpertLayer(const GroupedCase& grouped_case, uint64_t seed) : c(grouped_case) {
    TestRandom random(seed);
    x.fill_normal(random);
    w_up.fill_normal(random, 1 / std::sqrt(static_cast<double>(c.D)));
    w_down.fill_normal(random, 1 / std::sqrt(static_cast<double>(c.F)));
    weight.fill_normal(random);
    d_y.fill_normal(random);
  }
  void run(RowWeights weights, int threads = 2) {
    const bool given = weights == RowWeights::given;
    const In<float> row_weight = given ? weight.in<float>() : In<float>{};
    const auto offset = offsets.in<int32_t>();
    run_op(grouped_up,
           GroupedUpArgs{x.in<Real>(), w_up.in<Real>(), offset, gate_up.out<Real>(), h.out<Real>()},
           threads);
    run_op(grouped_down,
           GroupedDownArgs{h.in<Real>(), w_down.in<Real>(), offset, row_weight, y.out<Real>()},
           threads);
    run_op(
        grouped_down_dgrad,
        GroupedDownDgradArgs{d_y.in<Real>(), w_down.in<Real>(), gate_up.in<Real>(), offset,
                             row_weight, d_gate_up.out<Real>(),
                             given ? d_weight.out<float>() : Out<float>{}, weighted_h.out<Real>()},
        threads);
    run_op(grouped_up_dgrad,
           GroupedUpDgradArgs{d_gate_up.in<Real>(), w_up.in<Real>(), offset, d_x.out<Real>()},
           threads);
  }
  ExpertLayerInputs inputs(RowWeights weights) const {
    return {x.values(), w_up.values(), w_down.values(),
            weights == RowWeights::given ? weight.values() : std::vector<double>{}, d_y.values()};
  }
};

TEST(GroupedGemm, LayerAgreesWithOracle) {
  for (const GroupedCase& c : kGroupedCases) {
    for (const RowWeights weights : {RowWeights::absent, RowWeights::given}) {
      ExpertLayer layer(c, 3);
      layer.run(weights);
      const ExpertLayerOracle expected = expert_layer_oracle(c, layer.inputs(weights));
      const double bound = tolerance(kChainFactor, std::max(c.D, 2 * c.F));
      EXPECT_TRUE(within(layer.gate_up, expected.gate_up, bound));
      EXPECT_TRUE(within(layer.h, expected.h, bound));
      EXPECT_TRUE(within(layer.y, expected.y, bound));
      EXPECT_TRUE(within(layer.weighted_h, expected.weighted_h, bound));
      EXPECT_TRUE(within(layer.d_gate_up, expected.d_gate_up, bound));
      EXPECT_TRUE(within(layer.d_x, expected.d_x, bound));
      if (weights == RowWeights::given) {
        EXPECT_TRUE(within(layer.d_weight, expected.d_weight, bound));
      }
    }
  }
}

TEST(GroupedGemm, IntegersAreExact) {
  for (const GroupedCase& c : kGroupedCases) {
    ExpertLayer layer(c, 5);
    TestRandom random(7);
    for (TestTensor* tensor :
         {&layer.x, &layer.w_up, &layer.w_down, &layer.weight, &layer.h, &layer.d_gate_up}) {
      tensor->fill_integers(random, -4, 4);
    }
    const auto offset = layer.offsets.in<int32_t>();
    std::vector<double> y =
        grouped_forward_oracle(c, layer.h.values(), layer.w_down.values(), c.D, c.F);
    for (int64_t i = 0; i < c.R() * c.D; ++i) y[i] *= layer.weight.at(i / c.D);
    run_op(grouped_down, GroupedDownArgs{layer.h.in<Real>(), layer.w_down.in<Real>(), offset,
                                         layer.weight.in<float>(), layer.y.out<Real>()});
    EXPECT_TRUE(bits_equal(layer.y, y));
    run_op(grouped_up, GroupedUpArgs{layer.x.in<Real>(), layer.w_up.in<Real>(), offset,
                                     layer.gate_up.out<Real>(), layer.h.out<Real>()});
    EXPECT_TRUE(
        bits_equal(layer.gate_up,
                   grouped_forward_oracle(c, layer.x.values(), layer.w_up.values(), 2 * c.F, c.D)));
    run_op(grouped_up_dgrad, GroupedUpDgradArgs{layer.d_gate_up.in<Real>(), layer.w_up.in<Real>(),
                                                offset, layer.d_x.out<Real>()});
    EXPECT_TRUE(bits_equal(layer.d_x, grouped_dgrad_oracle(c, layer.d_gate_up.values(),
                                                           layer.w_up.values(), 2 * c.F, c.D)));
  }
}

TEST(GroupedGemm, EpilogueHasTheBitsOfTheSwigluOp) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const GroupedCase c{{9, 0, 23}, 40, 50};
    TestRandom random(11);
    TestTensor x(Shape(c.R(), c.D), dtype), w(Shape(c.experts(), 2 * c.F, c.D), dtype);
    TestTensor gate_up(Shape(c.R(), 2 * c.F), dtype), h(Shape(c.R(), c.F), dtype), again = h;
    TestTensor offsets = offsets_tensor(c);
    x.fill_normal(random);
    w.fill_normal(random, 0.2);
    run_op(grouped_up, GroupedUpArgs{x.in<Real>(), w.in<Real>(), offsets.in<int32_t>(),
                                     gate_up.out<Real>(), h.out<Real>()});
    run_op(swiglu, SwigluArgs{gate_up.in<Real>(), again.out<Real>()});
    EXPECT_TRUE(bits_equal(h, again));
  }
}

TEST(GroupedGemm, RowsDoNotDependOnTheBatch) {
  const GroupedCase whole{{61, 2, 40}, 130, 72};
  ExpertLayer reference_layer(whole, 13);
  expect_rows_independent(whole.R(), [&](const std::vector<int64_t>& rows) {
    // Rows of a batch are sorted by expert; `order` remembers where each one went.
    std::vector<size_t> order(rows.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      return whole.expert_of(rows[a]) < whole.expert_of(rows[b]);
    });
    GroupedCase part{{0, 0, 0}, whole.D, whole.F};
    for (const int64_t row : rows) ++part.rows[whole.expert_of(row)];
    ExpertLayer layer(part, 13);
    layer.w_up = reference_layer.w_up;
    layer.w_down = reference_layer.w_down;
    for (size_t i = 0; i < rows.size(); ++i) {
      const int64_t to = static_cast<int64_t>(i), from = rows[order[i]], D = whole.D;
      layer.weight.set(to, reference_layer.weight.at(from));
      for (int64_t d = 0; d < D; ++d) {
        layer.x.set(to * D + d, reference_layer.x.at(from * D + d));
        layer.d_y.set(to * D + d, reference_layer.d_y.at(from * D + d));
      }
    }
    layer.run(RowWeights::given);
    std::vector<std::vector<std::byte>> sorted, result(rows.size());
    for (const TestTensor* tensor : {&layer.gate_up, &layer.h, &layer.y, &layer.weighted_h,
                                     &layer.d_gate_up, &layer.d_weight, &layer.d_x}) {
      append_row_bits(*tensor, sorted);
    }
    for (size_t i = 0; i < rows.size(); ++i) result[order[i]] = sorted[i];
    return result;
  });
}

TEST(GroupedGemm, WgradAccumulates) {
  for (const GroupedCase& c : kGroupedCases) {
    for (const InputFamily family : {InputFamily::integers, InputFamily::normals}) {
      TestRandom random(17);
      const int64_t N = 2 * c.F, K = c.D, e = c.experts();
      TestTensor d_y = make_tensor(Shape(c.R(), N), random, family);
      TestTensor x = make_tensor(Shape(c.R(), K), random, family);
      TestTensor d_w(Shape(e, N * K), DType::f32, N * K + 13), offsets = offsets_tensor(c);
      d_w.fill_family(random, family);
      const std::vector<double> expected =
          add(grouped_wgrad_oracle(c, d_y.values(), x.values(), N, K), d_w.values());
      GroupedWgradArgs args;
      args.d_y_RN = d_y.in<Real>();
      args.x_RK = x.in<Real>();
      args.expert_offset_e1 = offsets.in<int32_t>();
      args.d_w_SeNK = InOut<float>(static_cast<float*>(d_w.data()), Shape(1, e, N, K));
      args.expert_stride = N * K + 13;
      run_op(grouped_wgrad, args);
      if (family == InputFamily::integers) {
        EXPECT_TRUE(bits_equal(d_w, expected));
      } else {
        EXPECT_TRUE(within(d_w, expected, tolerance(kChainFactor, c.R() + 1)));
      }
    }
  }
}

// Routed rows of a batch: row -> (expert, block), sorted by expert, then block.
struct RoutedRow {
  int64_t expert, block;
  uint64_t seed;  // its values
};

struct GroupedForest {
  int64_t total_blocks, e, N, K;
  std::vector<RoutedRow> rows;

  GroupedForest(int64_t blocks, int64_t rows_per_block, uint64_t seed)
      : total_blocks(blocks), e(4), N(19), K(21) {
    TestRandom random(seed);
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t i = 0; i < rows_per_block; ++i) {
        // Expert 3 never gets a row, expert 2 few, so that whole nodes are absent.
        const int64_t draw = random.integer(0, 9);
        rows.push_back({draw == 0 ? 2 : draw % 2, block, random.next()});
      }
    }
    std::stable_sort(rows.begin(), rows.end(), [](const RoutedRow& a, const RoutedRow& b) {
      return std::pair(a.expert, a.block) < std::pair(b.expert, b.block);
    });
  }
  float d_y(const RoutedRow& row, int64_t n) const {
    return static_cast<float>(TestRandom(row.seed + n).normal());
  }
  float x(const RoutedRow& row, int64_t k) const {
    return static_cast<float>(TestRandom(row.seed + 1000 + k).normal());
  }
  // The expert's total by the definition; empty when it has no rows.
  std::vector<float> oracle(int64_t expert) const {
    return tree_sum_oracle(0, total_blocks, [&](int64_t block) {
      std::vector<float> value;
      for (const RoutedRow& row : rows) {
        if (row.expert != expert || row.block != block) continue;
        value.resize(static_cast<size_t>(N * K), 0.0f);
        for (int64_t i = 0; i < N * K; ++i) {
          value[i] = __builtin_fmaf(d_y(row, i / K), x(row, i % K), value[i]);
        }
      }
      return value;
    });
  }
  void call(TestTensor& table, std::pair<int64_t, int64_t> range, TestTensor& slots,
            TestTensor& present, int threads) const {
    GroupedCase part{std::vector<int64_t>(static_cast<size_t>(e)), K, N};
    std::vector<RoutedRow> mine;
    for (const RoutedRow& row : rows) {
      if (row.block < range.first || row.block >= range.second) continue;
      mine.push_back(row);
      ++part.rows[row.expert];
    }
    const auto R = static_cast<int64_t>(mine.size());
    TestTensor d_y_RN(Shape(R, N)), x_RK(Shape(R, K)), row_block(Shape(R), DType::i32);
    for (int64_t r = 0; r < R; ++r) {
      row_block.set(r, static_cast<double>(mine[r].block));
      for (int64_t n = 0; n < N; ++n) d_y_RN.set(r * N + n, d_y(mine[r], n));
      for (int64_t k = 0; k < K; ++k) x_RK.set(r * K + k, x(mine[r], k));
    }
    TestTensor offsets = offsets_tensor(part);
    GroupedWgradArgs args;
    args.d_y_RN = d_y_RN.in<Real>();
    args.x_RK = x_RK.in<Real>();
    args.expert_offset_e1 = offsets.in<int32_t>();
    args.row_block_R = row_block.in<int32_t>();
    args.expert_stride = slots.shape()[1] / e;
    args.d_w_SeNK = InOut<float>(static_cast<float*>(slots.data()),
                                 Shape(slots.shape()[0], e, N, K), slots.shape()[1]);
    args.present_Se = present.inout<uint8_t>();
    args.target = {GradMode::nodes, table.in<int32_t>(), total_blocks};
    run_op(grouped_wgrad, args, threads);
  }
  // Every expert's total after calls over `ranges`, in order; empty when absent.
  std::vector<std::vector<float>> run(const std::vector<std::pair<int64_t, int64_t>>& ranges,
                                      int threads) const {
    const int64_t S = 2 * total_blocks, stride = N * K + 7;
    TestTensor slots(Shape(S, e * stride)), present(Shape(S, e), DType::u8);
    Forest forest(total_blocks, S);
    for (const auto& range : ranges) {
      TestTensor table = forest.plan_call(range.first, range.second);
      call(table, range, slots, present, threads);
    }
    for (const Forest::Merge& merge : forest.remaining_merges()) {
      GradMergeArgs args;
      args.slots_SGN =
          InOut<float>(static_cast<float*>(slots.data()), Shape(S, e, N * K), e * stride);
      args.present_SG = present.inout<uint8_t>();
      args.group_stride = stride;
      args.left_slot = merge.left;
      args.right_slot = merge.right;
      args.destination_slot = merge.destination;
      run_op(grad_merge, args, threads);
    }
    std::vector<std::vector<float>> totals(static_cast<size_t>(e));
    for (int64_t x = 0; x < e; ++x) {
      if (present.at(forest.root_slot() * e + x) == 0) continue;
      const float* data = static_cast<const float*>(slots.data()) + forest.root_slot() * e * stride;
      totals[x].assign(data + x * stride, data + x * stride + N * K);
    }
    return totals;
  }
};

TEST(GroupedGemm, NodesAreIndependentOfTheSplitIntoCalls) {
  for (const int64_t total_blocks : {1, 3, 8, 13, 32}) {
    for (const int64_t rows_per_block : {1, 3, 20}) {
      const GroupedForest forest(total_blocks, rows_per_block, 100 + total_blocks);
      std::vector<std::vector<float>> expected;
      for (int64_t x = 0; x < forest.e; ++x) expected.push_back(forest.oracle(x));
      EXPECT_TRUE(expected[3].empty());
      for (const int64_t width : {int64_t{1}, int64_t{3}, int64_t{4}, total_blocks}) {
        for (const auto order :
             {CallOrder::ascending, CallOrder::descending, CallOrder::odd_first}) {
          EXPECT_EQ(forest.run(call_ranges(total_blocks, width, order), 2), expected)
              << total_blocks << " blocks in calls of " << width;
        }
      }
    }
  }
}

TEST(GroupedGemm, AbsentDestinationIsUntouched) {
  // No rows at all and absent left siblings: presence becomes 0, the poison stays.
  const GroupedForest forest(2, 0, 1);
  TestTensor slots(Shape(2, forest.e * forest.N * forest.K)),
      present(Shape(2, forest.e), DType::u8);
  present.fill(1);
  Forest plan(2, 2);
  TestTensor table = plan.plan_call(0, 1);
  const TestTensor before = slots;
  forest.call(table, {0, 1}, slots, present, 1);
  EXPECT_TRUE(bits_equal(slots, before));
  for (int64_t x = 0; x < forest.e; ++x) EXPECT_EQ(present.at(x), 0);
  for (int64_t x = 0; x < forest.e; ++x) EXPECT_EQ(present.at(forest.e + x), 1);
}

TEST(GroupedGemm, ThreadsDoNotChangeBits) {
  expect_thread_independent([](int threads) {
    ExpertLayer layer({{90, 0, 150, 3}, 96, 80}, 19);
    layer.run(RowWeights::given, threads);
    std::vector<std::byte> bits;
    for (const TestTensor* tensor : {&layer.gate_up, &layer.h, &layer.y, &layer.weighted_h,
                                     &layer.d_gate_up, &layer.d_weight, &layer.d_x}) {
      const std::vector<std::byte> more = tensor->bits();
      bits.insert(bits.end(), more.begin(), more.end());
    }
    const GroupedForest forest(8, 20, 21);
    for (const auto& total : forest.run(call_ranges(8, 3, CallOrder::ascending), threads)) {
      const auto more = std::as_bytes(std::span(total));
      bits.insert(bits.end(), more.begin(), more.end());
    }
    return bits;
  });
}

TEST(GroupedGemm, GradientsAgreeWithFiniteDifferences) {
  const GroupedCase c{{4, 0, 3}, 6, 5};
  ExpertLayer layer(c, 23);
  layer.run(RowWeights::given);
  const ExpertLayerInputs inputs = layer.inputs(RowWeights::given);
  TestRandom random(29);
  auto loss_of = [&](std::vector<double> ExpertLayerInputs::*field) {
    return [&, field](const std::vector<double>& values) {
      ExpertLayerInputs changed = inputs;
      changed.*field = values;
      const std::vector<double> y = expert_layer_oracle(c, changed).y;
      return std::inner_product(y.begin(), y.end(), inputs.d_y.begin(), 0.0);
    };
  };
  EXPECT_LT(
      finite_difference_error(loss_of(&ExpertLayerInputs::x), inputs.x, layer.d_x.values(), random),
      1e-5);
  EXPECT_LT(finite_difference_error(loss_of(&ExpertLayerInputs::weight), inputs.weight,
                                    layer.d_weight.values(), random),
            1e-5);
  // Weight gradients from what the layer's backward hands on.
  auto wgrad = [&](TestTensor& d_y, TestTensor& x) {
    const int64_t N = d_y.shape()[1], K = x.shape()[1], e = c.experts();
    TestTensor d_w(Shape(1, e, N, K));
    d_w.fill(0);
    GroupedWgradArgs args;
    args.d_y_RN = d_y.in<Real>();
    args.x_RK = x.in<Real>();
    args.expert_offset_e1 = layer.offsets.in<int32_t>();
    args.d_w_SeNK = d_w.inout<float>();
    args.expert_stride = N * K;
    run_op(grouped_wgrad, args);
    return d_w.values();
  };
  EXPECT_LT(finite_difference_error(loss_of(&ExpertLayerInputs::w_up), inputs.w_up,
                                    wgrad(layer.d_gate_up, layer.x), random),
            1e-5);
  EXPECT_LT(finite_difference_error(loss_of(&ExpertLayerInputs::w_down), inputs.w_down,
                                    wgrad(layer.d_y, layer.weighted_h), random),
            1e-5);
}

TEST(GroupedGemm, MustFailWrongExpertIsDetected) {
  const GroupedCase c{{20, 12}, 64, 48};
  ExpertLayer layer(c, 31);
  const ExpertLayerOracle expected = expert_layer_oracle(c, layer.inputs(RowWeights::given));
  const double bound = tolerance(kChainFactor, 96);
  layer.run(RowWeights::given);
  ASSERT_TRUE(within(layer.y, expected.y, bound));
  layer.offsets.set(1, 19);  // one row goes to its neighbour's expert
  layer.run(RowWeights::given);
  EXPECT_FALSE(within(layer.y, expected.y, bound));
  EXPECT_FALSE(within(layer.d_x, expected.d_x, bound));
}

// A contribution of a block added as zero instead of skipped changes bits only by a sign of zero,
// but the wrong tree changes values: left to right is not the canonical order.
TEST(GroupedGemm, MustFailWrongTreeIsDetected) {
  const GroupedForest forest(13, 20, 37);
  const std::vector<float> expected = forest.oracle(0);
  std::vector<float> left_to_right;
  for (int64_t block = 0; block < 13; ++block) {
    GroupedForest one = forest;
    std::erase_if(one.rows, [&](const RoutedRow& row) { return row.block != block; });
    const std::vector<float> value = one.oracle(0);
    left_to_right.resize(expected.size(), 0.0f);
    for (size_t i = 0; i < value.size(); ++i) left_to_right[i] += value[i];
  }
  EXPECT_NE(left_to_right, expected);
}

}  // namespace
}  // namespace cambium::test
