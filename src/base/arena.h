// Arena: one rank's memory, accounted to the byte by class.
//
// Best fit with coalescing over address space reserved once; blocks are 256-byte aligned, so the
// same program order gives the same addresses and the same peak. Freeing returns a block at once in
// program order: reuse on the same stream is safe, reuse across streams needs the consumer's event.
// With poisoning a fresh block is filled with NaN, and a freed one is not reused before `reclaim`.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "src/base/view.h"

namespace cambium {

enum class MemoryClass { weights, gradients, optimizer, activations, workspace, communication };
constexpr int kMemoryClasses = 6;
const char* memory_class_name(MemoryClass memory_class);

enum class Poison { off, on };

class Arena;

// Owns one block of an arena; frees it in program order. Movable.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer() { reset(); }
  void reset();
  void* data() const { return data_; }
  int64_t size_bytes() const { return bytes_; }
  bool empty() const { return data_ == nullptr; }
  float* f32() const { return static_cast<float*>(data_); }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  friend class Arena;
  Arena* arena_ = nullptr;
  void* data_ = nullptr;
  int64_t bytes_ = 0;
  MemoryClass class_ = MemoryClass::activations;
};

class Arena {
 public:
  // `limit_bytes` is the planned share; exceeding it is an Error with exit code 40. `arenas` of this
  // process share its address space.
  Arena(int64_t limit_bytes, Poison poison, int64_t arenas = 1);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  Buffer allocate(int64_t bytes, MemoryClass memory_class, const char* what);
  // A tensor of `shape`: its buffer. Views are made by the caller.
  Buffer tensor(Shape shape, DType dtype, MemoryClass memory_class, const char* what) {
    return allocate(shape.elements() * dtype_bytes(dtype), memory_class, what);
  }
  // Poisoning: blocks freed since the last call become reusable. Call when the streams are idle.
  void reclaim();

  int64_t used_bytes() const { return used_; }
  int64_t used_bytes(MemoryClass memory_class) const;
  int64_t peak_bytes() const { return peak_; }
  // Bytes by class at the moment of the peak.
  std::array<int64_t, kMemoryClasses> peak_by_class() const { return peak_by_class_; }
  void reset_peak();

 private:
  friend class Buffer;
  void release(void* data, int64_t bytes, MemoryClass memory_class);
  void insert_free(int64_t offset, int64_t bytes);

  int64_t limit_;
  int64_t reserved_ = 0;
  Poison poison_;
  std::byte* base_ = nullptr;
  int64_t top_ = 0;                  // first never-used offset
  std::map<int64_t, int64_t> free_;  // offset -> bytes, coalesced
  std::vector<std::pair<int64_t, int64_t>> quarantine_;
  int64_t used_ = 0;
  int64_t peak_ = 0;
  std::array<int64_t, kMemoryClasses> by_class_{};
  std::array<int64_t, kMemoryClasses> peak_by_class_{};
};

}  // namespace cambium
