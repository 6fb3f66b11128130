#include "src/checkpoint/hf_weights.h"

#include <algorithm>
#include <set>

#include "src/base/check.h"
#include "src/model/hf_family.h"

namespace cambium {
namespace {

constexpr int64_t kElementsPerRead = int64_t{4} << 20;
constexpr const char* kLmHead = "lm_head.weight";

int64_t product(const std::vector<int64_t>& shape) {
  int64_t elements = 1;
  for (const int64_t extent : shape) elements *= extent;
  return elements;
}

// Collects the slices of one canonical tensor after another.
class SliceList {
 public:
  // A whole Hugging Face tensor that is the next part of `canonical`.
  void add(const CanonicalTensor& canonical, std::string hf_name, std::vector<int64_t> shape) {
    const int64_t elements = product(shape);
    add_part(canonical, std::move(hf_name), std::move(shape), 0, elements);
  }
  // `elements` from `hf_first` of a Hugging Face tensor.
  void add_part(const CanonicalTensor& canonical, std::string hf_name, std::vector<int64_t> shape,
                int64_t hf_first, int64_t elements) {
    const bool continues = !slices_.empty() && slices_.back().canonical_name == canonical.name;
    const int64_t first = continues ? slices_.back().first_element + slices_.back().elements : 0;
    CHECK_LE(first + elements, canonical.elements());
    slices_.push_back({.hf_name = std::move(hf_name),
                       .shape = std::move(shape),
                       .hf_first_element = hf_first,
                       .canonical_name = canonical.name,
                       .first_element = first,
                       .elements = elements});
  }
  std::vector<HfTensor> take() { return std::move(slices_); }

