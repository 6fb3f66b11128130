// Parity of the linear layer: exact integers, normals, the promised chain, D1, D2 and D3.
#include "tests/ops/cuda_test.h"
#include "tests/ops/forest_test.h"
#include "tests/ops/linear_cases.h"

namespace cambium::test {
namespace {

// Errors of a chain of K roundings: each term is off by at most (K / 2) eps on average.
constexpr double kLinearChainFactor = 2;

constexpr InputFamily kFamilies[] = {InputFamily::integers, InputFamily::normals};

testing::AssertionResult agrees(const TestTensor& actual, std::span<const double> expected,
                                InputFamily family, int64_t terms) {
  if (actual.elements() == 0) return bits_equal(actual, expected);
  if (family == InputFamily::integers) return bits_equal(actual, expected);
  return within(actual, expected, tolerance(kLinearChainFactor, terms));
}

TEST(Linear, ForwardAgreesWithOracle) {
  for (const LinearCase& c : kLinearCases) {
    for (const InputFamily family : kFamilies) {
      TestRandom random(c.T * 1000 + c.K);
      TestTensor x = make_tensor(Shape(c.T, c.K), random, family);
      TestTensor w = make_tensor(Shape(c.N, c.K), random, family);
      TestTensor residual = make_tensor(Shape(c.T, c.N), random, family);
      TestTensor y(Shape(c.T, c.N), DType::f32, c.N + 5);
      run_op(linear, LinearArgs{x.in<Real>(), w.in<Real>(), {}, y.out<Real>()});
      const std::vector<double> product = linear_oracle(x, w);
      EXPECT_TRUE(agrees(y, product, family, c.K)) << c.T << " " << c.N << " " << c.K;
      y.poison();
      run_op(linear, LinearArgs{x.in<Real>(), w.in<Real>(), residual.in<Real>(), y.out<Real>()});
      const std::vector<double> sum = add(product, residual.values());
      EXPECT_TRUE(agrees(y, sum, family, c.K)) << c.T << " " << c.N << " " << c.K;
      // In place: the residual stream is both input and output.
      LinearArgs in_place{x.in<Real>(), w.in<Real>(), residual.in<Real>(), residual.out<Real>()};
      run_op(linear, in_place);
      EXPECT_TRUE(bits_equal(residual.bits(), y.bits()));
    }
  }
}

TEST(Linear, DgradAgreesWithOracle) {
  for (const LinearCase& c : kLinearCases) {
    for (const InputFamily family : kFamilies) {
      TestRandom random(c.T * 1000 + c.N);
      TestTensor d_y = make_tensor(Shape(c.T, c.N), random, family);
      TestTensor w = make_tensor(Shape(c.N, c.K), random, family);
      TestTensor residual = make_tensor(Shape(c.T, c.K), random, family);
      TestTensor d_x(Shape(c.T, c.K), DType::f32, c.K + 3);
      run_op(linear_dgrad, LinearDgradArgs{d_y.in<Real>(), w.in<Real>(), {}, d_x.out<Real>()});
      const std::vector<double> product = linear_dgrad_oracle(d_y, w);
      EXPECT_TRUE(agrees(d_x, product, family, c.N)) << c.T << " " << c.N << " " << c.K;
      d_x.poison();
      run_op(linear_dgrad,
             LinearDgradArgs{d_y.in<Real>(), w.in<Real>(), residual.in<Real>(), d_x.out<Real>()});
      EXPECT_TRUE(agrees(d_x, add(product, residual.values()), family, c.N));
    }
  }
}

TEST(Linear, WgradAccumulatesIntoSlotZero) {
  for (const LinearCase& c : kLinearCases) {
    for (const InputFamily family : kFamilies) {
      TestRandom random(c.N * 1000 + c.K);
      TestTensor d_y = make_tensor(Shape(c.T, c.N), random, family);
      TestTensor x = make_tensor(Shape(c.T, c.K), random, family);
      TestTensor d_w(Shape(1, c.N, c.K), DType::f32, c.N * c.K + 9);
      d_w.fill_family(random, family);
      const std::vector<double> expected = add(linear_wgrad_oracle(d_y, x), d_w.values());
      LinearWgradArgs args{d_y.in<Real>(), x.in<Real>(), d_w.inout<float>(), {}, {}, 0, 0};
      run_op(linear_wgrad, args);
      EXPECT_TRUE(agrees(d_w, expected, family, c.T + 1)) << c.T << " " << c.N << " " << c.K;
    }
  }
}

TEST(Linear, Bf16RoundsOnceWhereStored) {
  TestRandom random(3);
  const LinearCase c{33, 40, 300};
  TestTensor x = make_tensor(Shape(c.T, c.K), random, InputFamily::normals, DType::bf16);
  TestTensor w = make_tensor(Shape(c.N, c.K), random, InputFamily::normals, DType::bf16);
  TestTensor y(Shape(c.T, c.N), DType::bf16, c.N + 2), y_f32(Shape(c.T, c.N));
  run_op(linear, LinearArgs{x.in<Real>(), w.in<Real>(), {}, y.out<Real>()});
  run_op(linear, LinearArgs{x.in<Real>(), w.in<Real>(), {}, y_f32.out<Real>()});
  EXPECT_TRUE(bits_equal(y, y_f32.values()));
  EXPECT_TRUE(within(y_f32, linear_oracle(x, w), tolerance(kLinearChainFactor, c.K)));
}

TEST(Linear, EveryElementIsOneChain) {
  const LinearCase c{23, 50, 700};
  TestRandom random(5);
  TestTensor x = make_tensor(Shape(c.T, c.K), random, InputFamily::normals);
  TestTensor w = make_tensor(Shape(c.N, c.K), random, InputFamily::normals);
  TestTensor y(Shape(c.T, c.N));
  run_op(linear, LinearArgs{x.in<Real>(), w.in<Real>(), {}, y.out<Real>()});
  TestTensor d_x(Shape(c.T, c.K));
  run_op(linear_dgrad, LinearDgradArgs{y.in<Real>(), w.in<Real>(), {}, d_x.out<Real>()});
  TestTensor expected(Shape(c.T, c.N)), expected_d_x(Shape(c.T, c.K));
  for (int64_t t = 0; t < c.T; ++t) {
    for (int64_t n = 0; n < c.N; ++n) {
      expected.set(t * c.N + n, chain_oracle(
                                    c.K, [&](int64_t k) { return x.at(t * c.K + k); },
                                    [&](int64_t k) { return w.at(n * c.K + k); }));
    }
    for (int64_t k = 0; k < c.K; ++k) {
      expected_d_x.set(t * c.K + k, chain_oracle(
                                        c.N, [&](int64_t n) { return y.at(t * c.N + n); },
                                        [&](int64_t n) { return w.at(n * c.K + k); }));
    }
  }
  EXPECT_TRUE(bits_equal(y, expected));
  EXPECT_TRUE(bits_equal(d_x, expected_d_x));
}

TEST(Linear, RowsDoNotDependOnTheBatch) {
  const LinearCase c{150, 72, 300};
  TestRandom random(7);
  TestTensor x = make_tensor(Shape(c.T, c.K), random, InputFamily::normals);
  TestTensor w = make_tensor(Shape(c.N, c.K), random, InputFamily::normals);
  expect_rows_independent(c.T, [&](const std::vector<int64_t>& rows) {
    const auto count = static_cast<int64_t>(rows.size());
    TestTensor part(Shape(count, c.K)), y(Shape(count, c.N)), d_x(Shape(count, c.K));
    for (int64_t i = 0; i < count * c.K; ++i) part.set(i, x.at(rows[i / c.K] * c.K + i % c.K));
    run_op(linear, LinearArgs{part.in<Real>(), w.in<Real>(), {}, y.out<Real>()});
    run_op(linear_dgrad, LinearDgradArgs{y.in<Real>(), w.in<Real>(), {}, d_x.out<Real>()});
    std::vector<std::vector<std::byte>> bits_of_rows;
    append_row_bits(y, bits_of_rows);
    append_row_bits(d_x, bits_of_rows);
    return bits_of_rows;
  });
}

// Runs wgrad over `ranges` of blocks, one call each, then the merges; returns the root's bits.
struct WgradForest {
  int64_t total_blocks, block_tokens;
  TestTensor& d_y_TN;
  TestTensor& x_TK;
  Backend backend = Backend::reference;
  std::vector<std::byte> run(const std::vector<std::pair<int64_t, int64_t>>& ranges, int threads) {
    const int64_t N = d_y_TN.shape()[1], K = x_TK.shape()[1], S = 2 * total_blocks;
    TestTensor d_w(Shape(S, N, K)), present(Shape(S), DType::u8);
    Forest forest(total_blocks, S);
    for (const auto& [first, end] : ranges) {
      TestTensor table = forest.plan_call(first, end);
      const int64_t rows = (end - first) * block_tokens, offset = first * block_tokens;
      LinearWgradArgs args;
      const auto rows_of = [&](TestTensor& tensor, int64_t width) {
        std::byte* data = static_cast<std::byte*>(tensor.data());
        return In<Real>(data + offset * width * dtype_bytes(tensor.dtype()), tensor.dtype(),
                        Shape(rows, width));
      };
      args.d_y_TN = rows_of(d_y_TN, N);
      args.x_TK = rows_of(x_TK, K);
      args.d_w_SNK = d_w.inout<float>();
      args.present_S = present.inout<uint8_t>();
      args.target = {GradMode::nodes, table.in<int32_t>(), total_blocks};
      args.first_block = first;
      args.block_tokens = block_tokens;
      if (backend == Backend::cuda) {
        run_cuda_op(linear_wgrad, args);
      } else {
        run_op(linear_wgrad, args, threads);
      }
    }
    for (const Forest::Merge& merge : forest.remaining_merges()) {
      GradMergeArgs args;
      args.slots_SGN = InOut<float>(static_cast<float*>(d_w.data()), Shape(S, 1, N * K));
      args.present_SG = InOut<uint8_t>(static_cast<uint8_t*>(present.data()), Shape(S, 1));
      args.group_stride = N * K;
      args.left_slot = merge.left;
      args.right_slot = merge.right;
      args.destination_slot = merge.destination;
      run_op(grad_merge, args, threads);
    }
    const std::vector<std::byte> bits = d_w.bits();
    const int64_t width = N * K * 4;
    return {bits.begin() + forest.root_slot() * width,
            bits.begin() + (forest.root_slot() + 1) * width};
  }
};

TEST(Linear, NodesAreIndependentOfTheSplitIntoCalls) {
  for (const int64_t total_blocks : {1, 2, 3, 7, 8, 13, 32}) {
    const int64_t block_tokens = 5, N = 23, K = 37;
    TestRandom random(total_blocks);
    TestTensor d_y =
        make_tensor(Shape(total_blocks * block_tokens, N), random, InputFamily::normals);
    TestTensor x = make_tensor(Shape(total_blocks * block_tokens, K), random, InputFamily::normals);
    const std::vector<float> expected = tree_sum_oracle(0, total_blocks, [&](int64_t block) {
      std::vector<float> value;
      for (int64_t i = 0; i < N * K; ++i) {
        auto row = [&](int64_t t) { return block * block_tokens + t; };
        value.push_back(chain_oracle(
            block_tokens, [&](int64_t t) { return d_y.at(row(t) * N + i / K); },
            [&](int64_t t) { return x.at(row(t) * K + i % K); }));
      }
      return value;
    });
    WgradForest forest{total_blocks, block_tokens, d_y, x};
    for (const int64_t width : {int64_t{1}, int64_t{2}, int64_t{3}, total_blocks}) {
      for (const auto order : {CallOrder::ascending, CallOrder::descending, CallOrder::odd_first}) {
        const auto bits = forest.run(call_ranges(total_blocks, width, order), 2);
        EXPECT_TRUE(bits_equal(bits, std::as_bytes(std::span(expected))))
            << total_blocks << " blocks in calls of " << width;
      }
    }
  }
}

TEST(Linear, WgradStoresWhatItWouldAddToZeros) {
  for (const LinearCase& c :
       {LinearCase{0, 8, 16}, LinearCase{700, 130, 70}, LinearCase{3, 1, 1}}) {
    TestRandom random(23);
    TestTensor x = make_tensor(Shape(c.T, c.K), random, InputFamily::normals);
    TestTensor d_y = make_tensor(Shape(c.T, c.N), random, InputFamily::normals);
    TestTensor added(Shape(1, c.N, c.K)), stored(Shape(1, c.N, c.K));
    added.fill(0);
    LinearWgradArgs args{d_y.in<Real>(), x.in<Real>(), added.inout<float>(), {}, {}, 0, 0};
    run_op(linear_wgrad, args);
    args.d_w_SNK = stored.inout<float>();
    args.target.mode = GradMode::store;
    run_op(linear_wgrad, args);
    EXPECT_TRUE(bits_equal(stored, added)) << c.T;
  }
}

TEST(Linear, LongLeavesAndManyRowsKeepTheTree) {
  // Leaves longer than a packing batch, and operands that wait across batches.
  const int64_t total_blocks = 6, block_tokens = 300, N = 70, K = 130;
  TestRandom random(11);
  TestTensor d_y = make_tensor(Shape(total_blocks * block_tokens, N), random, InputFamily::normals);
  TestTensor x = make_tensor(Shape(total_blocks * block_tokens, K), random, InputFamily::normals);
  WgradForest forest{total_blocks, block_tokens, d_y, x};
  const auto whole = forest.run(call_ranges(total_blocks, total_blocks, CallOrder::ascending), 2);
  const auto split = forest.run(call_ranges(total_blocks, 1, CallOrder::ascending), 1);
  EXPECT_TRUE(bits_equal(whole, split));
  TestTensor total(Shape(N, K));
  std::memcpy(total.data(), whole.data(), whole.size());
  EXPECT_TRUE(within(total, linear_wgrad_oracle(d_y, x),
                     tolerance(kLinearChainFactor, total_blocks * block_tokens)));
}

TEST(Linear, ThreadsDoNotChangeBits) {
  const LinearCase c{256, 130, 140};
  TestRandom random(13);
  TestTensor x = make_tensor(Shape(c.T, c.K), random, InputFamily::normals);
  TestTensor w = make_tensor(Shape(c.N, c.K), random, InputFamily::normals);
  TestTensor d_y = make_tensor(Shape(c.T, c.N), random, InputFamily::normals);
  expect_thread_independent([&](int threads) {
    TestTensor y(Shape(c.T, c.N)), d_x(Shape(c.T, c.K)), d_w(Shape(1, c.N, c.K));
    d_w.fill(0);
    run_op(linear, LinearArgs{x.in<Real>(), w.in<Real>(), {}, y.out<Real>()}, threads);
    run_op(linear_dgrad, LinearDgradArgs{d_y.in<Real>(), w.in<Real>(), {}, d_x.out<Real>()},
           threads);
    LinearWgradArgs wgrad{d_y.in<Real>(), x.in<Real>(), d_w.inout<float>(), {}, {}, 0, 0};
    run_op(linear_wgrad, wgrad, threads);
    WgradForest forest{16, 16, d_y, x};
    const auto nodes = forest.run(call_ranges(16, 5, CallOrder::ascending), threads);
    std::vector<std::byte> bits = y.bits();
    for (const auto& more : {d_x.bits(), d_w.bits(), nodes}) {
      bits.insert(bits.end(), more.begin(), more.end());
    }
    return bits;
  });
}

TEST(Linear, GradientsAgreeWithFiniteDifferences) {
  const LinearCase c{9, 14, 10};
  TestRandom random(17);
  TestTensor x = make_tensor(Shape(c.T, c.K), random, InputFamily::normals);
  TestTensor w = make_tensor(Shape(c.N, c.K), random, InputFamily::normals);
  TestTensor d_y = make_tensor(Shape(c.T, c.N), random, InputFamily::normals);
  TestTensor d_x(Shape(c.T, c.K)), d_w(Shape(1, c.N, c.K));
  d_w.fill(0);
  run_op(linear_dgrad, LinearDgradArgs{d_y.in<Real>(), w.in<Real>(), {}, d_x.out<Real>()});
  LinearWgradArgs wgrad{d_y.in<Real>(), x.in<Real>(), d_w.inout<float>(), {}, {}, 0, 0};
  run_op(linear_wgrad, wgrad);
  auto loss = [&](const std::vector<double>& x_values, const std::vector<double>& w_values) {
    double sum = 0;
    for (int64_t i = 0; i < c.T * c.N; ++i) {
      double y = 0;
      for (int64_t k = 0; k < c.K; ++k) {
        y += x_values[i / c.N * c.K + k] * w_values[i % c.N * c.K + k];
      }
      sum += y * d_y.at(i);
    }
    return sum;
  };
  const auto of_x = [&](const std::vector<double>& values) { return loss(values, w.values()); };
  const auto of_w = [&](const std::vector<double>& values) { return loss(x.values(), values); };
  EXPECT_LT(finite_difference_error(of_x, x.values(), d_x.values(), random), 1e-5);
  EXPECT_LT(finite_difference_error(of_w, w.values(), d_w.values(), random), 1e-5);
}

// Shapes of cuBLASLt (multiples of 8) and of the own kernels, with operands in bf16.
const std::vector<LinearCase> kCudaLinearCases = {
    {1, 8, 8},       {7, 13, 11},     {5, 16, 24},       {33, 48, 257},    {96, 272, 600},
    {128, 384, 128}, {200, 64, 1032}, {1000, 128, 2048}, {257, 4096, 512},
};

struct BiasTensors {
  BiasTensors(int64_t T, int64_t N, DType dtype, TestRandom& random)
      : bias_N(make_tensor(Shape(N), random, InputFamily::normals, dtype)),
        y_TN(Shape(T, N), dtype, N + 3) {
    y_TN.fill_normal(random);
    want = y_TN.values();
    for (int64_t i = 0; i < T * N; ++i) want[i] += bias_N.at(i % N);
  }
  AddBiasArgs args() { return {bias_N.in<Real>(), y_TN.inout<Real>()}; }
  TestTensor bias_N, y_TN;
  std::vector<double> want;
};

TEST(Linear, BiasIsAddedToEveryRow) {
  TestRandom random(31);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const auto& [T, N] : {std::pair<int64_t, int64_t>{0, 8}, {1, 1}, {7, 33}, {300, 96}}) {
      BiasTensors t(T, N, dtype, random);
      run_op(add_bias, t.args(), 2);
      EXPECT_TRUE(
          within(t.y_TN, t.want, dtype == DType::f32 ? tolerance(1, 1) : bf16_tolerance(1, 1)));
      if (T > 1) {
        t.want[static_cast<size_t>(N)] += 1;
        EXPECT_FALSE(within(t.y_TN, t.want, bf16_tolerance(1, 1)));  // must fail
      }
    }
  }
}

