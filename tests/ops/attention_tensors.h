// Tensors of an attention case, for its parity tests.
#pragma once

#include "tests/ops/attention_cases.h"
#include "tests/ops/cuda_test.h"

namespace cambium::test {

struct AttentionTensors {
  AttentionTensors(const AttentionCase& shape, InputFamily family, DType dtype = DType::f32)
      : c(shape),
        scale(family == InputFamily::integers ? 0.5f : 1.0f / std::sqrt(static_cast<float>(c.Q))),
        q(Shape(c.T(), c.H, c.Q), dtype, (c.H + 2 * c.G) * c.Q),
        k(Shape(c.T(), c.G, c.Q), dtype),
        v(Shape(c.T(), c.G, c.Q), dtype, (c.H + 2 * c.G) * c.Q),
        document_start(Shape(c.T()), DType::i32),
        o(Shape(c.T(), c.H, c.Q), dtype),
        lse(Shape(c.T(), c.H)),
        d_o(Shape(c.T(), c.H, c.Q), dtype),
        d_q(Shape(c.T(), c.H, c.Q), dtype, (c.H + 2 * c.G) * c.Q),
        d_k(Shape(c.T(), c.G, c.Q), dtype, (c.H + 2 * c.G) * c.Q),
        d_v(Shape(c.T(), c.G, c.Q), dtype),
        delta(Shape(c.T(), c.H)) {
    TestRandom random(static_cast<uint64_t>(c.T() * 1000 + c.Q));
    for (TestTensor* tensor : {&q, &k, &v, &d_o}) tensor->fill_family(random, family);
    for (int64_t t = 0; t < c.T(); ++t) {
      const int64_t mean = c.documents == Documents::long_ones ? 150 : 13;
      const bool begins = t % c.S == 0 || c.documents == Documents::lengths_of_one ||
                          random.integer(0, mean - 1) == 0;
      document_start.set(t, begins ? t : document_start.at(t - 1));
    }
  }
  AttentionArgs forward_args() {
    AttentionArgs args{.q_THQ = q.in<Real>(),
                       .k_TGQ = k.in<Real>(),
                       .v_TGQ = v.in<Real>(),
                       .o_THQ = o.out<Real>(),
                       .lse_TH = lse.out<float>(),
                       .sequence_length = c.S,
                       .block_tokens = c.block_tokens,
                       .scale = scale};
    if (c.documents != Documents::absent) args.document_start_T = document_start.in<int32_t>();
    return args;
  }
  AttentionBackwardArgs backward_args() {
    AttentionBackwardArgs args{.q_THQ = q.in<Real>(),
                               .k_TGQ = k.in<Real>(),
                               .v_TGQ = v.in<Real>(),
                               .o_THQ = o.in<Real>(),
                               .d_o_THQ = d_o.in<Real>(),
                               .lse_TH = lse.in<float>(),
                               .d_q_THQ = d_q.out<Real>(),
                               .d_k_TGQ = d_k.out<Real>(),
                               .d_v_TGQ = d_v.out<Real>(),
                               .delta_TH = delta.out<float>(),
                               .sequence_length = c.S,
                               .block_tokens = c.block_tokens,
                               .scale = scale};
    if (c.documents != Documents::absent) args.document_start_T = document_start.in<int32_t>();
    return args;
  }
  void forward(int threads = 2) { run_op(attention, forward_args(), threads); }
  void backward(int threads = 2) { run_op(attention_backward, backward_args(), threads); }
  void cuda_both() {
    run_cuda_op(attention, forward_args());
    run_cuda_op(attention_backward, backward_args());
  }
  AttentionValues values() const {
    AttentionValues in{q.values(), k.values(), v.values(), {}};
    if (c.documents != Documents::absent) in.document_start = document_start.values();
    return in;
  }
  AttentionCase c;
  float scale;
  TestTensor q, k, v, document_start, o, lse, d_o, d_q, d_k, d_v, delta;
};

inline std::vector<std::byte> all_bits(const AttentionTensors& t) {
  std::vector<std::byte> bits = t.o.bits();
  for (const TestTensor* tensor : {&t.lse, &t.d_q, &t.d_k, &t.d_v}) {
    const std::vector<std::byte> more = tensor->bits();
    bits.insert(bits.end(), more.begin(), more.end());
  }
  return bits;
}

// Copies rows [from_row, from_row + T) of a tensor of the same row width.
inline void copy_rows(const TestTensor& from, int64_t from_row, TestTensor& to,
                      double shift = 0.0) {
  const int64_t width = to.shape().row_elements();
  for (int64_t i = 0; i < to.elements(); ++i) to.set(i, from.at(from_row * width + i) + shift);
}

inline AttentionTensors one_sequence(const AttentionTensors& all, int64_t sequence) {
  AttentionCase c = all.c;
  c.sequences = 1;
  AttentionTensors alone(c, InputFamily::normals, all.q.dtype());
  const int64_t row = sequence * c.S;
  copy_rows(all.q, row, alone.q);
  copy_rows(all.k, row, alone.k);
  copy_rows(all.v, row, alone.v);
  copy_rows(all.d_o, row, alone.d_o);
  copy_rows(all.document_start, row, alone.document_start, -static_cast<double>(row));
  return alone;
}

}  // namespace cambium::test
