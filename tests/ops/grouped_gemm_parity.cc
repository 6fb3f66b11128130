// Parity of the grouped GEMM: exact integers, normals, D1, D2, D3, and finite differences.
#include "tests/ops/grouped_gemm_layer.h"

namespace cambium::test {
namespace {

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
  const ExpertLayer whole({{61, 2, 40}, 130, 72}, 13);
  expect_rows_independent(whole.c.R(), [&](const std::vector<int64_t>& rows) {
    return bits_of_batch(whole, rows, Device::cpu);
  });
}

// Reading rows through token indices gives the bits of rows that were permuted before.
TEST(GroupedGemm, GatheredRowsHaveTheBitsOfPermutedRows) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    ExpertLayer gathered({{9, 0, 23}, 40, 50}, 14,
                         {dtype, RowStrides::padded, RowSource::gathered});
    ExpertLayer permuted({{9, 0, 23}, 40, 50}, 14, {dtype});
    for (const auto& [from, to] :
         {std::pair(&gathered.x, &permuted.x), {&gathered.d_y, &permuted.d_y}}) {
      to->assign(picked_rows(*from, gathered.token));
    }
    permuted.w_up = gathered.w_up;
    permuted.w_down = gathered.w_down;
    permuted.weight = gathered.weight;
    gathered.run(RowWeights::given);
    permuted.run(RowWeights::given);
    for (size_t i = 0; i < gathered.results().size(); ++i) {
      EXPECT_TRUE(bits_equal(*gathered.results()[i], *permuted.results()[i])) << i;
    }
    for (const WgradOf which : {WgradOf::up, WgradOf::down}) {
      EXPECT_TRUE(bits_equal(wgrad_of(gathered, which, Device::cpu),
                             wgrad_of(permuted, which, Device::cpu)));
    }
  }
}

// A step's first contribution: whatever was there, experts without rows end with zeros.
TEST(GroupedGemm, WgradStoresWhatItWouldAddToZeros) {
  for (const GroupedCase& c : kGroupedCases) {
    ExpertLayer layer(c, 19);
    layer.run(RowWeights::given);
    for (const WgradOf which : {WgradOf::up, WgradOf::down}) {
      EXPECT_TRUE(bits_equal(wgrad_of(layer, which, Device::cpu, 0, GradMode::store),
                             wgrad_of(layer, which, Device::cpu)));
    }
  }
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
    for (const TestTensor* tensor : layer.results()) {
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
  EXPECT_LT(finite_difference_error(loss_of(&ExpertLayerInputs::w_up), inputs.w_up,
                                    wgrad_of(layer, WgradOf::up, Device::cpu).values(), random),
            1e-5);
  EXPECT_LT(finite_difference_error(loss_of(&ExpertLayerInputs::w_down), inputs.w_down,
                                    wgrad_of(layer, WgradOf::down, Device::cpu).values(), random),
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
