// attention where ranks share sequences (zigzag): partials to the bits of one rank, sums against
// the oracle, and the GPU's rows and sums.
#include <deque>
#include <numeric>

#include "tests/ops/attention_tensors.h"

namespace cambium::test {
namespace {

// Rows of `whole` that rank `share.index` holds, in its order.
TestTensor share_rows(const TestTensor& whole, const ContextShare& share, int64_t S) {
  const int64_t width = whole.shape().row_elements(), local_S = S / share.ranks;
  Shape shape = whole.shape();
  shape.extent[0] /= share.ranks;
  TestTensor part(shape, whole.dtype());
  for (int64_t t = 0; t < shape[0]; ++t) {
    const int64_t from = t / local_S * S + share.position(t % local_S, S);
    for (int64_t i = 0; i < width; ++i) part.set(t * width + i, whole.at(from * width + i));
  }
  return part;
}

enum class Backend { reference, cuda };
template <class Op, class Args>
void run_on(Backend backend, Op op, const Args& args) {
  backend == Backend::cuda ? run_cuda_op(op, args) : run_op(op, args);
}

// One rank's part of `of`: its queries against whole keys.
struct ShareTensors {
  ShareTensors(AttentionTensors& of, const ContextShare& share)
      : whole(of),
        share(share),
        q(share_rows(of.q, share, of.c.S)),
        document_start(share_rows(of.document_start, share, of.c.S)),
        o(q.shape(), q.dtype()),
        lse(Shape(q.shape()[0], of.c.H)),
        d_o(share_rows(of.d_o, share, of.c.S)),
        d_q(q.shape(), q.dtype(), (of.c.H + 2) * of.c.Q),
        delta(lse.shape()),
        d_k(Shape(of.c.T(), of.c.G * of.c.Q), DType::f32, 2 * of.c.G * of.c.Q),
        d_v(d_k.shape()) {}
  AttentionArgs forward_args() {
    AttentionArgs args = whole.forward_args();
    args.q_THQ = q.in<Real>();
    args.o_THQ = o.out<Real>();
    args.lse_TH = lse.out<float>();
    args.share = share;
    if (!args.document_start_T.empty()) args.document_start_T = document_start.in<int32_t>();
    return args;
  }
  // With sums.
  AttentionBackwardArgs backward_args() {
    AttentionBackwardArgs args = whole.backward_args();
    args.q_THQ = q.in<Real>();
    args.o_THQ = o.in<Real>();
    args.d_o_THQ = d_o.in<Real>();
    args.lse_TH = lse.in<float>();
    args.d_q_THQ = d_q.out<Real>();
    args.delta_TH = delta.out<float>();
    args.share = share;
    if (!args.document_start_T.empty()) args.document_start_T = document_start.in<int32_t>();
    args.d_k_TGQ = args.d_v_TGQ = {};
    args.d_k_sum_SC = d_k.out<float>();
    args.d_v_sum_SC = d_v.out<float>();
    return args;
  }
  AttentionBackwardArgs partial_args(TestTensor& k_partial, TestTensor& v_partial) {
    AttentionBackwardArgs args = backward_args();
    args.d_k_sum_SC = args.d_v_sum_SC = {};
    args.d_k_partial_MC = k_partial.out<float>();
    args.d_v_partial_MC = v_partial.out<float>();
    return args;
  }
  // Of this rank's rows.
  TestTensor part(const TestTensor& of_whole) const {
    return share_rows(of_whole, share, whole.c.S);
  }
  AttentionTensors& whole;
  ContextShare share;
  TestTensor q, document_start, o, lse, d_o, d_q, delta, d_k, d_v;
};

// Each rank's partials sent and folded as the trainer does.
void expect_shares_equal_one_rank(const SharedCase& shared, DType dtype) {
  const AttentionCase& c = shared.whole;
  const int64_t ranks = shared.ranks;
  AttentionTensors whole(c, InputFamily::normals, dtype);
  whole.forward();
  whole.backward();
  const int64_t T = c.T() / ranks, C = c.G * c.Q;
  const int64_t rows = attention_partial_rows(T, c.S, c.block_tokens, {ranks, 0});
  std::vector<TestTensor> k_partials, v_partials;
  for (int64_t index = 0; index < ranks; ++index) {
    ShareTensors t(whole, {ranks, index});
    run_op(attention, t.forward_args());
    EXPECT_TRUE(bits_equal(t.o, t.part(whole.o)));
    EXPECT_TRUE(bits_equal(t.lse, t.part(whole.lse)));
    TestTensor& k_partial = k_partials.emplace_back(Shape(rows, C));
    TestTensor& v_partial = v_partials.emplace_back(Shape(rows, C));
    run_op(attention_backward, t.partial_args(k_partial, v_partial));
    EXPECT_TRUE(bits_equal(t.d_q, t.part(whole.d_q)));
  }
  for (int64_t index = 0; index < ranks; ++index) {
    const ContextShare share{ranks, index};
    const auto folded = [&](const std::vector<TestTensor>& partials) {
      TestTensor received(Shape(rows, C)), d_x(Shape(T, c.G, c.Q), dtype);
      const int64_t part = rows / ranks * C;
      for (int64_t from = 0; from < ranks; ++from) {
        for (int64_t i = 0; i < part; ++i) {
          received.set(from * part + i, partials[from].at(index * part + i));
        }
      }
      AttentionKeyFoldArgs fold{.partial_MC = received.in<float>(),
                                .d_x_TGQ = d_x.out<Real>(),
                                .sequence_length = c.S,
                                .block_tokens = c.block_tokens,
                                .share = share};
      if (c.documents != Documents::absent) {
        fold.document_start_S = whole.document_start.in<int32_t>();
      }
      run_op(attention_key_fold, fold);
      return d_x;
    };
    EXPECT_TRUE(bits_equal(folded(k_partials), share_rows(whole.d_k, share, c.S)));
    EXPECT_TRUE(bits_equal(folded(v_partials), share_rows(whole.d_v, share, c.S)));
  }
}

TEST(AttentionShares, SharesOfASequenceHaveTheBitsOfOneRank) {
  for (const SharedCase& c : kSharedCases) {
    for (const DType dtype : {DType::f32, DType::bf16}) expect_shares_equal_one_rank(c, dtype);
  }
}

// The rows of `part`'s rank in a tensor by owner of the keys, rounded to `dtype`.
TestTensor of_owner(const TestTensor& by_owner, const ContextShare& share, const Shape& shape,
                    DType dtype) {
  TestTensor part(shape, dtype);
  for (int64_t i = 0; i < part.elements(); ++i) {
    part.set(i, by_owner.at(share.index * part.elements() + i));
  }
  return part;
}

// The chunks of the queries in turn, from link `first` of 2 ranks on, as the trainer sends their
// sums up the ranks and down again.
template <class Run>
void run_chain(std::deque<ShareTensors>& shares, TestTensor& d_k, TestTensor& d_v, int64_t first,
               Run&& run) {
  const auto ranks = static_cast<int64_t>(shares.size());
  for (int64_t i = 0; i < d_k.elements(); ++i) d_k.set(i, 0.0), d_v.set(i, 0.0);
  for (ShareTensors& share : shares) run(attention, share.forward_args());
  for (int64_t link = first; link < 2 * ranks; ++link) {
    const bool is_near = link < ranks;
    AttentionBackwardArgs args =
        shares[static_cast<size_t>(is_near ? link : 2 * ranks - 1 - link)].backward_args();
    args.one_chain = true;
    args.queries = is_near ? QueryChunk::near : QueryChunk::far;
    args.d_k_sum_SC = args.d_v_sum_SC = {};
    args.d_k_chain_SC = d_k.inout<float>();
    args.d_v_chain_SC = d_v.inout<float>();
    run(attention_backward, args);
  }
}

std::deque<ShareTensors> all_shares(AttentionTensors& whole, int64_t ranks) {
  std::deque<ShareTensors> shares;
  for (int64_t index = 0; index < ranks; ++index) {
    shares.emplace_back(whole, ContextShare{ranks, index});
  }
  return shares;
}

// One rank's bits where no link is left out.
void expect_chain_has_bits_of_one_rank(const SharedCase& shared, DType dtype, Backend backend,
                                       int64_t first = 0) {
  const auto run = [&](auto op, const auto& args) { run_on(backend, op, args); };
  const AttentionCase& c = shared.whole;
  AttentionTensors whole(c, InputFamily::normals, dtype);
  AttentionBackwardArgs one_rank = whole.backward_args();
  one_rank.one_chain = true;
  run(attention, whole.forward_args());
  run(attention_backward, one_rank);
  TestTensor d_k(Shape(c.T(), c.G * c.Q), DType::f32, 2 * c.G * c.Q), d_v(d_k.shape());
  std::deque<ShareTensors> shares = all_shares(whole, shared.ranks);
  run_chain(shares, d_k, d_v, first, run);
  const bool is_whole = first == 0;
  for (const ShareTensors& t : shares) {
    const auto same = [&](const TestTensor& chain, const TestTensor& of_whole) {
      const TestTensor want = t.part(of_whole);
      return bits_equal(of_owner(chain, t.share, want.shape(), dtype), want);
    };
    EXPECT_EQ(same(d_v, whole.d_v), is_whole || t.share.index >= first);
    if (!is_whole) continue;
    EXPECT_TRUE(same(d_k, whole.d_k));
    EXPECT_TRUE(bits_equal(t.d_q, t.part(whole.d_q)));
  }
}

TEST(AttentionShares, AChainOverTheChunksHasTheBitsOfOneRank) {
  for (const SharedCase& c : kSharedCases) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      expect_chain_has_bits_of_one_rank(c, dtype, Backend::reference);
    }
  }
}

