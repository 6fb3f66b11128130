// Arena: one rank's memory, accounted to the byte by class.
//
// Best fit with coalescing over address space reserved once (the host's, or a GPU's); blocks are
// 256-byte aligned, so the same program order gives the same addresses and the same peak. Freeing
// returns a block at once in program order: reuse on the same stream is safe, reuse across streams
// needs the consumer's event. With poisoning a fresh block is filled with NaN, and a freed one is
// not reused before `reclaim`.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "src/base/view.h"
#include "src/base/work_place.h"

namespace cambium {

enum class MemoryClass { weights, gradients, optimizer, activations, workspace, communication };
constexpr int kMemoryClasses = 6;
const char* memory_class_name(MemoryClass memory_class);

enum class Poison { off, on };

// Where an arena's blocks lie: reserved once, backed with memory as the arena grows.
class AddressSpace {
 public:
  virtual ~AddressSpace() = default;
  virtual std::byte* base() const = 0;
  virtual int64_t reserved_bytes() const = 0;
  // Makes [0, bytes) usable and returns how much of it is: less when memory is missing.
  virtual int64_t back(int64_t bytes) = 0;
  // Poison: `bytes` (a multiple of 4) of the 32-bit pattern `word`, done on return.
  virtual void fill(std::byte* data, int64_t bytes, uint32_t word) = 0;
};

// Pages of this process, which come on first touch; `sharers` arenas divide its addresses.
std::unique_ptr<AddressSpace> host_address_space(int64_t sharers = 1);

// Addresses without memory: for shape-only runs, whose ops touch nothing.
std::unique_ptr<AddressSpace> shape_only_address_space();

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
  // `limit_bytes` is the planned share; exceeding it is an Error with exit code 40.
  Arena(int64_t limit_bytes, Poison poison,
        std::unique_ptr<AddressSpace> space = host_address_space());
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
  // How far the address space was used: what a device must have, holes included.
  int64_t reserved_bytes() const { return top_; }
  // Where the program was at the peak, and what it asked for; `place` outlives the arena.
  void watch(const WorkPlace* place) { place_ = place; }
  const WorkPlace& peak_place() const { return peak_place_; }
  const char* peak_what() const { return peak_what_; }
  void reset_peak();
  // An injected fault: of the allocations from now on, number `allocation` (from 0) fails.
  void fail_at(int64_t allocation) { allocations_left_ = allocation; }

 private:
  friend class Buffer;
  void release(void* data, int64_t bytes, MemoryClass memory_class);
  void insert_free(int64_t offset, int64_t bytes);

  int64_t limit_;
  Poison poison_;
  std::unique_ptr<AddressSpace> space_;
  std::byte* base_ = nullptr;
  int64_t top_ = 0;                  // first never-used offset
  std::map<int64_t, int64_t> free_;  // offset -> bytes, coalesced
  std::vector<std::pair<int64_t, int64_t>> quarantine_;
  int64_t allocations_left_ = -1;
  int64_t used_ = 0;
  int64_t peak_ = 0;
  std::array<int64_t, kMemoryClasses> by_class_{};
  std::array<int64_t, kMemoryClasses> peak_by_class_{};
  const WorkPlace* place_ = nullptr;
  WorkPlace peak_place_;
  const char* peak_what_ = "";
};

}  // namespace cambium
