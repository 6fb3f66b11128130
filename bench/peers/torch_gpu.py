"""PyTorch peers of the GPU kernels, a layer and the training step, beside ours: one table.

  python3 bench/peers/torch_gpu.py build/cuda/cambium_bench [attention experts layer step]
  python3 bench/peers/torch_gpu.py --tiny    # peers alone, small, on a CPU too: do they run?

Qwen3-30B-A3B's shapes, 4 sequences of 4,096 tokens, bf16, random data. Each row times PyTorch
once and ours twice; medians between CUDA events; the ratio is PyTorch's time over ours. Peers: SDPA through cuDNN, torch._grouped_mm, torch.compile, fused AdamW; the step keeps weights and moments in fp32 (a
bf16 copy computes), or all of it in bf16. Needs a torch with CUDA; neither set-up nor CI uses it.
"""
import contextlib
import json
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_cpu import Attention, Experts, Model

FULL = dict(D=2048, L=4, H=32, G=4, Q=128, E=128, K=8, F=768, V=151936, B=4, S=4096)
TINY = dict(D=64, L=2, H=4, G=2, Q=16, E=8, K=2, F=32, V=256, B=2, S=64)
BF16 = torch.bfloat16


def median_ms(call, device, samples=15, warmups=5):
    for _ in range(warmups):
        call()
    if device == "cpu":
        times = []
        for _ in range(samples):
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
        return statistics.median(times)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(samples)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def attention(m, device):
    def heads(count):
        rows = torch.randn(m["B"], m["S"], count, m["Q"], device=device, dtype=BF16)
        return rows.transpose(1, 2).requires_grad_()

    q, k, v, d_o = heads(m["H"]), heads(m["G"]), heads(m["G"]), heads(m["H"]).detach()
    backend = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if device == "cuda" else contextlib.nullcontext()
    with backend:
        run = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        shape = f"sequences:{m['B']}/S:{m['S']}/Q:{m['Q']}"
        yield "attention forward", f"attention_cuda/{shape}", median_ms(run, device)
        o = run()
        back = lambda: torch.autograd.grad(o, (q, k, v), d_o, retain_graph=True)
        yield "attention backward", f"attention_backward_cuda/{shape}", median_ms(back, device)


def experts(m, device):
    """Products alone, rows already gathered; ours gather, and fuse SwiGLU and its gradient."""
    rows, E = m["B"] * m["S"] * m["K"], m["E"]
    random = lambda *shape: torch.randn(*shape, device=device, dtype=BF16)
    x, h, d_h = random(rows, m["D"]), random(rows, m["F"]), random(rows, 2 * m["F"])
    w_up, w_down = random(E, m["D"], 2 * m["F"]), random(E, m["F"], m["D"])
    shares = torch.arange(1, E + 1, dtype=torch.float64) ** -0.7
    zipf = (shares[torch.randperm(E)] / shares.sum() * rows).long()
    zipf[0] += rows - zipf.sum()
    for skewed, loads in enumerate((torch.full((E,), rows // E), zipf)):
        ends = loads.cumsum(0).to(torch.int32).to(device)
        name = "Zipf" if skewed else "uniform"
        mm = lambda a, b: median_ms(lambda: torch._grouped_mm(a, b, offs=ends), device)
        yield f"up, {name}", f"gpu_experts_up/skewed:{skewed}", mm(x, w_up)
        yield f"down, {name}", f"gpu_experts_down/skewed:{skewed}", mm(h, w_down)
        yield (f"up input gradient, {name}", f"gpu_experts_up_input_gradient/skewed:{skewed}",
               mm(d_h, w_up.transpose(1, 2)))
        yield (f"up weight gradient, {name}",
               f"gpu_experts_up_weight_gradient/skewed:{skewed}/stores:1", mm(x.t(), d_h))


class Layer(torch.nn.Module):
    def __init__(self, m):
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(m["D"], 1e-6) for _ in range(2))
        self.attention, self.experts = Attention(m), Experts(m)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.norms[0](x), cos, sin)
        return x + self.experts(self.norms[1](x))


def layer(m, device):
    model = Layer(m).to(device, BF16)
    angle = torch.arange(m["S"])[:, None] / 1e6 ** (torch.arange(0, m["Q"], 2) / m["Q"])
    cos, sin = (t[:, None].to(device, BF16) for t in (angle.cos(), angle.sin()))
    x = torch.randn(m["B"], m["S"], m["D"], device=device, dtype=BF16, requires_grad=True)
    d_y = torch.randn_like(x)
    compiled = torch.compile(model)

    def run():
        model.zero_grad(set_to_none=True)
        compiled(x, cos, sin).backward(d_y)

    yield "layer, forward and backward", "gpu_layer/", median_ms(run, device)


def step(m, device):
    for bf16_state in (0, 1):
        model = Model(m).to(device, BF16)
        compiled, copies = torch.compile(model), list(model.parameters())
        masters = copies if bf16_state else [p.detach().float() for p in copies]
        optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=device == "cuda")
        token, target = (torch.randint(m["V"], (m["B"], m["S"]), device=device) for _ in range(2))

        def run():
            model.zero_grad(set_to_none=True)
            compiled(token, target).backward()
            if not bf16_state:
                for master, copy in zip(masters, copies):
                    master.grad = copy.grad.float()
            torch.nn.utils.clip_grad_norm_(masters, 1.0)
            optimizer.step()
            if not bf16_state:
                with torch.no_grad():
                    torch._foreach_copy_(copies, masters)

        theirs = median_ms(run, device, 10)
        del model, compiled, copies, masters, optimizer, run  # ours needs the memory
        torch.compiler.reset()
        state = "bf16 weights and moments" if bf16_state else "fp32 weights and moments"
        yield f"step, {state}", f"gpu_step/bf16_state:{bf16_state}/", theirs


def ours_ms(bench, name):
    line = [bench, f"--benchmark_filter=^{name}", "--benchmark_format=json"]
    out = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    rows = json.loads(out)["benchmarks"]
    if len(rows) != 1 or rows[0].get("error_occurred"):
        problem = rows[0].get("error_message", "") if rows else ""
        sys.exit(f"{name}: {len(rows)} rows of {bench}: {problem}")
    return rows[0]["real_time"] * {"ns": 1e-6, "us": 1e-3, "ms": 1.0}[rows[0]["time_unit"]]


def main():
    kinds = {"attention": attention, "experts": experts, "layer": layer, "step": step}
    tiny = "--tiny" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--tiny"]
    bench = None if tiny or not arguments else arguments.pop(0)
    unknown = [a for a in arguments if a not in kinds]
    if unknown or (bench is None) != tiny:
        sys.exit(__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not tiny:
        sys.exit("no GPU: only --tiny runs here")
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}")
    for kind in arguments or kinds:
        for what, name, theirs in kinds[kind](TINY if tiny else FULL, device):
            if tiny:
                print(f"{what:42} PyTorch {theirs:8.3f} ms", flush=True)
                continue
            torch.cuda.empty_cache()
            first, second = ours_ms(bench, name), ours_ms(bench, name)
            print(f"{what:42} ours {first:8.3f}, {second:8.3f} ms  PyTorch {theirs:8.3f} ms  "
                  f"ratio {theirs / first:.2f}, {theirs / second:.2f}", flush=True)


if __name__ == "__main__":
    main()