TEST(AttentionShares, MustFailWithoutAChainsFirstLink) {
  expect_chain_has_bits_of_one_rank(kSharedCases[1], DType::f32, Backend::reference, 1);
}

// The chunks' costs are those of the whole, which a link does not sum twice.
TEST(AttentionShares, LinksOfAChainCostWhatOneCallDoes) {
  AttentionTensors whole(kSharedCases[1].whole, InputFamily::normals);
  const int64_t ranks = kSharedCases[1].ranks;
  for (int64_t index = 0; index < ranks; ++index) {
    AttentionBackwardArgs args = ShareTensors(whole, {ranks, index}).backward_args();
    const Cost both = cost(args);
    args.queries = QueryChunk::near;
    const Cost near = cost(args);
    args.queries = QueryChunk::far;
    EXPECT_EQ(near.flops + cost(args).flops, both.flops);
    EXPECT_GT(cost(args).flops, near.flops);
  }
}

// The oracle's values for one rank, within `bound` as in the tests of whole sequences.
void expect_share_near_oracle(ShareTensors& t, double bound) {
  const AttentionTensors& whole = t.whole;
  const auto forward = attention_oracle(whole.c, whole.values(), whole.scale);
  const auto gradients =
      attention_backward_oracle(whole.c, whole.values(), whole.d_o.values(), whole.scale, t.share);
  const auto part = [&](const TestTensor& shape, const std::vector<double>& values) {
    TestTensor all(shape.shape());
    for (int64_t i = 0; i < all.elements(); ++i) all.set(i, values[static_cast<size_t>(i)]);
    return t.part(all).values();
  };
  const double sums = tolerance(2, whole.c.Q + 16);
  EXPECT_TRUE(within(t.o, part(whole.o, forward.o), bound));
  EXPECT_TRUE(within(t.lse, part(whole.lse, forward.lse), sums));
  EXPECT_TRUE(within(t.d_q, part(whole.d_q, gradients.d_q), 2 * bound));
  EXPECT_TRUE(within(t.d_k, gradients.d_k, 2 * bound));
  EXPECT_TRUE(within(t.d_v, gradients.d_v, 2 * bound));
}

