#include "kernels/adamw.h"

#include <bit>
#include <cmath>

#include "reference/chunks.h"
#include "reference/rounding.h"

namespace cambium::reference {

namespace {

constexpr int64_t kBlocksPerUpdate = 2;  // 128 KiB of operands; an expert has several

// Coefficients rounded once from fp64.
struct AdamwCoefficients {
  float scale, decay, one_minus_beta1, beta2, one_minus_beta2, root_correction2, epsilon, step;
};

AdamwCoefficients coefficients(const AdamwArgs& a, float scale) {
  return {scale,
          static_cast<float>(1.0 - a.lr * a.weight_decay),
          static_cast<float>(1.0 - a.beta1),
          static_cast<float>(a.beta2),
          static_cast<float>(1.0 - a.beta2),
          static_cast<float>(std::sqrt(a.bias_correction2)),
          static_cast<float>(a.epsilon),
          static_cast<float>(a.lr / a.bias_correction1)};
}

uint32_t mix(uint32_t x) {  // lowbias32 (Wellons), a bijection
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// 16 bits for m, then 16 for v; `key` is dither_key's.
uint32_t adamw_dither(uint32_t key, uint32_t element) { return mix(key ^ element * 0x9e3779b9u); }
uint32_t dither_key(int64_t step, int32_t canonical_block) {
  return mix(mix(static_cast<uint32_t>(step)) + static_cast<uint32_t>(canonical_block));
}

float moment(const float* stored) { return *stored; }
float moment(const uint16_t* stored) { return bf16_to_f32(*stored); }
void store_moment(float* to, float value, uint32_t) { *to = value; }
void store_moment(uint16_t* to, float value, uint32_t dither) {
  *to = static_cast<uint16_t>((std::bit_cast<uint32_t>(value) + dither) >> 16);
}

// Elements of one block from its begin on.
template <class Moment>
void update_block(const AdamwCoefficients& c, uint32_t key, int64_t count,
                  const float* __restrict grad, float* __restrict param, Moment* __restrict m,
                  Moment* __restrict v) {
  for (int64_t i = 0; i < count; ++i) {
    const float g = grad[i] * c.scale;
    const float m_old = moment(m + i);
    const float m_new = m_old + c.one_minus_beta1 * (g - m_old);
    const float v_new = moment(v + i) * c.beta2 + c.one_minus_beta2 * g * g;
    const float denominator = std::sqrt(v_new) / c.root_correction2 + c.epsilon;
    param[i] = param[i] * c.decay - c.step * m_new / denominator;
    const uint32_t dither = adamw_dither(key, static_cast<uint32_t>(i));
    store_moment(m + i, m_new, dither & 0xffffu);
    store_moment(v + i, v_new, dither >> 16);
  }
}

void copy_range(const AdamwArgs& a, int64_t begin, int64_t end) {
  const float* param = a.param_N.pointer();
  if (a.compute_N.dtype == DType::f32) {
    std::copy(param + begin, param + end, static_cast<float*>(a.compute_N.data) + begin);
    return;
  }
  auto* bits = static_cast<uint16_t*>(a.compute_N.data);
  for (int64_t i = begin; i < end; ++i) bits[i] = f32_to_bf16(param[i]);
}

}  // namespace

void adamw(const AdamwArgs& a, Workers& workers) {
  const float scale = a.scale_1.pointer()[0];
  if (scale != scale) return;  // NaN: no update
  const AdamwCoefficients decaying = coefficients(a, scale);
  AdamwCoefficients constant = decaying;
  constant.decay = 1;
  for_ranges(workers, a.table.block_BC[0], kBlocksPerUpdate, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int32_t* block = a.table.block_BC.pointer() + b * kBlockColumns;
      const int64_t first = b * kTableBlockElements, count = block[kBlockElements];
      if (count == 0) continue;
      CHECK(count <= kTableBlockElements && first + count <= a.param_N[0]);
      const uint32_t key = dither_key(a.step, block[kBlockCanonical]);
      const auto update = [&]<class Moment>(Moment*) {
        update_block(block[kBlockDecays] != 0 ? decaying : constant, key, count,
                     a.grad_N.pointer() + first, a.param_N.pointer() + first,
                     static_cast<Moment*>(a.m_N.data) + first,
                     static_cast<Moment*>(a.v_N.data) + first);
      };
      if (a.m_N.dtype == DType::bf16) {
        update(static_cast<uint16_t*>(nullptr));
      } else {
        update(static_cast<float*>(nullptr));
      }
      if (!a.compute_N.empty()) copy_range(a, first, first + count);
    }
  });
}

}  // namespace cambium::reference
