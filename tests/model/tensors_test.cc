// Canonical tensors: order, ids, shapes and the parameter count of a known model.
#include "src/model/tensors.h"

#include <set>

#include "gtest/gtest.h"

namespace cambium {
namespace {

ModelConfig small_model() {
  ModelConfig model;
  model.layers = 3;
  model.hidden = 64;
  model.heads = 4;
  model.kv_heads = 2;
  model.head_dim = 32;
  model.experts = 8;
  model.top_k = 2;
  model.expert_hidden = 48;
  model.vocab = 512;
  return model;
}

int64_t total_elements(const ModelConfig& model) {
  int64_t total = 0;
  for (const CanonicalTensor& tensor : canonical_tensors(model)) total += tensor.elements();
  return total;
}

TEST(CanonicalTensors, IdsAreDenseAndNamesUnique) {
  const auto tensors = canonical_tensors(small_model());
  std::set<std::string> names;
  for (size_t i = 0; i < tensors.size(); ++i) {
    EXPECT_EQ(tensors[i].id, static_cast<int64_t>(i));
    EXPECT_TRUE(names.insert(tensors[i].name).second) << tensors[i].name;
  }
  EXPECT_EQ(tensors.size(), 3u + 3u * (7 + 2 * 8));
  EXPECT_EQ(tensors.front().name, "embed");
  EXPECT_EQ(tensors.back().name, "lm_head");
}

// The golden Qwen3-MoE model of this size has 362,624 parameters.
TEST(CanonicalTensors, ParameterCountMatchesTransformers) {
  EXPECT_EQ(total_elements(small_model()), 362624);
}

TEST(CanonicalTensors, FamiliesDifferInNormsOnly) {
  ModelConfig model = small_model();
  const int64_t per_head = total_elements(model);
  model.qk_norm = QkNorm::none;
  EXPECT_EQ(total_elements(model), per_head - 3 * 2 * 32);
  model.qk_norm = QkNorm::full_width;
  EXPECT_EQ(total_elements(model), per_head - 3 * 2 * 32 + 3 * (4 + 2) * 32);
  model.tie_embeddings = true;
  EXPECT_EQ(canonical_tensors(model).back().name, "final_norm");
}

TEST(CanonicalTensors, ExpertsAreSingleTensorsThatDecay) {
  for (const CanonicalTensor& tensor : canonical_tensors(small_model())) {
    const bool expert_role =
        tensor.role == TensorRole::expert_gate_up || tensor.role == TensorRole::expert_down;
    EXPECT_EQ(tensor.is_expert(), expert_role) << tensor.name;
    const bool is_norm = tensor.name.find("norm") != std::string::npos;
    EXPECT_EQ(tensor.decay_kind(), is_norm ? DecayKind::vector : DecayKind::matrix);
  }
}

}  // namespace
}  // namespace cambium