TEST(AttentionShares, SharesSumTheKeyGradientsOfTheirQueries) {
  for (const SharedCase& c : kSharedCases) {
    AttentionTensors whole(c.whole, InputFamily::normals);
    for (int64_t index = 0; index < c.ranks; ++index) {
      ShareTensors t(whole, {c.ranks, index});
      run_op(attention, t.forward_args());
      run_op(attention_backward, t.backward_args());
      expect_share_near_oracle(t, tolerance(2, c.whole.Q + 16));
    }
  }
}

// A share's attention, one rank's part of the keys after the other, as a ring brings them.
void run_ring(ShareTensors& t, int64_t first_hop = 0, Backend backend = Backend::reference) {
  const int64_t T = t.q.shape()[0], ranks = t.share.ranks;
  TestTensor o_sum(t.q.shape()), d_q_sum(t.q.shape());
  const auto each_part = [&](auto&& run) {
    for (int64_t hop = first_hop; hop < ranks; ++hop) {
      const int64_t key_rank = (t.share.index - hop + ranks) % ranks;
      const ContextShare of_keys{ranks, key_rank};
      TestTensor k = share_rows(t.whole.k, of_keys, t.whole.c.S);
      TestTensor v = share_rows(t.whole.v, of_keys, t.whole.c.S);
      run(k, v, hop == first_hop ? KeyPart::first : KeyPart::next, key_rank);
    }
  };
  each_part([&](TestTensor& k, TestTensor& v, KeyPart part, int64_t key_rank) {
    AttentionArgs args = t.forward_args();
    args.k_TGQ = k.in<Real>();
    args.v_TGQ = v.in<Real>();
    args.o_THQ = {};
    args.lse_TH = {};
    args.part = part;
    args.key_rank = key_rank;
    args.o_sum_THQ = o_sum.inout<float>();
    args.lse_sum_TH = t.lse.inout<float>();
    run_on(backend, attention, args);
  });
  for (int64_t i = 0; i < t.o.elements(); ++i) t.o.set(i, o_sum.at(i));
  TestTensor d_k(Shape(T, t.whole.c.G * t.whole.c.Q)), d_v(d_k.shape());
  each_part([&](TestTensor& k, TestTensor& v, KeyPart part, int64_t key_rank) {
    AttentionBackwardArgs args = t.backward_args();
    args.k_TGQ = k.in<Real>();
    args.v_TGQ = v.in<Real>();
    args.d_q_THQ = {};
    args.part = part;
    args.key_rank = key_rank;
    args.d_q_sum_THQ = d_q_sum.inout<float>();
    args.d_k_sum_SC = d_k.out<float>();
    args.d_v_sum_SC = d_v.out<float>();
    run_on(backend, attention_backward, args);
    for (int64_t i = 0; i < d_k.elements(); ++i) {
      t.d_k.set(key_rank * d_k.elements() + i, d_k.at(i));
      t.d_v.set(key_rank * d_k.elements() + i, d_v.at(i));
    }
  });
  for (int64_t i = 0; i < t.d_q.elements(); ++i) t.d_q.set(i, d_q_sum.at(i));
}

