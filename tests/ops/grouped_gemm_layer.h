// One expert layer's tensors and the gradient forest of its experts, as the parity tests run them.
#pragma once

#include <numeric>

#include "tests/ops/cuda_test.h"
#include "tests/ops/forest_test.h"
#include "tests/ops/grouped_gemm_cases.h"

namespace cambium::test {

// Chains of K roundings, through up to three products and SwiGLU.
inline constexpr double kChainFactor = 4;

enum class RowWeights { absent, given };
enum class RowSource { permuted, gathered };
enum class Device { cpu, gpu };
enum class RowStrides { padded, contiguous };  // padded: odd, which only plain kernels can take

template <class Args>
void run_on(Device device, void (*op)(const Args&, OpCall), const Args& args, int threads = 2) {
  if (device == Device::cpu) {
    run_op(op, args, threads);
  } else {
    run_cuda_op(op, args);
  }
}

struct LayerKind {
  DType dtype = DType::f32;
  RowStrides strides = RowStrides::padded;
  RowSource source = RowSource::permuted;
};

// Inputs and outputs of one expert layer. Expert strides are padded, as canonical tensors are.
struct ExpertLayer {
  GroupedCase c;
  LayerKind kind;
  int64_t T = kind.source == RowSource::permuted ? c.R() : c.R() / 2 + 3;
  int64_t pad = kind.strides == RowStrides::padded ? 1 : 0;
  TestTensor offsets{offsets_tensor(c)};
  TestTensor token{Shape(c.R()), DType::i32};
  TestTensor x{Shape(T, c.D), kind.dtype};
  TestTensor w_up{Shape(c.experts(), 2 * c.F, c.D), kind.dtype, 2 * c.F* c.D + 8 + 3 * pad};
  TestTensor w_down{Shape(c.experts(), c.D, c.F), kind.dtype, c.F* c.D + 8 + 3 * pad};
  TestTensor weight{Shape(c.R())};
  TestTensor d_y{Shape(T, c.D), kind.dtype};
  TestTensor gate_up{Shape(c.R(), 2 * c.F), kind.dtype};
  TestTensor h{Shape(c.R(), c.F), kind.dtype, c.F + 2 * pad};
  TestTensor y{Shape(c.R(), c.D), kind.dtype, c.D + pad};
  TestTensor d_gate_up{Shape(c.R(), 2 * c.F), kind.dtype, 2 * c.F + 3 * pad};
  TestTensor d_weight{Shape(c.R())};
  TestTensor weighted_h{Shape(c.R(), c.F), kind.dtype};
  TestTensor d_x{Shape(c.R(), c.D), kind.dtype, c.D + 5 * pad};

