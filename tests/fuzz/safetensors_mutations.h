// Mutated safetensors files: shared by the test suite's battery and the libFuzzer target.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "src/base/check.h"
#include "src/checkpoint/safetensors.h"

namespace cambium {

// Parses `bytes` as a file and checks what the reader promises about any file that it accepts:
// the tensors tile the data exactly, and each size follows from shape and type.
inline void check_safetensors_bytes(const std::string& bytes) {
  const std::vector<StoredTensor> tensors =
      parse_safetensors_header(bytes, static_cast<int64_t>(bytes.size()), "input");
  std::set<std::string> names;
  int64_t end = -1;
  for (const StoredTensor& tensor : tensors) {
    CHECK(names.insert(tensor.name).second);
    int64_t elements = 1;
    for (const int64_t extent : tensor.shape) elements *= extent;
    CHECK_EQ(elements, tensor.elements);
    CHECK_EQ(tensor.bytes, elements * stored_type_bytes(tensor.type));
    if (end >= 0) CHECK_EQ(tensor.file_offset, end);
    end = tensor.file_offset + tensor.bytes;
  }
  if (end >= 0) CHECK_EQ(end, static_cast<int64_t>(bytes.size()));
}

// A file around any header text.
inline std::string safetensors_bytes(const std::string& header, int64_t data_bytes) {
  const uint64_t header_bytes = header.size();
  std::string bytes(reinterpret_cast<const char*>(&header_bytes), 8);
  return bytes + header + std::string(static_cast<size_t>(data_bytes), '\x5a');
}

// A small valid file with several tensors and types, one of them empty.
inline std::string sample_safetensors() {
  return safetensors_bytes(R"({"__metadata__":{"format":"pt"},)"
                           R"("a.weight":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
                           R"("b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]},)"
                           R"("empty":{"dtype":"F32","shape":[0,7],"data_offsets":[32,32]},)"
                           R"("ids":{"dtype":"I64","shape":[],"data_offsets":[32,40]}})",
                           40);
}

// SplitMix64: any seed gives an independent stream.
class MutationRandom {
 public:
  explicit MutationRandom(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t mixed = state_ += 0x9e3779b97f4a7c15u;
    mixed = (mixed ^ mixed >> 30) * 0xbf58476d1ce4e5b9u;
    mixed = (mixed ^ mixed >> 27) * 0x94d049bb133111ebu;
    return mixed ^ mixed >> 31;
  }
  size_t below(size_t bound) { return bound == 0 ? 0 : next() % bound; }

 private:
  uint64_t state_;
};

// One of: byte flips, bytes set, truncation, appended bytes, swapped blocks, zeroed block, a block
// removed, a block repeated.
inline std::string mutate(std::string bytes, MutationRandom& random) {
  const uint64_t kind = random.next() % 8;
  const size_t at = random.below(bytes.size());
  const size_t length = std::min(1 + random.below(64), bytes.size() - at);
  switch (kind) {
    case 0:
      bytes[at] = static_cast<char>(bytes[at] ^ (1 << random.below(8)));
      break;
    case 1:
      for (int i = 0; i < 4; ++i)
        bytes[random.below(bytes.size())] = static_cast<char>(random.next());
      break;
    case 2:
      bytes.resize(at);
      break;
    case 3:
      bytes.append(1 + random.below(16), static_cast<char>(random.next()));
      break;
    case 4: {
      const size_t other = random.below(bytes.size() - length + 1);
      for (size_t i = 0; i < length; ++i) std::swap(bytes[at + i], bytes[other + i]);
      break;
    }
    case 5:
      bytes.replace(at, length, length, '\0');
      break;
    case 6:
      bytes.erase(at, length);
      break;
    default:
      bytes.insert(at, bytes.substr(at, length));
      break;
  }
  return bytes;
}

}  // namespace cambium