TEST(AttentionShares, PartsOfTheKeysMeetByTheirLogSumExp) {
  for (const SharedCase& c : kSharedCases) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      AttentionTensors whole(c.whole, InputFamily::normals, dtype);
      for (int64_t index = 0; index < c.ranks; ++index) {
        ShareTensors t(whole, {c.ranks, index});
        run_ring(t);
        const int64_t terms = c.whole.Q + 16;
        expect_share_near_oracle(
            t, dtype == DType::f32 ? tolerance(2, terms) : bf16_tolerance(2, terms));
      }
    }
  }
}

// Gradients of whole sequences from those of the shares: d_q from each rank's rows; d_k and d_v, a
// row by the key's owner, summed over the ranks whose queries they are of.
AttentionGradients gathered_gradients(const std::deque<ShareTensors>& shares,
                                      const std::vector<const TestTensor*>& d_k,
                                      const std::vector<const TestTensor*>& d_v) {
  const AttentionCase& c = shares.front().whole.c;
  const auto ranks = static_cast<int64_t>(shares.size());
  const int64_t local_S = c.S / ranks, key_width = c.G * c.Q, query_width = c.H * c.Q;
  AttentionGradients out{std::vector<double>(c.T() * query_width, 0.0),
                         std::vector<double>(c.T() * key_width, 0.0),
                         std::vector<double>(c.T() * key_width, 0.0)};
  for (int64_t t = 0; t < c.T(); ++t) {
    const int64_t owner = shares.front().share.owner(t % c.S, c.S);
    const int64_t row = t / c.S * local_S + shares.front().share.row(t % c.S, c.S);
    for (int64_t i = 0; i < query_width; ++i) {
      out.d_q[t * query_width + i] = shares[owner].d_q.at(row * query_width + i);
    }
    for (int64_t i = 0; i < key_width; ++i) {
      const int64_t from = (owner * c.T() / ranks + row) * key_width + i;
      for (const TestTensor* of_rank : d_k) out.d_k[t * key_width + i] += of_rank->at(from);
      for (const TestTensor* of_rank : d_v) out.d_v[t * key_width + i] += of_rank->at(from);
    }
  }
  return out;
}

