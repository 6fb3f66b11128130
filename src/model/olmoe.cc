// OLMoE in Hugging Face files. q and k are normalised over their full width, all heads together,
// before they are cut into heads; router weights stay a slice of the softmax over all experts
// unless norm_topk_prob says otherwise. OLMoE: Open Mixture-of-Experts, arXiv:2409.02060.
#include "src/model/hf_family.h"

namespace cambium {
namespace {

constexpr HfRequirement kOlmoeRequirements[] = {
    {"clip_qkv", "null", "clipped q, k and v"},
};

}  // namespace

const HfFamily kOlmoeFamily = {
    .family = ModelFamily::olmoe,
    .model_type = "olmoe",
    .architecture = "OlmoeForCausalLM",
    .experts_key = "num_experts",
    .expert_hidden_key = "intermediate_size",
    .top_k_rule = HfTopKRule::norm_topk_prob,
    .window_rule = HfWindowRule::none,
    .qk_norm = QkNorm::full_width,
    .moe_block = "mlp",
    .gate = "gate_proj",
    .up = "up_proj",
    .down = "down_proj",
    .dense_layers = false,
    .bias_rule = HfBiasRule::attention_bias,
    .shared_expert = false,
    .requirements = kOlmoeRequirements,
};

}  // namespace cambium
