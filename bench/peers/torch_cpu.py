"""PyTorch peers of the CPU training step: plain PyTorch (eager, torch.compile) and transformers.

  python3 bench/peers/torch_cpu.py [quickstart|small] [eager compile transformers]

Whole step (forward, backward, clip, AdamW), fp32, 2 threads, random tokens; prints the median in ms.
Needs torch and transformers in a scratch environment; neither set-up nor CI uses it.
"""
import sys
import time

import torch
import torch.nn.functional as F

MODELS = {
    "quickstart": dict(D=128, L=4, H=4, G=2, Q=32, E=8, K=2, F=256, V=1024, B=8, S=128),
    "small": dict(D=256, L=6, H=8, G=4, Q=32, E=16, K=4, F=256, V=4096, B=8, S=256),
}


class Attention(torch.nn.Module):
    def __init__(self, m):
        super().__init__()
        self.m = m
        self.qkv = torch.nn.Linear(m["D"], (m["H"] + 2 * m["G"]) * m["Q"], bias=False)
        self.out = torch.nn.Linear(m["H"] * m["Q"], m["D"], bias=False)
        self.q_norm, self.k_norm = torch.nn.RMSNorm(m["Q"], 1e-6), torch.nn.RMSNorm(m["Q"], 1e-6)

    def forward(self, x, cos, sin):
        m, (B, S, _) = self.m, x.shape
        q, k, v = self.qkv(x).view(B, S, -1, m["Q"]).split([m["H"], m["G"], m["G"]], 2)

        def rope(t):
            a, b = t.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).transpose(1, 2)

        q, k = rope(self.q_norm(q)), rope(self.k_norm(k))
        o = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
        return self.out(o.transpose(1, 2).reshape(B, S, -1))


class Experts(torch.nn.Module):
    """Sorted tokens through torch._grouped_mm, the fastest plain PyTorch form."""

    def __init__(self, m):
        super().__init__()
        self.m = m
        self.router = torch.nn.Linear(m["D"], m["E"], bias=False)
        self.up = torch.nn.Parameter(0.02 * torch.randn(m["E"], m["D"], 2 * m["F"]))
        self.down = torch.nn.Parameter(0.02 * torch.randn(m["E"], m["F"], m["D"]))

    def forward(self, x):
        m, flat = self.m, x.reshape(-1, x.shape[-1])
        weight, index = F.softmax(self.router(flat), -1).topk(m["K"], -1)
        weight = weight / weight.sum(-1, keepdim=True)
        expert, order = index.reshape(-1).sort(stable=True)
        token = order // m["K"]
        ends = torch.searchsorted(expert, torch.arange(m["E"], device=x.device), right=True).to(torch.int32)
        gate, up = torch._grouped_mm(flat[token], self.up, offs=ends).chunk(2, -1)
        y = torch._grouped_mm(F.silu(gate) * up, self.down, offs=ends)
        y = y * weight.reshape(-1)[order, None]
        return torch.zeros_like(flat).index_add(0, token, y).view_as(x)


class Model(torch.nn.Module):
    def __init__(self, m):
        super().__init__()
        self.embed = torch.nn.Embedding(m["V"], m["D"])
        norm = lambda: torch.nn.RMSNorm(m["D"], 1e-6)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleList([norm(), Attention(m), norm(), Experts(m)]) for _ in range(m["L"]))
        self.norm, self.head = norm(), torch.nn.Linear(m["D"], m["V"], bias=False)
        angle = torch.arange(m["S"])[:, None] / 1e6 ** (torch.arange(0, m["Q"], 2) / m["Q"])
        self.register_buffer("cos", angle.cos()[:, None])
        self.register_buffer("sin", angle.sin()[:, None])

    def forward(self, token, target):
        x = self.embed(token)
        for attn_norm, attention, mlp_norm, experts in self.layers:
            x = x + attention(attn_norm(x), self.cos, self.sin)
            x = x + experts(mlp_norm(x))
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), target.flatten())


def hugging_face(m):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    config = Qwen3MoeConfig(
        hidden_size=m["D"], num_hidden_layers=m["L"], num_attention_heads=m["H"],
        num_key_value_heads=m["G"], head_dim=m["Q"], num_experts=m["E"],
        num_experts_per_tok=m["K"], moe_intermediate_size=m["F"], vocab_size=m["V"],
        norm_topk_prob=True, tie_word_embeddings=False, use_cache=False)
    model = Qwen3MoeForCausalLM._from_config(config, attn_implementation="sdpa")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("grouped_mm")
    return lambda token, target: F.cross_entropy(
        model(input_ids=token).logits.flatten(0, 1), target.flatten()), model.parameters()


def median_step_ms(loss_of, parameters, m, steps=20):
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    times = []
    for _ in range(steps + 4):
        token = torch.randint(m["V"], (m["B"], m["S"]))
        target = torch.randint(m["V"], (m["B"], m["S"]))
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss_of(token, target).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times[4:])[steps // 2]


def main():
    torch.set_num_threads(2)
    torch.manual_seed(0)
    names = [a for a in sys.argv[1:] if a in MODELS] or ["quickstart"]
    kinds = [a for a in sys.argv[1:] if a not in MODELS] or ["eager", "compile", "transformers"]
    for name in names:
        m = MODELS[name]
        for kind in kinds:
            if kind == "transformers":
                loss_of, parameters = hugging_face(m)
            else:
                model = Model(m)
                loss_of, parameters = model, model.parameters()
                if kind == "compile":
                    loss_of = torch.compile(model)
            print(f"{name} {kind}: {median_step_ms(loss_of, parameters, m):.1f} ms", flush=True)


if __name__ == "__main__":
    main()