  ExpertLayer(const GroupedCase& grouped_case, uint64_t seed, LayerKind layer_kind = {})
      : c(grouped_case), kind(layer_kind) {
    TestRandom random(seed);
    x.fill_normal(random);
    w_up.fill_normal(random, 1 / std::sqrt(static_cast<double>(c.D)));
    w_down.fill_normal(random, 1 / std::sqrt(static_cast<double>(c.F)));
    weight.fill_normal(random);
    d_y.fill_normal(random);
    for (int64_t r = 0; r < c.R(); ++r) {
      token.set(r, static_cast<double>(random.integer(0, T - 1)));
    }
  }
  In<int32_t> rows() {
    return kind.source == RowSource::gathered ? token.in<int32_t>() : In<int32_t>{};
  }
  GroupedUpArgs up_args() {
    return {x.in<Real>(),        w_up.in<Real>(), offsets.in<int32_t>(),
            gate_up.out<Real>(), h.out<Real>(),   rows()};
  }
  GroupedDownArgs down_args(RowWeights weights) {
    return {h.in<Real>(), w_down.in<Real>(), offsets.in<int32_t>(),
            weights == RowWeights::given ? weight.in<float>() : In<float>{}, y.out<Real>()};
  }
  GroupedDownDgradArgs down_dgrad_args(RowWeights weights) {
    const bool given = weights == RowWeights::given;
    return {d_y.in<Real>(),
            w_down.in<Real>(),
            gate_up.in<Real>(),
            offsets.in<int32_t>(),
            given ? weight.in<float>() : In<float>{},
            d_gate_up.out<Real>(),
            given ? d_weight.out<float>() : Out<float>{},
            weighted_h.out<Real>(),
            rows()};
  }
  GroupedUpDgradArgs up_dgrad_args() {
    return {d_gate_up.in<Real>(), w_up.in<Real>(), offsets.in<int32_t>(), d_x.out<Real>()};
  }
  void run(RowWeights weights, int threads = 2, Device device = Device::cpu) {
    run_on(device, grouped_up, up_args(), threads);
    run_on(device, grouped_down, down_args(weights), threads);
    run_on(device, grouped_down_dgrad, down_dgrad_args(weights), threads);
    run_on(device, grouped_up_dgrad, up_dgrad_args(), threads);
  }
  ExpertLayerInputs inputs(RowWeights weights) const {
    return {x.values(), w_up.values(), w_down.values(),
            weights == RowWeights::given ? weight.values() : std::vector<double>{}, d_y.values()};
  }
  std::vector<const TestTensor*> results() const {
    return {&gate_up, &h, &y, &weighted_h, &d_gate_up, &d_weight, &d_x};
  }
};

enum class WgradOf { up, down };

// d_w of one projection from what the layer's backward hands on, added to `start` everywhere.
inline TestTensor wgrad_of(ExpertLayer& layer, WgradOf which, Device device, double start = 0,
                           GradMode mode = GradMode::accumulate) {
  const bool is_up = which == WgradOf::up;
  const int64_t N = is_up ? 2 * layer.c.F : layer.c.D, K = is_up ? layer.c.D : layer.c.F;
  const int64_t e = layer.c.experts(), stride = N * K + 4 + layer.pad;
  TestTensor d_w(Shape(e, N * K), DType::f32, stride);
  if (mode == GradMode::accumulate) d_w.fill(start);
  GroupedWgradArgs args;
  args.target.mode = mode;
  args.d_y_RN = is_up ? layer.d_gate_up.in<Real>() : layer.d_y.in<Real>();
  args.x_RK = is_up ? layer.x.in<Real>() : layer.weighted_h.in<Real>();
  args.expert_offset_e1 = layer.offsets.in<int32_t>();
  args.d_w_SeNK = InOut<float>(static_cast<float*>(d_w.data()), Shape(1, e, N, K), e * stride);
  args.expert_stride = stride;
  (is_up ? args.x_token_R : args.d_y_token_R) = layer.rows();
  run_on(device, grouped_wgrad, args);
  return d_w;
}

// D2: the layer run on a batch made of the named rows of `whole` (weights given, rows permuted);
// each row's result bits.
inline std::vector<std::vector<std::byte>> bits_of_batch(const ExpertLayer& whole,
                                                         const std::vector<int64_t>& rows,
                                                         Device device) {
  // Rows of a batch are sorted by expert; `order` remembers where each one went.
  std::vector<size_t> order(rows.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return whole.c.expert_of(rows[a]) < whole.c.expert_of(rows[b]);
  });
  GroupedCase part{std::vector<int64_t>(whole.c.rows.size()), whole.c.D, whole.c.F};
  for (const int64_t row : rows) ++part.rows[whole.c.expert_of(row)];
  ExpertLayer layer(part, 13, whole.kind);
  layer.w_up = whole.w_up;
  layer.w_down = whole.w_down;
  for (size_t i = 0; i < rows.size(); ++i) {
    const int64_t to = static_cast<int64_t>(i), from = rows[order[i]], D = whole.c.D;
    layer.weight.set(to, whole.weight.at(from));
    for (int64_t d = 0; d < D; ++d) {
      layer.x.set(to * D + d, whole.x.at(from * D + d));
      layer.d_y.set(to * D + d, whole.d_y.at(from * D + d));
    }
  }
  layer.run(RowWeights::given, 2, device);
  std::vector<std::vector<std::byte>> sorted, result(rows.size());
  for (const TestTensor* tensor : layer.results()) append_row_bits(*tensor, sorted);
  for (size_t i = 0; i < rows.size(); ++i) result[order[i]] = sorted[i];
  return result;
}

// The values of rows `token` of a tensor [T, columns].
inline std::vector<double> picked_rows(const TestTensor& from, const TestTensor& token) {
  const int64_t columns = from.shape()[1];
  std::vector<double> rows(static_cast<size_t>(token.elements() * columns));
  for (int64_t i = 0; i < std::ssize(rows); ++i) {
    rows[i] = from.at(static_cast<int64_t>(token.at(i / columns)) * columns + i % columns);
  }
  return rows;
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
            TestTensor& present, int threads, Device device = Device::cpu) const {
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
    run_on(device, grouped_wgrad, args, threads);
  }
  // Every expert's total after calls over `ranges`, in order; empty when absent.
  std::vector<std::vector<float>> run(const std::vector<std::pair<int64_t, int64_t>>& ranges,
                                      int threads, Device device = Device::cpu) const {
    const int64_t S = 2 * total_blocks, stride = N * K + 7;
    TestTensor slots(Shape(S, e * stride)), present(Shape(S, e), DType::u8);
    Forest forest(total_blocks, S);
    for (const auto& range : ranges) {
      TestTensor table = forest.plan_call(range.first, range.second);
      call(table, range, slots, present, threads, device);
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

}  // namespace cambium::test
