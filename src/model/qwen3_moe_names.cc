// Qwen3-MoE in Hugging Face files. Layers may be dense, attention may have biases. Attention
// normalises each head of q and k before RoPE; the router takes the softmax over all experts, keeps
// the top k and, with norm_topk_prob, renormalises. Qwen3 technical report, arXiv:2505.09388.
#include "src/model/hf_family.h"

namespace cambium {

const HfFamily kQwen3MoeFamily = {
    .family = ModelFamily::qwen3_moe,
    .model_type = "qwen3_moe",
    .architecture = "Qwen3MoeForCausalLM",
    .experts_key = "num_experts",
    .expert_hidden_key = "moe_intermediate_size",
    .top_k_rule = HfTopKRule::norm_topk_prob,
    .window_rule = HfWindowRule::use_sliding_window,
    .qk_norm = QkNorm::per_head,
    .moe_block = "mlp",
    .gate = "gate_proj",
    .up = "up_proj",
    .down = "down_proj",
    .dense_layers = true,
    .bias_rule = HfBiasRule::attention_bias,
    .shared_expert = false,
    .requirements = {},
};

}  // namespace cambium
