#include "src/base/arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

namespace cambium {

namespace {

constexpr int64_t kAlignment = 256;  // a GPU's coalescing unit and more than any vector load
// Address space only; pages come on first touch. A process has 2^47 bytes of it.
constexpr int64_t kReserve = int64_t{1} << 40;
constexpr int64_t kReserveOfAll = int64_t{1} << 46;
// From here on an arena asks for 2 MB pages: fewer page faults and address lookups; not before, so
// that hundreds of small simulated ranks hold no half-empty pages.
constexpr int64_t kHugePagesFrom = int64_t{16} << 20;
constexpr uint32_t kPoisonWord = 0x7fc0dead;  // a quiet NaN in fp32; its halves are NaN or huge

int64_t aligned(int64_t bytes) {
  return (std::max<int64_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
}

class HostAddressSpace final : public AddressSpace {
 public:
  explicit HostAddressSpace(int64_t sharers) {
    reserved_ = aligned(std::min(kReserve, kReserveOfAll / sharers));
    for (; reserved_ >= (int64_t{1} << 33); reserved_ /= 2) {
      void* base = mmap(nullptr, static_cast<size_t>(reserved_), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (base == MAP_FAILED) continue;
      base_ = static_cast<std::byte*>(base);
      return;
    }
    fail(ExitCode::out_of_memory, "cannot reserve address space for a rank's arena");
  }
  ~HostAddressSpace() override { munmap(base_, static_cast<size_t>(reserved_)); }
  std::byte* base() const override { return base_; }
  int64_t reserved_bytes() const override { return reserved_; }
  int64_t back(int64_t bytes) override {
    if (backed_ < kHugePagesFrom && bytes >= kHugePagesFrom) {
      madvise(base_, static_cast<size_t>(reserved_), MADV_HUGEPAGE);
    }
    backed_ = std::max(backed_, std::min(bytes, reserved_));
    return std::min(bytes, reserved_);
  }
  void fill(std::byte* data, int64_t bytes, uint32_t word) override {
    auto* words = reinterpret_cast<uint32_t*>(data);
    std::fill(words, words + bytes / 4, word);
  }

 private:
  std::byte* base_ = nullptr;
  int64_t reserved_ = 0, backed_ = 0;
};

class NoMemory final : public AddressSpace {
 public:
  // NOTE: never dereferenced; not null, which would mean an absent view.
  std::byte* base() const override { return reinterpret_cast<std::byte*>(uintptr_t{1} << 44); }
  int64_t reserved_bytes() const override { return INT64_MAX / 4; }
  int64_t back(int64_t bytes) override { return bytes; }
  void fill(std::byte*, int64_t, uint32_t) override {}
};

}  // namespace

std::unique_ptr<AddressSpace> shape_only_address_space() { return std::make_unique<NoMemory>(); }

std::unique_ptr<AddressSpace> host_address_space(int64_t sharers) {
  return std::make_unique<HostAddressSpace>(sharers);
}

const char* memory_class_name(MemoryClass memory_class) {
  constexpr const char* kNames[kMemoryClasses] = {"weights",     "gradients", "optimizer",
                                                  "activations", "workspace", "communication"};
  return kNames[static_cast<int>(memory_class)];
}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  if (this != &other) {
    reset();
    arena_ = std::exchange(other.arena_, nullptr);
    data_ = std::exchange(other.data_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
    class_ = other.class_;
  }
  return *this;
}

void Buffer::reset() {
  if (data_ != nullptr) arena_->release(data_, bytes_, class_);
  data_ = nullptr;
  bytes_ = 0;
}

Arena::Arena(int64_t limit_bytes, Poison poison, std::unique_ptr<AddressSpace> space)
    : limit_(limit_bytes), poison_(poison), space_(std::move(space)), base_(space_->base()) {}

Buffer Arena::allocate(int64_t bytes, MemoryClass memory_class, const char* what) {
  CHECK_GE(bytes, 0);
  const int64_t need = aligned(bytes);
  const auto out_of_memory = [&](int64_t limit) {
    fail(ExitCode::out_of_memory,
         "out of memory: '{}' ({}) needs {} bytes, {} of {} are in use; next: fewer "
         "train.micro_batch_sequences, or more ranks",
         what, memory_class_name(memory_class), bytes, used_, limit);
  };
  if (used_ + need > limit_) out_of_memory(limit_);
  if (allocations_left_ >= 0 && allocations_left_-- == 0) out_of_memory(used_);  // FAULT
  auto best = free_.end();
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    if (it->second >= need && (best == free_.end() || it->second < best->second)) best = it;
  }
  int64_t offset = top_;
  if (best != free_.end()) {
    offset = best->first;
    const int64_t rest = best->second - need;
    free_.erase(best);
    if (rest > 0) free_[offset + need] = rest;
  } else {
    const int64_t backed = space_->back(top_ + need);
    if (backed < top_ + need) out_of_memory(backed);
    top_ += need;
  }
  used_ += need;
  by_class_[static_cast<int>(memory_class)] += need;
  if (used_ > peak_) {
    peak_ = used_;
    peak_by_class_ = by_class_;
    peak_what_ = what;
    if (place_ != nullptr) peak_place_ = *place_;
  }
  if (poison_ == Poison::on) space_->fill(base_ + offset, need, kPoisonWord);
  Buffer buffer;
  buffer.arena_ = this;
  buffer.data_ = base_ + offset;
  buffer.bytes_ = bytes;
  buffer.class_ = memory_class;
  return buffer;
}

void Arena::release(void* data, int64_t bytes, MemoryClass memory_class) {
  const int64_t offset = static_cast<std::byte*>(data) - base_;
  const int64_t size = aligned(bytes);
  used_ -= size;
  by_class_[static_cast<int>(memory_class)] -= size;
  if (poison_ == Poison::on) {
    quarantine_.emplace_back(offset, size);
  } else {
    insert_free(offset, size);
  }
}

void Arena::insert_free(int64_t offset, int64_t bytes) {
  auto next = free_.lower_bound(offset);
  if (next != free_.end() && offset + bytes == next->first) {
    bytes += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    auto previous = std::prev(next);
    if (previous->first + previous->second == offset) {
      previous->second += bytes;
      return;
    }
  }
  free_[offset] = bytes;
}

void Arena::reclaim() {
  for (auto [offset, bytes] : quarantine_) insert_free(offset, bytes);
  quarantine_.clear();
}

int64_t Arena::used_bytes(MemoryClass memory_class) const {
  return by_class_[static_cast<int>(memory_class)];
}

void Arena::reset_peak() {
  peak_ = used_;
  peak_by_class_ = by_class_;
}

}  // namespace cambium
