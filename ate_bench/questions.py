# Grades answers of a questions task: `questions.py LIST` prints one CHECK line for each question.
# Facts and citations are verified against the code of this copy, so they stay true when lines move.
#
# LIST: a JSON array of {"name", "file": regex of the cited path, "line": regex that the cited line
# must match, "near": regex found in the 16 lines before it (optional), "value": null or [path, regex
# whose group 1 is the fact]}. The answer file holds {name: {"cite": "path:line", "value": "..."}}. A regex that finds nothing in the code is the
# grader's own failure: exit 1.
import json, os, re, sys

questions = json.load(open(sys.argv[1]))
try:
    answers = json.load(open(os.environ.get("ATE_ANSWER", "") + "/answers.json"))
except (OSError, ValueError):
    answers = {}

def grade(question):
    answer = answers.get(question["name"])
    if not isinstance(answer, dict):
        return "no answer"
    path, _, line = str(answer.get("cite", "")).rpartition(":")
    if not re.fullmatch(question["file"], path) or not os.path.isfile(path) or ".." in path:
        return "cites another file"
    lines = open(path).read().split("\n")
    if not line.isdigit() or not 1 <= int(line) <= len(lines):
        return "cites no line"
    if not shows(question, lines, int(line)):
        return "the cited line does not show it"
    if question["value"]:
        want = fact(question)
        if str(answer.get("value", "")).strip() != want:
            return "another value than the code's"
    return ""

def shows(question, lines, number):
    before = "\n".join(lines[max(0, number - 17):number - 1])
    return re.search(question["line"], lines[number - 1]) and re.search(question.get("near", ""), before)

def fact(question):
    path, pattern = question["value"]
    return re.search(pattern, open(path).read())[1].strip()

def matches(question):  # every place that a right answer may cite
    for folder, _, names in os.walk("."):
        if folder.startswith(("./.", "./build")):
            continue
        for name in names:
            path = os.path.join(folder, name)[2:]
            if re.fullmatch(question["file"], path):
                lines = open(path, errors="replace").read().split("\n")
                for number in range(1, len(lines) + 1):
                    if shows(question, lines, number):
                        yield f"{path}:{number}"

if sys.argv[2:] == ["solve"]:  # a solution's way: answers with places and facts from the code
    print(json.dumps({q["name"]: {"cite": next(matches(q)), "value": fact(q) if q["value"] else ""}
                      for q in questions}, indent=1))
    sys.exit()
for question in questions:
    if next(matches(question), None) is None or (question["value"] and not fact(question)):
        sys.exit(f"question {question['name']}: the code no longer shows what it asks for")
    problem = grade(question)
    print("CHECK", question["name"], "FAIL" if problem else "PASS", problem)
