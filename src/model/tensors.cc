#include "src/model/tensors.h"

#include "src/base/check.h"

namespace cambium {
namespace {

// Appends tensors with consecutive ids.
class TensorList {
 public:
  void add(std::string name, Shape shape, TensorRole role, int64_t layer = -1,
           int64_t expert = -1) {
    CHECK_GT(shape.elements(), 0);
    CanonicalTensor tensor{.name = std::move(name),
                           .shape = shape,
                           .id = static_cast<int64_t>(tensors_.size()),
                           .role = role,
                           .layer = layer,
                           .expert = expert};
    tensors_.push_back(std::move(tensor));
  }
  std::vector<CanonicalTensor> take() { return std::move(tensors_); }

 private:
  std::vector<CanonicalTensor> tensors_;
};

void add_layer(const ModelConfig& model, int64_t layer, TensorList& list) {
  const std::string prefix = fmt::format("layers.{}.", layer);
  const int64_t q_width = model.heads * model.head_dim;
  const int64_t kv_width = model.kv_heads * model.head_dim;
  list.add(prefix + "attn_norm", Shape(model.hidden), TensorRole::attn_norm, layer);
  list.add(prefix + "qkv", Shape(q_width + 2 * kv_width, model.hidden), TensorRole::qkv, layer);
  if (model.qk_norm != QkNorm::none) {
    const bool per_head = model.qk_norm == QkNorm::per_head;
    list.add(prefix + "q_norm", Shape(per_head ? model.head_dim : q_width), TensorRole::q_norm,
             layer);
    list.add(prefix + "k_norm", Shape(per_head ? model.head_dim : kv_width), TensorRole::k_norm,
             layer);
  }
  list.add(prefix + "attn_out", Shape(model.hidden, q_width), TensorRole::attn_out, layer);
  if (model.attention_bias) {
    list.add(prefix + "qkv_bias", Shape(q_width + 2 * kv_width), TensorRole::qkv_bias, layer);
    if (model.attention_out_bias) {
      list.add(prefix + "attn_out_bias", Shape(model.hidden), TensorRole::attn_out_bias, layer);
    }
  }
  list.add(prefix + "mlp_norm", Shape(model.hidden), TensorRole::mlp_norm, layer);
  if (model.is_dense(layer)) {
    list.add(prefix + "gate_up", Shape(2 * model.dense_hidden, model.hidden),
             TensorRole::mlp_gate_up, layer);
    list.add(prefix + "down", Shape(model.hidden, model.dense_hidden), TensorRole::mlp_down, layer);
    return;
  }
  list.add(prefix + "router", Shape(model.experts, model.hidden), TensorRole::router, layer);
  if (model.shared_expert_hidden > 0) {
    list.add(prefix + "shared_gate_up", Shape(2 * model.shared_expert_hidden, model.hidden),
             TensorRole::shared_gate_up, layer);
    list.add(prefix + "shared_down", Shape(model.hidden, model.shared_expert_hidden),
             TensorRole::shared_down, layer);
  }
  if (model.shared_expert_gate) {
    list.add(prefix + "shared_gate", Shape(1, model.hidden), TensorRole::shared_gate, layer);
  }
  for (int64_t expert = 0; expert < model.experts; ++expert) {
    const std::string expert_prefix = fmt::format("{}experts.{}.", prefix, expert);
    list.add(expert_prefix + "gate_up", Shape(2 * model.expert_hidden, model.hidden),
             TensorRole::expert_gate_up, layer, expert);
    list.add(expert_prefix + "down", Shape(model.hidden, model.expert_hidden),
             TensorRole::expert_down, layer, expert);
  }
}

}  // namespace

CanonicalTensor tied_head_tensor(const ModelConfig& model) {
  return {.name = "tied lm_head",
          .shape = Shape(model.vocab, model.hidden),
          .role = TensorRole::lm_head};
}

std::vector<CanonicalTensor> canonical_tensors(const ModelConfig& model) {
  TensorList list;
  list.add("embed", Shape(model.vocab, model.hidden), TensorRole::embed);
  for (int64_t layer = 0; layer < model.layers; ++layer) add_layer(model, layer, list);
  list.add("final_norm", Shape(model.hidden), TensorRole::final_norm);
  if (!model.tie_embeddings) {
    list.add("lm_head", Shape(model.vocab, model.hidden), TensorRole::lm_head);
  }
  return list.take();
}

}  // namespace cambium
