KEY=${KEY:-time} OWN=${OWN:-no} python3 - <<'P'
import csv, glob, json, os, re
sums = {}
for row in csv.DictReader(open("profile.csv")):
    name = row["Kernel Name"].replace("<unnamed>", "unnamed")
    name = re.split(r"[<(]", name)[0].split("::")[-1].split()[-1]
    launches, time = sums.get(name, (0, 0))
    sums[name] = (launches + 1, time + int(row["Metric Value"].replace(",", "")))
def source(name):
    for path in glob.glob("kernels/*.cu*"):
        if re.search(rf"__global__[^;{{]*?\b{name}\(", open(path).read()):
            return path
    return ""
keys = {"time": lambda n: -sums[n][1], "launches": lambda n: -sums[n][0],
        "mean": lambda n: -sums[n][1] / sums[n][0]}
names = sorted(sums, key=keys[os.environ["KEY"]])
if os.environ["OWN"] == "yes":
    names = [name for name in names if source(name)]
total = sum(time for _, time in sums.values())
json.dump([{"kernel": n, "launches": sums[n][0], "percent": 100 * sums[n][1] / total,
            "source": source(n)} for n in names[:3]], open(".ate/answer/kernels.json", "w"))
P
