// fp32 access to `Real` tensors: a view of fp32 storage is used in place, bf16 storage is widened
// on entry and rounded to nearest-even where the CUDA kernel stores.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

#include "src/base/view.h"

namespace cambium::reference {

inline float bf16_to_f32(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

inline uint16_t f32_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float round_to_bf16(float value) { return bf16_to_f32(f32_to_bf16(value)); }

// Read access: `data` with `stride` elements between `count` rows.
class ReadF32 {
 public:
  explicit ReadF32(const RawView& view) : stride(view.row_stride) {
    if (view.empty()) return;
    count = view.shape[0];
    if (view.dtype == DType::f32) {
      data = static_cast<const float*>(view.data);
      return;
    }
    CHECK(view.dtype == DType::bf16);
    const auto* bits = static_cast<const uint16_t*>(view.data);
    const int64_t columns = view.shape.row_elements();
    copy_.resize(static_cast<size_t>(count * columns));
    for (int64_t row = 0; row < count; ++row) {
      for (int64_t column = 0; column < columns; ++column) {
        copy_[row * columns + column] = bf16_to_f32(bits[row * view.row_stride + column]);
      }
    }
    data = copy_.data();
    stride = columns;
  }
  const float* data = nullptr;
  int64_t stride = 0;
  int64_t count = 0;
  const float* row(int64_t index) const { return data + index * stride; }

 private:
  std::vector<float> copy_;
};

// Write access: the destructor rounds into bf16 storage. For read_write views the contents are
// widened first.
class WriteF32 {
 public:
  explicit WriteF32(const RawView& view) : stride(view.row_stride), view_(view) {
    if (view.empty()) return;
    if (view.dtype == DType::f32) {
      data = static_cast<float*>(view.data);
      return;
    }
    CHECK(view.dtype == DType::bf16);
    stride = view.shape.row_elements();
    copy_.resize(static_cast<size_t>(view.shape[0] * stride));
    if (view.access == Access::read_write) {
      const ReadF32 current(view);
      for (size_t i = 0; i < copy_.size(); ++i) copy_[i] = current.data[i];
    }
    data = copy_.data();
  }
  WriteF32(const WriteF32&) = delete;
  WriteF32& operator=(const WriteF32&) = delete;
  ~WriteF32() {
    if (copy_.empty()) return;
    auto* bits = static_cast<uint16_t*>(view_.data);
    for (int64_t row = 0; row < view_.shape[0]; ++row) {
      for (int64_t column = 0; column < stride; ++column) {
        bits[row * view_.row_stride + column] = f32_to_bf16(copy_[row * stride + column]);
      }
    }
  }
  float* data = nullptr;
  int64_t stride = 0;
  float* row(int64_t index) const { return data + index * stride; }

 private:
  RawView view_;
  std::vector<float> copy_;
};

}  // namespace cambium::reference
