// SwiGLU as an op of its own (kernels/swiglu.h), for recomputation; rows in parallel.
#include "kernels/swiglu.h"

#include <algorithm>

#include "reference/rounding.h"
#include "reference/swiglu_row.h"

namespace cambium::reference {

namespace {

constexpr int64_t kChunkElements = 16384;  // about 10 us of exponentials

int64_t rows_per_chunk(int64_t F) {
  return std::max<int64_t>(1, kChunkElements / std::max<int64_t>(F, 1));
}

}  // namespace

void swiglu(const SwigluArgs& a, Workers& workers) {
  const int64_t R = a.h_RF[0], F = a.h_RF[1], step = rows_per_chunk(F);
  const ReadF32 gate_up(a.gate_up_RN);
  const WriteF32 h(a.h_RF);
  workers.parallel_for((R + step - 1) / step, [&](int64_t chunk, Scratch&) {
    for (int64_t row = chunk * step; row < std::min(R, (chunk + 1) * step); ++row) {
      swiglu_row(gate_up.row(row), gate_up.row(row) + F, h.row(row), F);
    }
  });
}

void swiglu_backward(const SwigluBackwardArgs& a, Workers& workers) {
  const int64_t R = a.d_h_RF[0], F = a.d_h_RF[1], step = rows_per_chunk(F);
  const ReadF32 gate_up(a.gate_up_RN), d_h(a.d_h_RF);
  const WriteF32 d_gate_up(a.d_gate_up_RN);
  workers.parallel_for((R + step - 1) / step, [&](int64_t chunk, Scratch&) {
    for (int64_t row = chunk * step; row < std::min(R, (chunk + 1) * step); ++row) {
      swiglu_backward_row(gate_up.row(row), gate_up.row(row) + F, d_h.row(row), d_gate_up.row(row),
                          d_gate_up.row(row) + F, F);
    }
  });
}

}  // namespace cambium::reference