 private:
  std::vector<HfTensor> slices_;
};

void add_expert(const ModelConfig& model, const CanonicalTensor& tensor, HfSpelling spelling,
                SliceList& slices) {
  const HfFamily& family = hf_family(model.family);
  const int64_t width = model.hidden;
  const int64_t inner = model.expert_hidden;
  const bool is_down = tensor.role == TensorRole::expert_down;
  if (spelling == HfSpelling::fused) {
    const std::string prefix = fmt::format("model.layers.{}.mlp.experts.", tensor.layer);
    const int64_t first = tensor.expert * tensor.elements();
    if (is_down) {
      slices.add_part(tensor, prefix + "down_proj", {model.experts, width, inner}, first,
                      tensor.elements());
    } else {
      slices.add_part(tensor, prefix + "gate_up_proj", {model.experts, 2 * inner, width}, first,
                      tensor.elements());
    }
    return;
  }
  const std::string prefix =
      fmt::format("model.layers.{}.{}.experts.{}.", tensor.layer, family.moe_block, tensor.expert);
  if (is_down) {
    slices.add(tensor, fmt::format("{}{}.weight", prefix, family.down), {width, inner});
  } else {
    slices.add(tensor, fmt::format("{}{}.weight", prefix, family.gate), {inner, width});
    slices.add(tensor, fmt::format("{}{}.weight", prefix, family.up), {inner, width});
  }
}

// q, k and v of a fused weight or bias: `shape` of one is its rows and, of a weight, the width.
void add_qkv(const ModelConfig& model, const CanonicalTensor& tensor, const char* suffix,
             SliceList& slices) {
  const char* const names[] = {"q_proj", "k_proj", "v_proj"};
  for (int part = 0; part < 3; ++part) {
    std::vector<int64_t> shape{(part == 0 ? model.heads : model.kv_heads) * model.head_dim};
    if (tensor.shape.rank == 2) shape.push_back(model.hidden);
    slices.add(tensor,
               fmt::format("model.layers.{}.self_attn.{}.{}", tensor.layer, names[part], suffix),
               shape);
  }
}

// The MLP of a dense layer, or the shared expert.
void add_mlp(const ModelConfig& model, const CanonicalTensor& tensor, SliceList& slices) {
  const HfFamily& family = hf_family(model.family);
  const bool shared =
      tensor.role == TensorRole::shared_gate_up || tensor.role == TensorRole::shared_down;
  const std::string prefix =
      fmt::format("model.layers.{}.mlp.{}", tensor.layer, shared ? "shared_expert." : "");
  const int64_t width = model.hidden;
  const int64_t inner = shared ? model.shared_expert_hidden : model.dense_hidden;
  if (tensor.role == TensorRole::mlp_down || tensor.role == TensorRole::shared_down) {
    return slices.add(tensor, fmt::format("{}{}.weight", prefix, family.down), {width, inner});
  }
  slices.add(tensor, fmt::format("{}{}.weight", prefix, family.gate), {inner, width});
  slices.add(tensor, fmt::format("{}{}.weight", prefix, family.up), {inner, width});
}

void add_slices(const ModelConfig& model, const CanonicalTensor& tensor, HfSpelling spelling,
                SliceList& slices) {
  const std::string prefix = fmt::format("model.layers.{}.", tensor.layer);
  const std::string attention = prefix + "self_attn.";
  std::vector<int64_t> shape;
  for (int i = 0; i < tensor.shape.rank; ++i) shape.push_back(tensor.shape[i]);
  switch (tensor.role) {
    case TensorRole::embed:
      return slices.add(tensor, "model.embed_tokens.weight", shape);
    case TensorRole::attn_norm:
      return slices.add(tensor, prefix + "input_layernorm.weight", shape);
    case TensorRole::qkv:
      return add_qkv(model, tensor, "weight", slices);
    case TensorRole::qkv_bias:
      return add_qkv(model, tensor, "bias", slices);
    case TensorRole::attn_out_bias:
      return slices.add(tensor, attention + "o_proj.bias", shape);
    case TensorRole::q_norm:
      return slices.add(tensor, attention + "q_norm.weight", shape);
    case TensorRole::k_norm:
      return slices.add(tensor, attention + "k_norm.weight", shape);
    case TensorRole::attn_out:
      return slices.add(tensor, attention + "o_proj.weight", shape);
    case TensorRole::mlp_norm:
      return slices.add(tensor, prefix + "post_attention_layernorm.weight", shape);
    case TensorRole::router: {
      const char* block = spelling == HfSpelling::fused ? "mlp" : hf_family(model.family).moe_block;
      return slices.add(tensor, fmt::format("{}{}.gate.weight", prefix, block), shape);
    }
    case TensorRole::expert_gate_up:
    case TensorRole::expert_down:
      return add_expert(model, tensor, spelling, slices);
    case TensorRole::mlp_gate_up:
    case TensorRole::mlp_down:
    case TensorRole::shared_gate_up:
    case TensorRole::shared_down:
      return add_mlp(model, tensor, slices);
    case TensorRole::shared_gate:
      return slices.add(tensor, prefix + "mlp.shared_expert_gate.weight", shape);
    case TensorRole::final_norm:
      return slices.add(tensor, "model.norm.weight", shape);
    case TensorRole::lm_head:
      return slices.add(tensor, kLmHead, shape);
  }
}

std::string show_shape(const std::vector<int64_t>& shape) {
  std::string text;
  for (const int64_t extent : shape) text += fmt::format("{}{}", text.empty() ? "" : ",", extent);
  return fmt::format("[{}]", text);
}

}  // namespace

std::vector<HfTensor> hf_tensors(const ModelConfig& model, HfSpelling spelling) {
  SliceList slices;
  for (const CanonicalTensor& tensor : canonical_tensors(model)) {
    add_slices(model, tensor, spelling, slices);
  }
  return slices.take();
}

HfWeights::HfWeights(FileSystem& files, const std::string& directory, const ModelConfig& model)
    : reader_(SafetensorsReader::open_directory(files, directory)) {
  index(model, "");
  refuse_extra_tensors(model);
}

HfWeights::HfWeights(SafetensorsReader reader, const ModelConfig& model, const std::string& prefix)
    : reader_(std::move(reader)) {
  index(model, prefix);
}

void HfWeights::index(const ModelConfig& model, const std::string& prefix) {
  bool fused = false;
  for (int64_t layer = 0; layer < model.layers; ++layer) {
    fused |=
        reader_.contains(fmt::format("{}model.layers.{}.mlp.experts.gate_up_proj", prefix, layer));
  }
  for (HfTensor& slice : hf_tensors(model, fused ? HfSpelling::fused : HfSpelling::per_expert)) {
    slice.hf_name = prefix + slice.hf_name;
    const StoredTensor& stored = reader_.at(slice.hf_name);
    if (stored.shape != slice.shape) {
      fail(ExitCode::corrupt_file, "'{}': tensor '{}' has shape {}, config.json makes it {}",
           reader_.where(), slice.hf_name, show_shape(stored.shape), show_shape(slice.shape));
    }
    const std::string name = slice.canonical_name;
    slices_[name].push_back(std::move(slice));
  }
}

void HfWeights::refuse_extra_tensors(const ModelConfig& model) const {
  std::set<std::string> wanted;
  for (const auto& [name, slices] : slices_) {
    for (const HfTensor& slice : slices) wanted.insert(slice.hf_name);
  }
  for (const auto& [name, stored] : reader_.tensors()) {
    // Tied files may repeat the embedding; old ones hold RoPE's constant frequencies.
    const bool harmless = (model.tie_embeddings && name == kLmHead) ||
                          name.ends_with(".self_attn.rotary_emb.inv_freq");
    if (!wanted.contains(name) && !harmless) {
      fail(ExitCode::usage,
           "'{}': tensor '{}' has no place in the model that config.json describes; it is not "
           "dropped in silence",
           reader_.where(), name);
    }
  }
}

void HfWeights::read(const std::string& name, int64_t first, std::span<float> values) {
  const auto found = slices_.find(name);
  CHECK(found != slices_.end());
  int64_t done = 0;
  const int64_t wanted = static_cast<int64_t>(values.size());
  for (const HfTensor& slice : found->second) {
    const int64_t begin = std::max(first + done, slice.first_element);
    const int64_t end = std::min(first + wanted, slice.first_element + slice.elements);
    if (begin >= end) continue;
    CHECK_EQ(begin, first + done);
    reader_.read_f32(slice.hf_name, slice.hf_first_element + begin - slice.first_element,
                     values.subspan(static_cast<size_t>(done), static_cast<size_t>(end - begin)));
    done += end - begin;
  }
  CHECK_EQ(done, wanted);
}

void export_hf(FileSystem& files, const ModelConfig& model, TensorSource& source, HfStorage storage,
               const std::string& directory) {
  const std::string config = hf_config_json(model, storage);  // refuses before anything is written
  std::map<std::string, HfTensor> by_name;
  std::vector<SafetensorsWriter::Declaration> declarations;
  for (HfTensor& slice : hf_tensors(model, HfSpelling::per_expert)) {
    const StoredType type = storage == HfStorage::bf16 ? StoredType::bf16 : StoredType::f32;
    declarations.push_back({.name = slice.hf_name, .type = type, .shape = slice.shape});
    const std::string name = slice.hf_name;
    by_name.emplace(name, std::move(slice));
  }
  files.make_directories(directory);
  SafetensorsWriter writer(files, directory + "/model.safetensors", std::move(declarations));
  std::vector<float> values;
  for (const auto& declaration : writer.order()) {
    const HfTensor& slice = by_name.at(declaration.name);
    for (int64_t done = 0; done < slice.elements; done += kElementsPerRead) {
      values.resize(static_cast<size_t>(std::min(kElementsPerRead, slice.elements - done)));
      source.read(slice.canonical_name, slice.first_element + done, values);
      writer.append(values);
    }
  }
  writer.finish();
  files.write_file_atomic(directory + "/config.json", config);
}

}  // namespace cambium
