. .ate/grade_tools.sh
cat >.ate/grade.py <<'P'
import json, os, re, sys
answer = json.load(open(os.environ["ATE_ANSWER"] + "/answer.json"))
log = open("failing_check.log").read()
# The rank that posts the later call of the two left out the earlier one. The injected fault is at
# rank 2 in step 2: the log must say so, else this task no longer tests what it says.
found = re.search(r"rank (\d+) posts (\w+) \w+ \(([^)]*)\), rank (\d+) posted (\w+) \w+ \(([^)]*)\)", log)
assert found, "the log names two call sites"
sites = {int(found[1]): found[3], int(found[4]): found[6]}
assert 2 in sites and "step 2" in log, "fault at rank 2 in step 2"
other = [rank for rank in sites if rank != 2][0]
plain = lambda site: re.sub(r"^(\.\./)+", "", site)
if sys.argv[1] == "rank":
    assert answer["culprit_rank"] == 2 and answer["step"] == 2
elif sys.argv[1] == "kind":
    code = re.search(r"collective_mismatch = (\d+)", open("src/base/error.h").read())[1]
    assert answer["exit_code"] == int(code)
elif sys.argv[1] == "call_site":
    assert answer["next"] == plain(sites[2])
else:
    assert answer["skipped"] == plain(sites[other])
P
check rank "rank and step" python3 .ate/grade.py rank
check kind "exit code" python3 .ate/grade.py kind
check call_site "the call made instead" python3 .ate/grade.py call_site
check cause "the call left out" python3 .ate/grade.py cause
