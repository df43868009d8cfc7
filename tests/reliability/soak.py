"""`make soak`: the long form of tests/reliability, and docs/reliability.md out of what it measured.

python -m tests.reliability.soak               everything
python -m tests.reliability.soak -k kill9      a part; what was measured before is kept
python -m tests.reliability.soak --elsewhere P5 P7     rows that other tests show, counted
python -m tests.reliability.soak --page        only the page, from the figures at hand
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

import yaml

REPO = Path(__file__).parents[2]
FIGURES = Path(__file__).parent / "figures.jsonl"
GOALS = Path(__file__).parent / "goals.yaml"
MANY = os.environ | {"SPAVL_EXAMPLES": "200"}  # examples of a property
PAGE = REPO / "docs/reliability.md"
HEAD = """\
# What is promised, and what was measured

`python -m tests.reliability.soak` writes this page from `tests/reliability/goals.yaml` and from the
results of the last long run (`make soak`; `make test` runs the same tests in a short form). The
machine had two CPU cores and no GPU. A result is the number of cases that passed, of the number
tried.

| | goal | measured | test | date |
|---|---|---|---|---|
"""
TAIL = """
Exit codes: 0 complete, 1 failed, 2 wrong input or config, 3 a value is NaN or infinite, 73 the
folder is in use, 74 disk full, 75 stopped by a signal (run the same command again), 130 interrupted
before there was anything to save, 138 the notebook's kernel died.

## Where results are bit-identical

| situation | promise |
|---|---|
| same machine, CPU, same versions, with kills and resumes | bit-identical weights, log, summary |
| batches regrouped, activations recomputed | equal up to rounding, tested with tolerances |
| one or several GPUs; another torch version or processor | not measured, nothing is promised |

A resumed run refuses changed settings, data, base model, precision and major versions, and names
them. `--allow-change FIELD` overrides this, and the manifest records it. `spavl rerun RUN` makes a
run again and compares the results.
"""


def latest(figures: list[dict]) -> dict[str, list[dict]]:
    """Of each row and case the newest figure, the long form's before the short one's."""
    rows: dict[str, dict[str, dict]] = {}
    for figure in figures:
        before = rows.setdefault(figure["row"], {}).get(case := figure["what"].split(",")[0])
        if before is None or figure["soak"] or not before["soak"]:
            rows[figure["row"]][case] = figure
    return {row: list(cases.values()) for row, cases in rows.items()}


def measured(figures: list[dict]) -> str:
    """In words."""
    parts = []
    for figure in figures:
        more = {
            k: v for k, v in figure.items()
            if k not in ("row", "right", "of", "what", "soak", "at")
        }  # fmt: skip
        extra = "".join(f", {k.replace('_', ' ')} {v}" for k, v in more.items())
        what = f" {figure['what']}" if figure["what"] else ""
        short = "" if figure["soak"] else " (short form)"
        parts.append(f"**{figure['right']}/{figure['of']}**{what}{extra}{short}")
    return "; ".join(parts)


def page(figures: list[dict]) -> str:
    """The page's text."""
    goals = yaml.safe_load(GOALS.read_text(encoding="utf-8"))
    found, lines = latest(figures), []
    for row, goal in goals.items():
        own = found.get(row, [])
        told = measured(own) or (f"with {goal['counted_with']}" if "counted_with" in goal else "")
        if "absent" in goal:
            told = f"{told}; not measured: {goal['absent']}" if told else (
                f"not measured: {goal['absent']}"
            )  # fmt: skip
        test = f"`pytest tests/{goal['test']}`" if goal["test"] else ""
        date = max((f["at"] for f in own), default="")
        lines.append(f"| {row} | {goal['goal']} | {told or 'not run yet'} | {test} | {date} |")
    return HEAD + "\n".join(lines) + "\n" + TAIL


def read_figures() -> list[dict]:
    """All figures at hand."""
    if not FIGURES.is_file():
        return []
    return [json.loads(x) for x in FIGURES.read_text(encoding="utf-8").splitlines()]


def elsewhere(row: str, test: str) -> dict:
    """The figure of a row that is shown by tests of another folder: how many of them pass."""
    cases = bad = 0
    for part in re.sub(r"\(.*?\)", "", test).split(";"):
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "junit.xml"
            first, *more = shlex.split(part)
            command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", f"tests/{first}"]
            command += [*more, f"--junitxml={page}"]
            subprocess.run(command, cwd=REPO, env=MANY, check=False)
            suite = ElementTree.parse(page).getroot().find("testsuite")
        cases += int(suite.get("tests")) - int(suite.get("skipped"))
        bad += int(suite.get("failures")) + int(suite.get("errors"))
    return {"row": row, "right": cases - bad, "of": cases, "what": "tests", "soak": True,
            "at": time.strftime("%Y-%m-%d")}  # fmt: skip


def add_figures(lines: str) -> None:
    """Write figures behind those at hand."""
    with FIGURES.open("a", encoding="utf-8") as handle:
        handle.write(lines)


def write_page() -> None:
    """The page, and of the figures those that stand on it."""
    figures = read_figures()
    kept = [f for cases in latest(figures).values() for f in cases]
    FIGURES.write_text("".join(json.dumps(f) + "\n" for f in kept), encoding="utf-8")
    PAGE.write_text(page(kept), encoding="utf-8")


def main() -> None:
    """Run, and write the page even if a test failed: its figure then does not appear anew."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("-k", default="", help="only tests that match, as pytest takes it")
    parser.add_argument("--elsewhere", nargs="+", default=[], metavar="ROW", help="such as P5")
    parser.add_argument("--page", action="store_true", help="run nothing")
    parser.add_argument("--short", action="store_true", help="the form that make test runs")
    words = parser.parse_args()
    code = 0
    goals = yaml.safe_load(GOALS.read_text(encoding="utf-8"))
    rows = words.elsewhere
    if not (words.page or rows):
        form = [] if words.short else ["--soak", "-m", "not gpu"]
        with tempfile.TemporaryDirectory() as folder:
            # Outside the checkout: a run's conditions include what is changed in it.
            new = Path(folder) / "figures.jsonl"
            command = [sys.executable, "-m", "pytest", "-q", "tests/reliability",
                       *([] if words.short else ["tests/distributed/test_engines.py",
                                                 "tests/distributed/test_inference.py"]), *form,
                       "--figures", str(new), "--ignore=tests/reliability/test_page.py",
                       *(["-k", words.k] if words.k else [])]  # fmt: skip
            try:
                code = subprocess.run(command, cwd=REPO, env=MANY, check=False).returncode
            finally:
                if new.is_file():
                    add_figures(new.read_text(encoding="utf-8"))
        if not (words.k or words.short):
            rows = [r for r, goal in goals.items() if goal.get("counted_with") == "make test"]
    for row in rows:
        figure = elsewhere(row, goals[row]["test"])
        code = code or int(figure["right"] < figure["of"])
        add_figures(json.dumps(figure) + "\n")
    write_page()
    print(f"{PAGE.relative_to(REPO)} written")
    sys.exit(code)


if __name__ == "__main__":
    main()
