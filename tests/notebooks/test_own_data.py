"""The README's command for data of one's own: ten rows with images, six notebooks, a report."""

import json
import re
import shlex
from pathlib import Path

import pytest

from spavl_lib.runs.paths import repo_root
from tests.helpers import png
from tests.notebooks.conftest import execute

pytestmark = [pytest.mark.slow, pytest.mark.notebooks]
# The report is looked at, not what was learned.
FEW = {
    "reward.max_steps": 2, "dpo.max_steps": 2, "ppo.max_steps": 1, "ppo.rollout_batch_size": 4,
    "ppo.per_device_batch_size": 4, "ppo.max_new_tokens": 8, "generation.max_new_tokens": 8,
    "data.test_rows": 8,
}  # fmt: skip


def readme_command(folder: Path) -> list[str]:
    """The first `spavl run all` of the README, with its paths below `folder`, in profile smoke."""
    page = (repo_root() / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    line = re.search(r"^spavl (run all .*data.path=my/.*)$", page, re.MULTILINE)
    assert line
    words = (
        line.group(1).replace("=my/", f"={folder}/").replace("--profile demo", "--profile smoke")
    )
    return shlex.split(words)


def write_pairs(folder: Path, count: int = 10) -> None:
    (folder / "images").mkdir(parents=True)
    rows = []
    for n in range(count):
        (folder / f"images/{n}.png").write_bytes(png((20 * n, 200 - 20 * n, 90)))
        rows.append(
            {
                "prompt": f"What does picture {n} show?", "chosen": "A plain coloured square.",
                "rejected": f"I do not know number {n}.", "image": f"{n}.png",
            }
        )  # fmt: skip
    text = "\n".join(map(json.dumps, rows))
    (folder / "pairs.jsonl").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("prompts", ["mini", "own"])
def test_ten_rows_of_ones_own_end_in_a_report(
    tmp_path: Path, prompts: str, warm_kernels: None
) -> None:
    folder, runs = tmp_path / "my", tmp_path / "runs"
    write_pairs(folder)
    words = readme_command(folder)
    words += [word for key, value in FEW.items() for word in ("--set", f"{key}={value}")]
    if prompts == "own":
        rows = [
            {"prompt": f"Question {n}?", "image": f"{n}.png", "set": ("harm", "help")[n % 2]}
            for n in range(4)
        ]
        text = "\n".join(map(json.dumps, rows))
        (folder / "prompts.jsonl").write_text(text, encoding="utf-8")
        words += ["--set", f"data.test_path={folder / 'prompts.jsonl'}"]
        words += ["--set", "evaluation.judge=phrases"]
    done = execute("spavl_lib.cli", *words, runs=runs)
    assert done.returncode == 0, done.stderr[-4000:]
    run = runs / "mine"
    page = (run / "report.html").read_text(encoding="utf-8")
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    manifest = json.loads((run / "dpo/manifest.json").read_text(encoding="utf-8"))
    assert manifest["held_out"] == {"share": 0.1, "seed": 0, "grouped_by": "image"}
    assert [manifest["data"][name]["rows"] for name in ("train", "validation")] == [9, 1]
    assert "What this run lacks" in page and "held out and not trained on" in page
    name = metrics["prompts"]["name"]
    assert all(model["prompts"] == name for model in metrics["models"].values())
    assert f"Measured on {name}" in done.stdout
    if prompts == "mini":
        assert name == "SPA-VL mini's built-in prompts" and not metrics["prompts"]["own"]
        assert "Evaluation prompts of your own" in page
        sections = re.split(r"<section id=", page)
        for section in sections:
            if section.startswith(
                ('"results"', '"held-out"', '"classes"', '"gallery"', '"figures"')
            ):
                assert "mini&#39;s built-in prompts" in section, section[:20]
    else:
        assert name == f"the prompts of {folder / 'prompts.jsonl'}" and metrics["prompts"]["own"]
        assert {p.stem for p in (run / "inference/base").glob("*.jsonl")} == {"harm", "help"}
    # A picture replaced afterwards is noticed, and nothing is kept as if it were not.
    (folder / "images/3.png").write_bytes(png((1, 2, 3)))
    again = execute("spavl_lib.cli", *words, runs=runs)
    assert again.returncode != 0 and "data/train" in again.stderr
