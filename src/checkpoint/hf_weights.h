// Hugging Face weights <-> canonical tensors: names, slices, import and export.
//
// Canonical tensors fuse what Hugging Face keeps apart (q, k, v; gate, up) and keep apart what it
// may fuse (experts), so the mapping is a list of slices: elements [hf_first, hf_first + elements)
// of a file's tensor are elements [first, first + elements) of a canonical one, in order. No slice
// transposes or permutes anything.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "src/base/io.h"
#include "src/checkpoint/hf_config.h"
#include "src/checkpoint/safetensors.h"
#include "src/checkpoint/tensor_source.h"
#include "src/config/config.h"
#include "src/model/tensors.h"

namespace cambium {

// How experts are named: as files hold them (model.layers.0.mlp.experts.3.gate_proj.weight), or
// as transformers 5 holds them in memory ([E,2F,D] model.layers.0.mlp.experts.gate_up_proj).
enum class HfSpelling { per_expert, fused };

struct HfTensor {
  std::string hf_name;
  std::vector<int64_t> shape;  // of the whole Hugging Face tensor
  int64_t hf_first_element = 0;
  std::string canonical_name;
  int64_t first_element = 0;  // within the canonical tensor
  int64_t elements = 0;
};

// Every slice of `model`, in canonical order. Fused tensors appear once per expert.
std::vector<HfTensor> hf_tensors(const ModelConfig& model, HfSpelling spelling);

// Canonical tensors read from a Hugging Face directory, either spelling, f32, f16 or bf16.
class HfWeights : public TensorSource {
 public:
  // Opens and checks all names and shapes against `model`: a missing tensor or another shape exits
  // 30; a tensor that the model has no place for exits 2, so that nothing is dropped in silence.
  HfWeights(FileSystem& files, const std::string& directory, const ModelConfig& model);
  // The same slices of any open file whose names carry `prefix` ("grad/" in golden files).
  HfWeights(SafetensorsReader reader, const ModelConfig& model, const std::string& prefix);
  void read(const std::string& name, int64_t first, std::span<float> values) override;
  SafetensorsReader& file() { return reader_; }

 private:
  void index(const ModelConfig& model, const std::string& prefix);
  void refuse_extra_tensors(const ModelConfig& model) const;

  SafetensorsReader reader_;
  std::map<std::string, std::vector<HfTensor>> slices_;  // by canonical name, ascending first
};

// Writes config.json and model.safetensors (per-expert names) into `directory`, which is created.
// transformers loads the result unchanged. The weights come first, config.json last.
void export_hf(FileSystem& files, const ModelConfig& model, TensorSource& source, HfStorage storage,
               const std::string& directory);

}  // namespace cambium
