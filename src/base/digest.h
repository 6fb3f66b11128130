// XXH3 digests: of parameters (design.md section 3), of buffers and of files.
//
// A canonical tensor is cut into blocks of 4,096 elements; each block's bytes are hashed to 128
// bits under a seed made from (tensor id, block number), and the hashes are summed mod 2^128. So
// shards digest the blocks they hold, and the sums add up to the same value for any layout.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace cambium {

// Elements of a digest block. Shards, digests and the gradient norm cut on the same blocks.
constexpr int64_t kDigestBlockElements = 4096;

struct Digest128 {
  uint64_t low = 0;
  uint64_t high = 0;

  // Sum mod 2^128.
  Digest128& operator+=(const Digest128& other) {
    low += other.low;
    high += other.high + (low < other.low ? 1 : 0);
    return *this;
  }
  auto operator<=>(const Digest128&) const = default;
  // 32 lowercase hexadecimal digits, most significant first.
  std::string hex() const;
};

// The number of a canonical tensor in digests and in the init stream: XXH3-64 of its name.
uint64_t tensor_id(std::string_view canonical_name);

// The digest of `element_count` fp32 elements that start on block `first_block` of the tensor; only
// the tensor's last block may be short.
Digest128 digest_blocks(const float* data, int64_t element_count, uint64_t tensor,
                        int64_t first_block);

uint64_t xxh3_64(const void* data, size_t byte_count);
Digest128 xxh3_128(const void* data, size_t byte_count);

// XXH3-128 of bytes that arrive in pieces.
class Xxh3Stream {
 public:
  Xxh3Stream();
  ~Xxh3Stream();
  Xxh3Stream(const Xxh3Stream&) = delete;
  Xxh3Stream& operator=(const Xxh3Stream&) = delete;
  void update(const void* data, size_t byte_count);
  Digest128 digest() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// XXH3-128 of a whole file, streamed. A file that cannot be read is an Error with exit code 31.
Digest128 xxh3_128_of_file(const std::string& path);

}  // namespace cambium
