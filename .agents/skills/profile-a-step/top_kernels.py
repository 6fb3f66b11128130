#!/usr/bin/env python3
"""top_kernels.py FILE.csv [N]: the N (3) dearest kernels of `nsys stats --report cuda_gpu_kern_sum
--format csv`, by summed time over all instances: share, calls, name."""
import csv
import sys


def kernels(path):
    lines = open(path, newline="").read().splitlines()
    starts = [i for i, line in enumerate(lines) if "Total Time (ns)" in line]
    if not starts:
        sys.exit(f"{path}: no column 'Total Time (ns)'; next: nsys stats --report cuda_gpu_kern_sum "
                 "--format csv")
    rows = [row for row in csv.DictReader(lines[starts[0]:]) if row.get("Name")]
    return sorted(((int(row["Total Time (ns)"]), int(row["Instances"]), row["Name"]) for row in rows),
                  reverse=True)


if __name__ == "__main__":
    found = kernels(sys.argv[1])
    total = sum(time for time, _, _ in found)
    for time, calls, name in found[:int(sys.argv[2]) if len(sys.argv) > 2 else 3]:
        print(f"{100 * time / total:5.1f} %  {calls:6} calls  {name}")
