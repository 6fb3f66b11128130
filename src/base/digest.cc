#include "src/base/digest.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <vector>

#include "src/base/check.h"
#include "xxhash.h"

namespace cambium {

namespace {

Digest128 from_xxh(XXH128_hash_t hash) { return {hash.low64, hash.high64}; }

// The seed of one block: both numbers hashed, so that neighbours share nothing.
uint64_t block_seed(uint64_t tensor, int64_t block) {
  const uint64_t words[2] = {tensor, static_cast<uint64_t>(block)};
  return XXH3_64bits(words, sizeof(words));
}

}  // namespace

std::string Digest128::hex() const { return fmt::format("{:016x}{:016x}", high, low); }

uint64_t tensor_id(std::string_view canonical_name) {
  return XXH3_64bits(canonical_name.data(), canonical_name.size());
}

Digest128 digest_blocks(const float* data, int64_t element_count, uint64_t tensor,
                        int64_t first_block) {
  Digest128 sum;
  for (int64_t start = 0; start < element_count; start += kDigestBlockElements) {
    const int64_t count = std::min(kDigestBlockElements, element_count - start);
    const uint64_t seed = block_seed(tensor, first_block + start / kDigestBlockElements);
    sum += from_xxh(XXH3_128bits_withSeed(data + start, static_cast<size_t>(count) * 4, seed));
  }
  return sum;
}

uint64_t xxh3_64(const void* data, size_t byte_count) { return XXH3_64bits(data, byte_count); }

Digest128 xxh3_128(const void* data, size_t byte_count) {
  return from_xxh(XXH3_128bits(data, byte_count));
}

struct Xxh3Stream::State {
  XXH3_state_t* xxh = nullptr;
};

Xxh3Stream::Xxh3Stream() : state_(std::make_unique<State>()) {
  state_->xxh = XXH3_createState();
  CHECK(state_->xxh != nullptr);
  CHECK(XXH3_128bits_reset(state_->xxh) == XXH_OK);
}

Xxh3Stream::~Xxh3Stream() { XXH3_freeState(state_->xxh); }

void Xxh3Stream::update(const void* data, size_t byte_count) {
  CHECK(XXH3_128bits_update(state_->xxh, data, byte_count) == XXH_OK);
}

Digest128 Xxh3Stream::digest() const { return from_xxh(XXH3_128bits_digest(state_->xxh)); }

Digest128 xxh3_128_of_file(const std::string& path) {
  struct CloseFile {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  const std::unique_ptr<std::FILE, CloseFile> file(std::fopen(path.c_str(), "rb"));
  if (file == nullptr) fail(ExitCode::io, "cannot open '{}': {}", path, std::strerror(errno));
  Xxh3Stream stream;
  std::vector<char> buffer(size_t{1} << 20);
  size_t read = 0;
  while ((read = std::fread(buffer.data(), 1, buffer.size(), file.get())) > 0) {
    stream.update(buffer.data(), read);
  }
  if (std::ferror(file.get()) != 0) {
    fail(ExitCode::io, "cannot read '{}': {}", path, std::strerror(errno));
  }
  return stream.digest();
}

}  // namespace cambium
