"""Makes the golden directories of tests/golden with Hugging Face transformers (design.md section 7).

  python3 tests/golden/make_golden.py NAME OUT_DIR

Tiny random models, fp32, eager attention, no auxiliary loss. Needs torch, transformers and
safetensors in a scratch environment; neither set-up nor CI uses it, tests read its committed output.
"""
import json
import os
import sys

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

MODELS = {
    "qwen3_moe_tied": dict(
        vocab_size=264, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=24, intermediate_size=48, max_position_embeddings=64,
        norm_topk_prob=True, tie_word_embeddings=True, use_cache=False),
    # What the family's config.json can ask for beside the usual: layers 0 and 2 (every second layer
    # has experts) and 3 (listed) are dense, attention has biases and a window, RoPE is YaRN's.
    "qwen3_moe_options": dict(
        vocab_size=160, hidden_size=24, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, intermediate_size=40, max_position_embeddings=64,
        decoder_sparse_step=2, mlp_only_layers=[3], attention_bias=True,
        use_sliding_window=True, sliding_window=20,
        rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=4.0,
                             original_max_position_embeddings=16),
        norm_topk_prob=True, tie_word_embeddings=False, use_cache=False),
    # A gated shared expert in layers 0 and 2; layer 1 is dense, q, k and v have biases.
    "qwen2_moe": dict(
        vocab_size=192, hidden_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=28, intermediate_size=40,
        max_position_embeddings=64, mlp_only_layers=[1],
        norm_topk_prob=False, tie_word_embeddings=False, use_cache=False),
}
ADAMW = dict(lr=1e-3, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1, clip=1.0, decay_all_params=True)
SEQUENCES, LENGTH, STEPS = 2, 32, 5


def main():
    name, out = sys.argv[1:]
    torch.manual_seed(1234)
    torch.use_deterministic_algorithms(True)
    kind = "Qwen2Moe" if name.startswith("qwen2") else "Qwen3Moe"
    config = getattr(transformers, kind + "Config")(**MODELS[name])
    model = getattr(transformers, kind + "ForCausalLM")._from_config(
        config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():  # norms that are not all one, matrices large enough to route
        for key, parameter in model.named_parameters():
            std = 0.1 if parameter.dim() == 1 else 0.2
            mean = 1.0 if key.endswith("norm.weight") else 0.0
            parameter.copy_(mean + std * torch.randn_like(parameter))
    os.makedirs(out, exist_ok=True)
    model.save_pretrained(out)
    ids = torch.randint(config.vocab_size, (SEQUENCES, LENGTH + 1))

    def loss_and_logits():
        logits = model(input_ids=ids[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()), logits

    optimizer = torch.optim.AdamW(model.parameters(), lr=ADAMW["lr"], betas=ADAMW["betas"],
                                  eps=ADAMW["eps"], weight_decay=ADAMW["weight_decay"])
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss, logits = loss_and_logits()
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            tensors = {"grad/" + k: p.grad.clone() for k, p in model.named_parameters()}
            tensors |= {"input_ids": ids, "logits": logits.detach().clone()}
            save_file(tensors, os.path.join(out, "golden.safetensors"))
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), ADAMW["clip"]).item())
        optimizer.step()
    losses.append(loss_and_logits()[0].item())
    golden = {
        "name": name, "seed": 1234, "transformers": transformers.__version__,
        "torch": torch.__version__, "loss": losses[0], "adamw": ADAMW, "losses": losses,
        "grad_norms": norms,
        "final_l2_and_sum": {k: [p.double().norm().item(), p.double().sum().item()]
                             for k, p in model.named_parameters()},
    }
    with open(os.path.join(out, "golden.json"), "w") as file:
        json.dump(golden, file, indent=1)


if __name__ == "__main__":
    main()
