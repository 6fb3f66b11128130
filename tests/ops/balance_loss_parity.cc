// Parity of the load-balance loss: three sources of counts, D1, D2 by sequence, finite differences.
#include "tests/ops/balance_loss_cases.h"
#include "tests/ops/cuda_test.h"

namespace cambium::test {
namespace {

constexpr CountSource kSources[] = {CountSource::own_sequence, CountSource::micro_batch,
                                    CountSource::given};

TEST(BalanceLoss, AgreesWithOracle) {
  for (const BalanceLossCase& c : kBalanceLossCases) {
    for (const CountSource source : kSources) {
      BalanceLossTensors t(c, source, 3);
      run_op(balance_loss, t.args);
      const auto expected =
          balance_loss_oracle(t.probs_TE.values(), t.index_TK, t.given_E.values(), t.args);
      // Positive terms summed over S positions.
      EXPECT_TRUE(within(t.loss_leaf_B, expected.loss_leaf_B, tolerance(1, c.sequence_length + 8)))
          << c.routing.T << " tokens, source " << static_cast<int>(source);
      EXPECT_TRUE(within(t.d_probs_TE, expected.d_probs_TE, tolerance(4, 1)));
    }
  }
}

// Uniform probabilities and choices give loss_scale times 1, the minimum, exactly.
TEST(BalanceLoss, PerfectBalanceIsOne) {
  BalanceLossTensors t({{32, 8, 2, Spread::random}, 32, 8}, CountSource::own_sequence, 4);
  t.probs_TE.fill(0.125);
  for (int64_t i = 0; i < 64; ++i) t.index_TK.set(i, static_cast<double>(i % 8));
  run_op(balance_loss, t.args);
  EXPECT_TRUE(bits_equal(t.loss_leaf_B, std::vector<double>(4, 0.1875)));
}

TEST(BalanceLoss, BitsDependOnTheSequenceAlone) {
  const BalanceLossCase all{{40 * 16, 8, 2, Spread::random}, 16, 8};
  BalanceLossTensors whole(all, CountSource::own_sequence, 5);
  expect_rows_independent(40, [&](const std::vector<int64_t>& sequences) {
    BalanceLossCase c = all;
    c.routing.T = std::ssize(sequences) * 16;
    BalanceLossTensors t(c, CountSource::own_sequence, 6);
    for (int64_t i = 0; i < c.routing.T; ++i) {
      const int64_t from = sequences[i / 16] * 16 + i % 16;
      for (int64_t e = 0; e < 8; ++e) t.probs_TE.set(i * 8 + e, whole.probs_TE.at(from * 8 + e));
      for (int64_t k = 0; k < 2; ++k) t.index_TK.set(i * 2 + k, whole.index_TK.at(from * 2 + k));
    }
    run_op(balance_loss, t.args);
    std::vector<std::vector<std::byte>> bits;
    const std::vector<std::byte> loss = t.loss_leaf_B.bits(), gradient = t.d_probs_TE.bits();
    for (int64_t s = 0; s < std::ssize(sequences); ++s) {
      bits.emplace_back(loss.begin() + s * 2 * 4, loss.begin() + (s + 1) * 2 * 4);
      bits.back().insert(bits.back().end(), gradient.begin() + s * 16 * 8 * 4,
                         gradient.begin() + (s + 1) * 16 * 8 * 4);
    }
    return bits;
  });
}

TEST(BalanceLoss, DoesNotDependOnThreads) {
  for (const CountSource source : kSources) {
    BalanceLossTensors t({{1024, 64, 6, Spread::random}, 64, 32}, source, 7);
    expect_thread_independent([&](int threads) {
      run_op(balance_loss, t.args, threads);
      std::vector<std::byte> bits = t.loss_leaf_B.bits();
      const std::vector<std::byte> gradient = t.d_probs_TE.bits();
      bits.insert(bits.end(), gradient.begin(), gradient.end());
      return bits;
    });
  }
}

TEST(BalanceLoss, GradientAgreesWithFiniteDifferences) {
  for (const CountSource source : kSources) {
    BalanceLossTensors t({{24, 5, 2, Spread::random}, 8, 4}, source, 8);
    t.args.gradient_scale = t.args.loss_scale;
    run_op(balance_loss, t.args);
    auto loss = [&](const std::vector<double>& probs_TE) {
      const auto leaves =
          balance_loss_oracle(probs_TE, t.index_TK, t.given_E.values(), t.args).loss_leaf_B;
      return std::accumulate(leaves.begin(), leaves.end(), 0.0);
    };
    TestRandom random(9);
    EXPECT_LT(finite_difference_error(loss, t.probs_TE.values(), t.d_probs_TE.values(), random),
              1e-5);
  }
}

TEST(BalanceLoss, MustFailCountsOfTheWholeBatchAreNotTheSequences) {
  const BalanceLossCase c{{64, 8, 2, Spread::random}, 32, 32};
  BalanceLossTensors t(c, CountSource::own_sequence, 10);
  const auto expected =
      balance_loss_oracle(t.probs_TE.values(), t.index_TK, t.given_E.values(), t.args);
  t.args.source = CountSource::micro_batch;
  run_op(balance_loss, t.args);
  EXPECT_FALSE(within(t.loss_leaf_B, expected.loss_leaf_B, tolerance(1, 40)));
  t.args.source = CountSource::given;  // without fractions
  EXPECT_THROW(run_op(balance_loss, t.args), Error);
}

TEST(BalanceLoss, CudaAgreesWithTheReference) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  std::vector<BalanceLossCase> cases = kBalanceLossCases;
  cases.push_back({{1000, 128, 8, Spread::random}, 500, 100});
  cases.push_back({{2600, 300, 5, Spread::random}, 1300, 52});  // parts of sequences, tails
  for (const BalanceLossCase& c : cases) {
    for (const CountSource source : kSources) {
      BalanceLossTensors t(c, source, 3);
      expect_cuda_agrees(balance_loss, t.args, tolerance(1, c.sequence_length + 8));
    }
  }
}

// With its own counts a sequence's bits depend on the sequence alone: one call a sequence.
TEST(BalanceLoss, CudaBitsDependOnTheSequenceAlone) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  const int64_t S = 200;
  BalanceLossTensors t({{3 * S, 64, 6, Spread::random}, S, 100}, CountSource::own_sequence, 5);
  ArgsCopy<BalanceLossArgs> whole(t.args), parts(t.args);
  run_cuda_op(balance_loss, whole.args);
  for (int64_t sequence = 0; sequence < 3; ++sequence) {
    BalanceLossArgs part = parts.args;
    const auto cut = [&](RawView& view, int64_t rows) {
      view.data = static_cast<std::byte*>(view.data) + 4 * sequence * rows * view.row_stride;
      view.shape.extent[0] = rows;
    };
    cut(part.probs_TE, S), cut(part.expert_index_TK, S), cut(part.d_probs_TE, S);
    cut(part.loss_leaf_B, 2);
    run_cuda_op(balance_loss, part);
  }
  EXPECT_TRUE(tensor_of(parts.args.loss_leaf_B).same_bytes(tensor_of(whole.args.loss_leaf_B)));
  EXPECT_TRUE(tensor_of(parts.args.d_probs_TE).same_bytes(tensor_of(whole.args.d_probs_TE)));
}

}  // namespace
}  // namespace cambium::test
