// A small training state in any layout, for the checkpoint tests: values follow from a formula, so
// that every read can be compared to the bit.
#pragma once

#include <bit>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "src/checkpoint/checkpoint.h"

namespace cambium {

struct SampleTensor {
  const char* name;
  int64_t elements;
};

constexpr SampleTensor kSampleTensors[] = {
    {"embed", 9000},    {"layers.0.qkv", 5000}, {"layers.0.experts.1.down", 4096},
    {"final_norm", 16}, {"m/embed", 9000},      {"v/embed", 9000},
};

// Any finite or odd bit pattern may be stored: the bits are what counts.
inline float sample_value(const std::string& name, int64_t step, int64_t i) {
  uint64_t hash = 0xcbf29ce484222325u + static_cast<uint64_t>(step);
  for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  hash = (hash ^ static_cast<uint64_t>(i)) * 0x9e3779b97f4a7c15u;
  return std::bit_cast<float>(static_cast<uint32_t>(hash >> 32) & 0xbf7fffffu);
}

// The pieces of one rank when every tensor is cut evenly, with the values they point to.
struct SamplePieces {
  std::deque<std::vector<float>> values;
  std::vector<ShardPiece> pieces;
};

inline SamplePieces sample_pieces(int64_t step, int64_t rank, int64_t ranks) {
  SamplePieces sample;
  for (const SampleTensor& tensor : kSampleTensors) {
    const int64_t first = tensor.elements * rank / ranks;
    const int64_t end = tensor.elements * (rank + 1) / ranks;
    if (first == end) continue;
    std::vector<float>& values = sample.values.emplace_back();
    for (int64_t i = first; i < end; ++i) values.push_back(sample_value(tensor.name, step, i));
    sample.pieces.push_back({.name = tensor.name,
                             .first_element = first,
                             .elements = end - first,
                             .total_elements = tensor.elements,
                             .data = values.data()});
  }
  return sample;
}

inline CheckpointState sample_state(int64_t step) {
  CheckpointState state;
  state.step = step;
  state.seed = 0xfedcba9876543210u;
  state.config = "[train]\nsteps = 20 # \"quoted\" \xc3\xa9\n";
  state.layout = "dp 2";
  state.integers = {{"cursor.epoch", step / 7}, {"cursor.position", -step}};
  state.integer_arrays = {{"balance.counts", {1, 2, INT64_MAX, step}}, {"empty", {}}};
  state.float_arrays = {{"router.bias", {0.1, -1e-310, 5e300, static_cast<double>(step) / 3}}};
  return state;
}

inline void save_sample(FileSystem& files, const std::string& directory, int64_t step,
                        int64_t ranks) {
  for (int64_t rank = 0; rank < ranks; ++rank) {
    const SamplePieces sample = sample_pieces(step, rank, ranks);
    write_checkpoint_shard(
        files, {.directory = directory, .step = step, .rank = rank, .ranks = ranks}, sample.pieces);
  }
  commit_checkpoint(files, directory, ranks, sample_state(step));
}

// Every state field and every element of every tensor is what `save_sample` wrote.
inline bool is_sample(CheckpointReader& reader, int64_t step) {
  if (!(reader.state() == sample_state(step))) return false;
  if (reader.tensors().size() != std::size(kSampleTensors)) return false;
  for (const SampleTensor& tensor : kSampleTensors) {
    std::vector<float> values(static_cast<size_t>(tensor.elements));
    reader.read(tensor.name, 0, values);
    for (int64_t i = 0; i < tensor.elements; ++i) {
      if (std::bit_cast<uint32_t>(values[static_cast<size_t>(i)]) !=
          std::bit_cast<uint32_t>(sample_value(tensor.name, step, i))) {
        return false;
      }
    }
  }
  return true;
}

}  // namespace cambium