void expect_finite_differences(const AttentionTensors& whole, const AttentionGradients& gradients) {
  const AttentionValues at = whole.values();
  const std::vector<double> weight = whole.d_o.values();
  const auto along = [&](std::vector<double> AttentionValues::*field,
                         const std::vector<double>& gradient) {
    const auto loss = [&, field](const std::vector<double>& value) {
      AttentionValues moved = at;
      moved.*field = value;
      const std::vector<double> o = attention_oracle(whole.c, moved, whole.scale).o;
      return std::inner_product(o.begin(), o.end(), weight.begin(), 0.0);
    };
    TestRandom random(5);
    return finite_difference_error(loss, at.*field, gradient, random);
  };
  EXPECT_LT(along(&AttentionValues::q, gradients.d_q), 1e-4);
  EXPECT_LT(along(&AttentionValues::k, gradients.d_k), 1e-4);
  EXPECT_LT(along(&AttentionValues::v, gradients.d_v), 1e-4);
}

// What ranks make of shared sequences is the derivative of whole attention: parts of the keys in a
// ring, sums of whole keys, and a chain over the chunks of the queries.
TEST(AttentionShares, GradientsByPartsAgreeWithFiniteDifferences) {
  const auto run = [](auto op, const auto& args) { run_op(op, args); };
  const auto check = [&](const SharedCase& c, auto&& compute) {
    AttentionTensors whole(c.whole, InputFamily::normals);
    std::deque<ShareTensors> shares = all_shares(whole, c.ranks);
    std::vector<const TestTensor*> d_k, d_v;
    for (ShareTensors& share : shares) {
      compute(share);
      d_k.push_back(&share.d_k), d_v.push_back(&share.d_v);
    }
    expect_finite_differences(whole, gathered_gradients(shares, d_k, d_v));
  };
  for (const SharedCase& c : kSharedCases) {
    check(c, [](ShareTensors& share) { run_ring(share); });
    check(c, [&](ShareTensors& share) {
      run(attention, share.forward_args());
      run(attention_backward, share.backward_args());
    });
    AttentionTensors whole(c.whole, InputFamily::normals);
    std::deque<ShareTensors> shares = all_shares(whole, c.ranks);
    TestTensor d_k(Shape(c.whole.T(), c.whole.G * c.whole.Q)), d_v(d_k.shape());
    run_chain(shares, d_k, d_v, 0, run);
    expect_finite_differences(whole, gathered_gradients(shares, {&d_k}, {&d_v}));
  }
}

