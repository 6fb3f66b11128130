# rates.py RUN KIND WARMUP COOLDOWN RATIO FIRST LAST: `lr` of .ate/RUN is the formula's.
import json, math, sys
run, kind = sys.argv[1:3]
warmup, cooldown, ratio, first, last = map(float, sys.argv[3:])
rows = [json.loads(line) for line in open(f".ate/{run}/metrics.jsonl")]
lr = {row["step"]: row["lr"] for row in rows if "lr" in row}
total, peak = 30, 3e-3  # configs/tiny.toml
floor = peak * ratio
for step in range(int(first), int(last) + 1):
    x = (step - total + cooldown) / cooldown if cooldown else 0
    if step <= warmup:
        want = peak * step / warmup
    elif kind == "cosine":
        want = floor + (peak - floor) * (1 + math.cos(math.pi * step / total)) / 2
    elif step <= total - cooldown:
        want = peak
    else:
        want = floor + (peak - floor) * (1 - (math.sqrt(x) if kind == "wsd_sqrt" else x))
    assert abs(lr[step] - want) <= 1e-6 * peak, (step, lr[step], want)
