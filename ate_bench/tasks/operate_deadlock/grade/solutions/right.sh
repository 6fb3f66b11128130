cat failing_check.log >&2
python3 - <<'P'
import json, os, re
log = open("failing_check.log").read()
found = re.search(r"rank (\d+) posts \w+ \w+ \(([^)]*)\), rank (\d+) posted \w+ \w+ \(([^)]*)\)", log)
sites = {int(found[1]): found[2], int(found[3]): found[4]}
plain = lambda site: re.sub(r"^(\.\./)+", "", site)
other = [rank for rank in sites if rank != 2][0]
answer = {"culprit_rank": 2, "step": 2, "exit_code": 22, "skipped": plain(sites[other]),
          "next": plain(sites[2])}
wrong = os.environ.get("WRONG")
if wrong == "rank":  # the other of the two that the report names
    answer["culprit_rank"] = other
if wrong == "site":
    answer["skipped"], answer["next"] = answer["next"], answer["skipped"]
if wrong == "code":
    answer["exit_code"] = 23
json.dump(answer, open(".ate/answer/answer.json", "w"))
P