// The pairs of the parts are those of whole keys, and every rank has as many.
TEST(AttentionShares, PartsOfTheKeysCostWhatWholeOnesDo) {
  AttentionTensors whole(kSharedCases[1].whole, InputFamily::normals);
  const int64_t ranks = kSharedCases[1].ranks;
  for (int64_t index = 0; index < ranks; ++index) {
    ShareTensors t(whole, {ranks, index});
    AttentionArgs args = t.forward_args();
    const int64_t pairs = attention_pairs(args);
    int64_t of_parts = 0;
    args.part = KeyPart::next;
    for (args.key_rank = 0; args.key_rank < ranks; ++args.key_rank) {
      of_parts += attention_pairs(args);
    }
    EXPECT_EQ(of_parts, pairs);
  }
}

TEST(AttentionShares, MustFailWithoutOnePartOfTheKeys) {
  const SharedCase& c = kSharedCases[1];
  AttentionTensors whole(c.whole, InputFamily::normals);
  ShareTensors t(whole, {c.ranks, 1});
  run_ring(t, 1);  // its own keys are missing
  const auto expected = attention_oracle(whole.c, whole.values(), whole.scale);
  TestTensor all(whole.o.shape());
  for (int64_t i = 0; i < all.elements(); ++i) all.set(i, expected.o[static_cast<size_t>(i)]);
  EXPECT_FALSE(within(t.o, t.part(all).values(), 0.1));
}

TEST(AttentionShares, MustFailWithTheSumsOfAnotherShare) {
  const SharedCase& c = kSharedCases[0];
  AttentionTensors whole(c.whole, InputFamily::normals);
  ShareTensors t(whole, {c.ranks, 0});
  run_op(attention, t.forward_args());
  run_op(attention_backward, t.backward_args());
  const auto other = attention_backward_oracle(c.whole, whole.values(), whole.d_o.values(),
                                               whole.scale, {c.ranks, 1});
  EXPECT_FALSE(within(t.d_k, other.d_k, 0.1));
  AttentionBackwardArgs both = t.backward_args();
  both.d_k_TGQ = whole.d_k.out<Real>();
  EXPECT_THROW(run_op(attention_backward, both), Error);
}

// ---- the GPU ---------------------------------------------------------------------------------

// body(share, bound) for each rank of each case: chunks of any length in fp32, whole tiles in bf16.
template <class Body>
void each_cuda_share(Body&& body) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    std::vector<SharedCase> cases = kSharedTileCases;
    if (dtype == DType::f32) cases.insert(cases.end(), kSharedCases.begin(), kSharedCases.end());
    for (const SharedCase& c : cases) {
      AttentionTensors whole(c.whole, InputFamily::normals, dtype);
      const int64_t terms = c.whole.Q + 16;
      for (int64_t index = 0; index < c.ranks; ++index) {
        SCOPED_TRACE(testing::Message()
                     << c.whole.S << " positions, head " << c.whole.Q << " " << dtype_name(dtype)
                     << ", rank " << index << " of " << c.ranks);
        body(whole, ContextShare{c.ranks, index},
             dtype == DType::f32 ? tolerance(2, terms) : bf16_tolerance(2, terms));
      }
    }
  }
}

TEST(AttentionShares, CudaSharesStayWithinRounding) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  each_cuda_share([](AttentionTensors& whole, const ContextShare& share, double bound) {
    ShareTensors t(whole, share);
    run_cuda_op(attention, t.forward_args());
    run_cuda_op(attention_backward, t.backward_args());
    expect_share_near_oracle(t, bound);
  });
}

// A share's rows have the bits of one rank's, as tiles are those of whole sequences; its sums do
// not depend on the other sequences; nothing is written outside the outputs, and twice the same.
TEST(AttentionShares, CudaSharesHaveTheRowsOfOneRank) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const DType dtype : {DType::bf16, DType::f32}) {
    for (const SharedCase& c : kSharedTileCases) {
      AttentionTensors whole(c.whole, InputFamily::normals, dtype);
      whole.cuda_both();
      for (int64_t index = 0; index < c.ranks; ++index) {
        ShareTensors t(whole, {c.ranks, index});
        run_cuda_op(attention, t.forward_args());
        EXPECT_TRUE(bits_equal(t.o, t.part(whole.o)));
        EXPECT_TRUE(bits_equal(t.lse, t.part(whole.lse)));
        run_cuda_op(attention_backward, t.backward_args());
        EXPECT_TRUE(bits_equal(t.d_q, t.part(whole.d_q)));
        if (index == 0) {
          expect_cuda_agrees(attention_backward, t.backward_args(),
                             4 * (dtype == DType::f32 ? tolerance(2, c.whole.Q + 16)
                                                      : bf16_tolerance(2, c.whole.Q + 16)));
        }
      }
    }
  }
}