TEST(Linear, CudaBiasHasTheReferencesBits) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  TestRandom random(32);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const auto& [T, N] : {std::pair<int64_t, int64_t>{1, 1}, {7, 33}, {3000, 96}}) {
      BiasTensors t(T, N, dtype, random);
      expect_cuda_agrees(add_bias, t.args(), 0.0);
    }
  }
}

TEST(Linear, CudaAgreesWithOracle) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const LinearCase& c : kCudaLinearCases) {
    SCOPED_TRACE(testing::Message() << c.T << " " << c.N << " " << c.K);
    TestRandom random(c.T * 1000 + c.K);
    const auto normal = [&](Shape shape) {
      return make_tensor(shape, random, InputFamily::normals, DType::bf16);
    };
    TestTensor x = normal(Shape(c.T, c.K)), w = normal(Shape(c.N, c.K));
    TestTensor d_y = normal(Shape(c.T, c.N)), residual = normal(Shape(c.T, c.N));
    TestTensor y(Shape(c.T, c.N), DType::bf16), y_f32(Shape(c.T, c.N));
    TestTensor d_x(Shape(c.T, c.K), DType::bf16), d_w(Shape(1, c.N, c.K));
    d_w.fill_normal(random);
    const std::vector<double> d_w_want = add(linear_wgrad_oracle(d_y, x), d_w.values());
    run_cuda_op(linear, LinearArgs{x.in<Real>(), w.in<Real>(), residual.in<Real>(), y.out<Real>()});
    run_cuda_op(linear, LinearArgs{x.in<Real>(), w.in<Real>(), {}, y_f32.out<Real>()});
    run_cuda_op(linear_dgrad, LinearDgradArgs{d_y.in<Real>(), w.in<Real>(), {}, d_x.out<Real>()});
    LinearWgradArgs wgrad{d_y.in<Real>(), x.in<Real>(), d_w.inout<float>(), {}, {}, 0, 0};
    run_cuda_op(linear_wgrad, wgrad);
    const std::vector<double> product = linear_oracle(x, w);
    EXPECT_TRUE(within(y_f32, product, tolerance(kLinearChainFactor, c.K)));
    EXPECT_TRUE(
        within(y, add(product, residual.values()), bf16_tolerance(kLinearChainFactor, c.K)));
    EXPECT_TRUE(within(d_x, linear_dgrad_oracle(d_y, w), bf16_tolerance(kLinearChainFactor, c.N)));
    EXPECT_TRUE(within(d_w, d_w_want, tolerance(kLinearChainFactor, c.T + 1)));
    d_w.poison();
    wgrad.target.mode = GradMode::store;
    run_cuda_op(linear_wgrad, wgrad);
    EXPECT_TRUE(within(d_w, linear_wgrad_oracle(d_y, x), tolerance(kLinearChainFactor, c.T + 1)));
  }
}

