// Mixtral in Hugging Face files. No q/k norm; the router renormalises over the top k always (the
// softmax over all experts renormalised over the chosen ones is the softmax over the chosen ones).
// Mixtral of Experts, arXiv:2401.04088.
#include "src/model/hf_family.h"

namespace cambium {
namespace {

constexpr HfRequirement kMixtralRequirements[] = {
    {"attention_bias", "false", "biases in attention"},
    {"router_jitter_noise", "0", "noise on the router's input"},
};

}  // namespace

const HfFamily kMixtralFamily = {
    .family = ModelFamily::mixtral,
    .model_type = "mixtral",
    .architecture = "MixtralForCausalLM",
    .experts_key = "num_local_experts",
    .expert_hidden_key = "intermediate_size",
    .top_k_rule = HfTopKRule::always_normalized,
    .window_rule = HfWindowRule::sliding_window,
    .qk_norm = QkNorm::none,
    .moe_block = "block_sparse_moe",
    .gate = "w1",
    .up = "w3",
    .down = "w2",
    .dense_layers = false,
    .bias_rule = HfBiasRule::none,
    .shared_expert = false,
    .requirements = kMixtralRequirements,
};

}  // namespace cambium