// Keys that come a rank's part at a time, on the GPU: near the oracle, and twice the same bits.
TEST(AttentionShares, CudaPartsOfTheKeysMeetByTheirLogSumExp) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  each_cuda_share([](AttentionTensors& whole, const ContextShare& share, double bound) {
    ShareTensors t(whole, share), again(whole, share);
    run_ring(t, 0, Backend::cuda);
    run_ring(again, 0, Backend::cuda);
    expect_share_near_oracle(t, bound);
    for (const auto member : {&ShareTensors::o, &ShareTensors::lse, &ShareTensors::d_q,
                              &ShareTensors::d_k, &ShareTensors::d_v}) {
      EXPECT_TRUE(bits_equal(t.*member, again.*member));
    }
  });
}

// Rows that its own keys did not begin would hold what was there before.
TEST(AttentionShares, CudaRefusesARingThatBeginsWithOtherKeys) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  const SharedCase& c = kSharedTileCases[0];
  AttentionTensors whole(c.whole, InputFamily::normals, DType::bf16);
  ShareTensors t(whole, {c.ranks, 1});
  EXPECT_THROW(run_ring(t, 1, Backend::cuda), Error);
}

// In exact mode ranks that share sequences have the bits of one, on the GPU too.
TEST(AttentionShares, CudaChainHasTheBitsOfOneRank) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const DType dtype : {DType::bf16, DType::f32}) {
    for (const SharedCase& c : kSharedTileCases) {
      SCOPED_TRACE(testing::Message() << c.whole.S << " positions, head " << c.whole.Q << " "
                                      << dtype_name(dtype) << ", " << c.ranks << " ranks");
      expect_chain_has_bits_of_one_rank(c, dtype, Backend::cuda);
    }
  }
}

TEST(AttentionShares, CudaSharesOfSequencesDoNotDependOnTheBatch) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const DType dtype : {DType::bf16, DType::f32}) {
    AttentionTensors all({3, 512, 4, 2, 64, 32, Documents::mixed}, InputFamily::normals, dtype);
    const ContextShare share{2, 1};
    ShareTensors batch(all, share);
    run_cuda_op(attention, batch.forward_args());
    run_cuda_op(attention_backward, batch.backward_args());
    for (int64_t sequence = 0; sequence < 3; ++sequence) {
      AttentionTensors one = one_sequence(all, sequence);
      ShareTensors alone(one, share);
      run_cuda_op(attention, alone.forward_args());
      run_cuda_op(attention_backward, alone.backward_args());
      const int64_t rows = alone.d_k.shape()[0] / share.ranks;  // of one owner and sequence
      for (const auto& [sum, of_batch] :
           {std::pair(&alone.d_k, &batch.d_k), std::pair(&alone.d_v, &batch.d_v)}) {
        const int64_t width = sum->shape().row_elements();
        for (int64_t i = 0; i < sum->elements(); ++i) {
          const int64_t owner = i / width / rows;
          const int64_t from = (owner * 3 + sequence) * rows * width + i % (rows * width);
          ASSERT_EQ(sum->at(i), of_batch->at(from)) << i;
        }
      }
    }
  }
}

TEST(AttentionShares, CudaRefusesChunksThatCutTiles) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  AttentionTensors whole({1, 256, 2, 1, 64, 32, Documents::absent}, InputFamily::normals,
                         DType::bf16);
  ShareTensors t(whole, {2, 0});
  EXPECT_THROW(run_cuda_op(attention, t.forward_args()), Error);
}

}  // namespace
}  // namespace cambium::test
