// Buffers of the conformance suite: elements between guard bands, and what each rank sends.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <memory>
#include <vector>

#include "src/base/view.h"
#include "src/base/workers.h"
#include "tests/comm/conformance.h"

namespace cambium::conformance {

constexpr int64_t kGuardBytes = 64;
constexpr uint8_t kGuard = 0xa5;
constexpr int64_t kChunkElements = 1 << 18;  // of filling and comparing, which run on all workers

inline void store(DType dtype, void* data, int64_t index, int64_t value) {
  switch (dtype) {
    case DType::f32:
      static_cast<float*>(data)[index] = static_cast<float>(value);
      return;
    case DType::bf16:
      static_cast<uint16_t*>(data)[index] =
          static_cast<uint16_t>(std::bit_cast<uint32_t>(static_cast<float>(value)) >> 16);
      return;
    case DType::i32:
      static_cast<int32_t*>(data)[index] = static_cast<int32_t>(value);
      return;
    case DType::i64:
      static_cast<int64_t*>(data)[index] = value;
      return;
    case DType::u8:
      static_cast<uint8_t*>(data)[index] = static_cast<uint8_t>(value);
      return;
  }
}

inline double load(DType dtype, const void* data, int64_t index) {
  switch (dtype) {
    case DType::f32:
      return static_cast<const float*>(data)[index];
    case DType::bf16:
      return std::bit_cast<float>(uint32_t{static_cast<const uint16_t*>(data)[index]} << 16);
    case DType::i32:
      return static_cast<const int32_t*>(data)[index];
    case DType::i64:
      return static_cast<double>(static_cast<const int64_t*>(data)[index]);
    case DType::u8:
      return static_cast<const uint8_t*>(data)[index];
  }
  return 0;
}

// Calls body(i) for i in [0, count), in chunks.
template <class Body>
void for_elements(Workers& workers, int64_t count, const Body& body) {
  const int64_t chunks = (count + kChunkElements - 1) / kChunkElements;
  workers.parallel_for(chunks, [&](int64_t chunk, Scratch&) {
    const int64_t end = std::min(count, (chunk + 1) * kChunkElements);
    for (int64_t i = chunk * kChunkElements; i < end; ++i) body(i);
  });
}

// What `rank` sends at `index`: 0 .. 16, so that eight ranks' sums are exact in bf16 and u8.
inline int64_t value_of(int64_t rank, int64_t index, int64_t salt) {
  return (rank * 5 + index * 3 + index / 17 + salt * 7) % 17;
}

// Elements between guard bands, with a mirror on the host; `fetch` finds writes outside.
class Block {
 public:
  Block(Workers& workers, const Memory& memory, DType dtype, int64_t count)
      : workers_(workers),
        memory_(memory),
        dtype_(dtype),
        bytes_(count * dtype_bytes(dtype)),
        mirror_(static_cast<size_t>(bytes_ + 2 * kGuardBytes), kGuard),
        base_(memory_.allocate(std::ssize(mirror_))) {
    memory_.copy(mirror_.data(), base_.get(), std::ssize(mirror_));
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  void* data(int64_t index = 0) const { return device(index); }
  void fill(int64_t first, int64_t count, int64_t rank, int64_t salt) {
    uint8_t* values = mirror_.data() + offset(first);
    for_elements(workers_, count,
                 [&](int64_t i) { store(dtype_, values, i, value_of(rank, i, salt)); });
    memory_.copy(values, device(first), count * dtype_bytes(dtype_));
  }
  // Brings the mirror up to date; false when something was written outside the elements.
  bool fetch() {
    memory_.copy(base_.get(), mirror_.data(), std::ssize(mirror_));
    for (int64_t i = 0; i < kGuardBytes; ++i) {
      const size_t front = static_cast<size_t>(i);
      if (mirror_[front] != kGuard || mirror_[mirror_.size() - 1 - front] != kGuard) return false;
    }
    return true;
  }
  double at(int64_t index) const { return load(dtype_, elements(), index); }
  const uint8_t* elements() const { return mirror_.data() + kGuardBytes; }
  int64_t bytes() const { return bytes_; }

 private:
  uint8_t* device(int64_t index) const {
    return static_cast<uint8_t*>(base_.get()) + offset(index);
  }
  int64_t offset(int64_t index) const { return kGuardBytes + index * dtype_bytes(dtype_); }

  Workers& workers_;
  Memory memory_;
  DType dtype_;
  int64_t bytes_;
  std::vector<uint8_t> mirror_;
  std::shared_ptr<void> base_;
};

}  // namespace cambium::conformance
