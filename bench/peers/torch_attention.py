"""PyTorch peer of attention on the GPU: causal SDPA through cuDNN, bf16, grouped heads.

  python3 bench/peers/torch_attention.py [B,S,H,G,Q ...]

Forward and backward between CUDA events, medians of 15, random normal data. Needs a torch with CUDA.
"""
import statistics
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def median_ms(call, samples=15):
    for _ in range(3):
        call()
    events = []
    for _ in range(samples):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def measure(B, S, H, G, Q):
    def heads(count):
        rows = torch.randn(B, S, count, Q, device="cuda", dtype=torch.bfloat16)
        return rows.transpose(1, 2).requires_grad_()

    q, k, v, d_o = heads(H), heads(G), heads(G), heads(H).detach()

    def forward():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    o = forward()

    def backward():
        q.grad = k.grad = v.grad = None
        o.backward(d_o, retain_graph=True)

    flops = 2.0 * B * S * S * H * Q
    for name, call, work in (("forward", forward, flops), ("backward", backward, 2.5 * flops)):
        ms = median_ms(call)
        print(f"B {B} S {S} H {H} G {G} Q {Q} {name}: {ms:.3f} ms, {work / ms * 1e-9:.0f} TFLOP/s")


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    shapes = [tuple(map(int, a.split(","))) for a in sys.argv[1:]]
    for shape in shapes or [(4, 4096, 32, 4, 128)]:
        measure(*shape)
