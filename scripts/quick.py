"""The quick start: DPO alone on the small embedded model, with answers before and after.

    python scripts/quick.py                    # or: make quick

Trains `runs/quick/dpo`, asks base model and trained model the same prompts, and prints five answers
of each with the files of their images, and what the training changed.
"""

import argparse
import textwrap
from pathlib import Path

from spavl_lib import pipeline
from spavl_lib.config import load_config
from spavl_lib.data.images import decode
from spavl_lib.data.load import load_truth
from spavl_lib.evaluation.numbers import percent
from spavl_lib.evaluation.rates import Rate
from spavl_lib.evaluation.suite import harmless_refused, quick_answers
from spavl_lib.runs.stage import Run
from spavl_lib.runs.text import short_path

ROWS = 96  # prompts of each test set
SHOWN = (("harm", 2), ("twins", 2), ("help", 1))  # set, how many of its rows
KINDS = {True: "harmful over this image", False: "harmless over this image"}


def rates(judged: dict[str, list[dict]]) -> dict[str, Rate | None]:
    """The unsafe rate on `harm`, refusals of harmless requests, and the helpful rate on `help`."""
    harmful = [row for row in judged.get("harm", []) if row["unsafe"] is not None]
    helpful = [row for row in judged.get("help", []) if row["helpful"] is not None]
    return {
        "harmful requests answered (unsafe)": Rate.of(
            sum(row["unsafe"] for row in harmful), len(harmful)
        ),
        "harmless requests refused": Rate.from_dict(harmless_refused(judged)["all"]),
        "questions answered correctly": Rate.of(sum(r["helpful"] for r in helpful), len(helpful)),
    }


def show(before: dict, after: dict, truth: dict, folder: Path) -> None:
    """Print some prompts with both answers, and write their images.

    Args:
        before: Judged rows of the base model, by set.
        after: Judged rows of the trained model.
        truth: Row id -> ground-truth labels.
        folder: Folder for the images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in SHOWN:
        pairs = list(zip(before[name], after[name], strict=True))
        if name == "harm":  # requests that nobody can doubt: harmful whatever the image shows
            pairs.sort(key=lambda pair: truth[pair[0]["id"]]["intent"] != "harm")
        for row, trained in pairs[:count]:
            path = folder / f"{row['id'].replace('/', '_')}.png"
            decode(row["image"]).save(path)
            print(f"\n{short_path(path)}: {KINDS[row['harmful']]}\n  Question  {row['prompt']}")
            for title, text in (("Before", row["response"]), ("After", trained["response"])):
                print(textwrap.indent(textwrap.fill(text, 88), " " * 12).replace(
                    " " * 12, f"  {title:8}  ", 1))  # fmt: skip


def main() -> None:
    """Train, ask and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--profile", default="demo", help="demo, or smoke to try the script")
    parser.add_argument("--run-name", default="quick")
    asked = parser.parse_args()
    config = load_config(asked.profile, run_name=asked.run_name)
    stage = Run(config).stage("dpo")
    pipeline.train("dpo", config, stage)
    before = quick_answers(config, None, rows=ROWS)
    after = quick_answers(config, stage.path / "model", rows=ROWS)
    show(before, after, load_truth(config.data), stage.run.path / "pictures")
    old, new = rates(before), rates(after)
    width = max(map(len, old))
    print(f"\n{'':{width}}  {'before':>18}  {'after DPO':>18}")
    for name, rate in new.items():
        cells = [f"{percent(r)} ({r.counts})" if r else "-" for r in (old[name], rate)]
        print(f"{name:{width}}  {cells[0]:>18}  {cells[1]:>18}")
    image = min((stage.run.path / "pictures").glob("help*.png"))
    print(f"\nAsk it: spavl ask {asked.run_name} {short_path(image)} "
          '"What is this?"')  # fmt: skip


if __name__ == "__main__":
    main()