// D2 on the GPU: the library's algorithm follows N and K, never the row count.
TEST(Linear, CudaRowsDoNotDependOnTheBatch) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const LinearCase& c :
       {LinearCase{700, 384, 128}, {1500, 128, 2048}, {600, 4104, 512}, {300, 72, 300}}) {
    TestRandom random(7);
    TestTensor x = make_tensor(Shape(c.T, c.K), random, InputFamily::normals, DType::bf16);
    TestTensor w = make_tensor(Shape(c.N, c.K), random, InputFamily::normals, DType::bf16);
    expect_rows_independent(c.T, [&](const std::vector<int64_t>& rows) {
      const auto count = static_cast<int64_t>(rows.size());
      TestTensor part(Shape(count, c.K), DType::bf16), y(Shape(count, c.N), DType::bf16);
      TestTensor y_f32(Shape(count, c.N)), d_x(Shape(count, c.K), DType::bf16);
      for (int64_t i = 0; i < count * c.K; ++i) part.set(i, x.at(rows[i / c.K] * c.K + i % c.K));
      run_cuda_op(linear, LinearArgs{part.in<Real>(), w.in<Real>(), {}, y.out<Real>()});
      run_cuda_op(linear, LinearArgs{part.in<Real>(), w.in<Real>(), {}, y_f32.out<Real>()});
      run_cuda_op(linear_dgrad, LinearDgradArgs{y.in<Real>(), w.in<Real>(), {}, d_x.out<Real>()});
      std::vector<std::vector<std::byte>> bits_of_rows;
      append_row_bits(y, bits_of_rows);
      append_row_bits(y_f32, bits_of_rows);
      append_row_bits(d_x, bits_of_rows);
      return bits_of_rows;
    });
  }
}

