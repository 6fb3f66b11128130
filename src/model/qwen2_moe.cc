// Qwen2-MoE (Qwen1.5-MoE) in Hugging Face files: Qwen3-MoE without q/k norm, with biases of q, k
// and v, and beside the routed experts a shared one behind a sigmoid gate. Qwen2 technical report,
// arXiv:2407.10671.
#include "src/model/hf_family.h"

namespace cambium {
namespace {

constexpr HfRequirement kQwen2MoeRequirements[] = {
    {"use_sliding_window", "false", "a sliding window in some layers"},
};

}  // namespace

const HfFamily kQwen2MoeFamily = {
    .family = ModelFamily::qwen2_moe,
    .model_type = "qwen2_moe",
    .architecture = "Qwen2MoeForCausalLM",
    .experts_key = "num_experts",
    .expert_hidden_key = "moe_intermediate_size",
    .top_k_rule = HfTopKRule::norm_topk_prob,
    .window_rule = HfWindowRule::none,
    .qk_norm = QkNorm::none,
    .moe_block = "mlp",
    .gate = "gate_proj",
    .up = "up_proj",
    .down = "down_proj",
    .dense_layers = true,
    .bias_rule = HfBiasRule::qkv_bias,
    .shared_expert = true,
    .requirements = kQwen2MoeRequirements,
};

}  // namespace cambium
