"""Ten thousand answers, judged by phrases and by a home head, and killed on the way.

    SPAVL_BENCHMARKS=FOLDER python -m benchmarks.many_answers

The answers are those of the label sets, so they are real ones of many models. A head is fitted on
400 labels of MSTS. One process is killed (SIGKILL) while the head judges; the same command then
goes on. Needs the extra `judge-head`. Writes `results/many_answers.json`.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import common
from spavl_lib.config import EvaluationConfig
from spavl_lib.evaluation.benchmark_runs.judging import BenchmarkJudge, judge_answers, open_judge
from spavl_lib.evaluation.benchmarks import BenchmarkRow
from spavl_lib.evaluation.benchmarks.labels import LABEL_SETS, label_folder, load_labels
from spavl_lib.evaluation.head import Encoder, embed_answers, fit_head

SPECS = ("phrases", "head:{head}")


def real_answers(count: int) -> tuple[list[BenchmarkRow], dict[str, dict]]:
    """Rows and answers of all label sets at hand, as `judge_answers` takes them."""
    rows, answers = [], {}
    for name in LABEL_SETS:
        if label_folder(name) is None:
            continue
        for answer in load_labels(name, allow_changed=True):
            if len(rows) == count:
                break
            if answer.id in answers:
                continue
            row = BenchmarkRow(
                id=answer.id, benchmark="labels", subset=name, variant="", image=None,
                prompt=answer.prompt, context="", expect="judge", category="", rule="general",
                reference="", group=answer.group or answer.id, source_sha="",
            )  # fmt: skip
            rows.append(row)
            answers[row.id] = {"id": row.id, "response": answer.response}
    return rows, answers


def save_head(path: Path) -> None:
    """Fit a head for refusals on 400 labels of MSTS."""
    labelled = [a for a in load_labels("msts", allow_changed=True) if a.refused and a.response]
    chosen = random.Random(0).sample(labelled, 400)
    encoder = Encoder()
    features = embed_answers([a.response for a in chosen], encoder)
    labels = {"refused": [a.refused == "yes" for a in chosen]}
    fit_head(features, labels, encoder.fingerprint).save(path)


def judges(head: Path) -> list[BenchmarkJudge]:
    """The two judges."""
    return [open_judge(spec.format(head=head), EvaluationConfig()) for spec in SPECS]


def judge_all(folder: Path, count: int, head: Path) -> None:
    """What the process that is measured does."""
    rows, answers = real_answers(count)
    for judge in judges(head):
        judge_answers(judge, rows, answers, folder)


def lines_in(folder: Path) -> int:
    """Verdicts on file, of both judges."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl"))


def main() -> None:
    """Kill one run, finish it, and time another one that nobody disturbs."""
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--count", type=int, default=10_000)
    options.add_argument("--results", type=Path, default=common.RESULTS, help="folder of the JSON")
    options.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--head", type=Path, help=argparse.SUPPRESS)
    words = options.parse_args()
    if words.child:
        judge_all(words.child, words.count, words.head)
        return
    with tempfile.TemporaryDirectory() as name:
        folder, head = Path(name), Path(name) / "head.safetensors"
        save_head(head)

        def start(part: str) -> subprocess.Popen:
            command = [sys.executable, "-m", "benchmarks.many_answers", "--child", folder / part]
            return subprocess.Popen([*command, "--head", head, "--count", str(words.count)])

        began = time.monotonic()
        assert start("whole").wait() == 0
        took = time.monotonic() - began
        rows, _ = real_answers(words.count)
        killed = start("killed")
        while lines_in(folder / "killed") < 1.4 * len(rows):
            assert killed.poll() is None, "it ended before it was killed"
            time.sleep(0.1)
        killed.send_signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
        kept = lines_in(folder / "killed")
        assert start("killed").wait() == 0
        pages = {
            part: {
                path.name: [json.loads(line) for line in path.read_text().splitlines()]
                for path in (folder / part).glob("*.jsonl")
            }
            for part in ("whole", "killed")
        }
        for records in pages["killed"].values():
            assert [r["id"] for r in records] == [row.id for row in rows]  # none lost, none twice
        differing = sum(
            (one["refused"], one["why_unjudged"]) != (other["refused"], other["why_unjudged"])
            for key, records in pages["whole"].items()
            for one, other in zip(records, pages["killed"][key], strict=True)
        )
    common.finish(
        "many_answers",
        {
            "answers": len(rows), "judges": list(pages["whole"]), "wall_s": round(took, 1),
            "verdicts_kept_by_the_kill": kept, "verdicts_that_differ": differing,
        },
        results=words.results,
    )  # fmt: skip


if __name__ == "__main__":
    main()