// D3 on the GPU: nodes do not depend on the split into calls, and are the sums of their blocks.
TEST(Linear, CudaNodesAreIndependentOfTheSplitIntoCalls) {
  if (!has_gpu()) GTEST_SKIP() << kNoGpu;
  for (const int64_t total_blocks : {1, 3, 7, 8, 13}) {
    const int64_t block_tokens = 16, N = 40, K = 48, T = total_blocks * block_tokens;
    TestRandom random(total_blocks);
    TestTensor d_y = make_tensor(Shape(T, N), random, InputFamily::normals, DType::bf16);
    TestTensor x = make_tensor(Shape(T, K), random, InputFamily::normals, DType::bf16);
    WgradForest forest{total_blocks, block_tokens, d_y, x, Backend::cuda};
    const auto whole = forest.run(call_ranges(total_blocks, total_blocks, CallOrder::ascending), 1);
    TestTensor sum(Shape(N, K));
    std::memcpy(sum.data(), whole.data(), whole.size());
    EXPECT_TRUE(within(sum, linear_wgrad_oracle(d_y, x), tolerance(kLinearChainFactor, T)));
    for (const int64_t width : {1, 2, 3}) {
      for (const auto order : {CallOrder::ascending, CallOrder::descending, CallOrder::odd_first}) {
        EXPECT_TRUE(bits_equal(forest.run(call_ranges(total_blocks, width, order), 1), whole))
            << total_blocks << " blocks in calls of " << width;
      }
    }
  }
}

TEST(Linear, MustFailWrongOutputIsDetected) {
  TestRandom random(19);
  TestTensor x = make_tensor(Shape(20, 64), random, InputFamily::normals);
  TestTensor w = make_tensor(Shape(24, 64), random, InputFamily::normals);
  TestTensor y(Shape(20, 24));
  run_op(linear, LinearArgs{x.in<Real>(), w.in<Real>(), {}, y.out<Real>()});
  const std::vector<double> expected = linear_oracle(x, w);
  ASSERT_TRUE(within(y, expected, tolerance(kLinearChainFactor, 64)));
  // One product of the 64 left out of one element.
  y.set(100, y.at(100) - x.at(100 / 24 * 64) * w.at(100 % 24 * 64));
  EXPECT_FALSE(within(y, expected, tolerance(kLinearChainFactor, 64)));
}

}  // namespace
}  // namespace cambium::test
