"""What every method reaches on the embedded world: three seeds, the demo's data and base.

    python -m benchmarks.methods --workers 2            # all methods, into results/methods.json
    python -m benchmarks.methods kto grpo --workers 2

PPO, DPO and the reward model are those of the demo (`reports/demo/studies.json` has their seeds). A
rate was chosen on the development rows among those in `RATES` (`--choose`), then every method was
trained with three seeds and measured on the test rows. Every training is a run in the runs folder;
complete stages are kept, so the command can be stopped and repeated.
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import common
from spavl_lib.config import Config, load_config
from spavl_lib.distributed import launcher
from spavl_lib.evaluation.numbers import METRICS
from spavl_lib.runs.files import read_json
from spavl_lib.runs.stage import Run

SEEDS = (0, 1, 2)
LOSSES = "dpo.loss_type", "dpo.loss_weights"


def _losses(weights: dict[str, float], **more: Any) -> dict[str, Any]:
    found = dict(zip(LOSSES, (list(weights), list(weights.values())), strict=True))
    return found | {key.replace("__", "."): value for key, value in more.items()}


@dataclass(frozen=True)
class Method:
    """A method as the benchmark trains it."""

    stage: str
    rates: tuple[float, ...]
    """Learning rates to choose from."""
    settings: dict[str, Any] = field(default_factory=dict)
    section: str = ""
    """Section of the learning rate, if it is not the stage's own."""


METHODS = {
    "sft": Method("dpo", (1e-4, 2e-4), _losses({"sft": 1.0})),
    "dpo": Method("dpo", (1e-4, 2e-4), _losses({"sigmoid": 1.0})),
    "dpo_sft": Method("dpo", (1e-4, 2e-4), _losses({"sigmoid": 1.0, "sft": 1.0})),
    "cdpo": Method(
        "dpo", (1e-4, 2e-4), _losses({"cdpo": 1.0, "sft": 1.0}, dpo__label_smoothing=0.1)
    ),
    "ipo": Method("dpo", (1e-4, 2e-4), _losses({"ipo": 1.0, "sft": 1.0})),
    "apo": Method("dpo", (1e-4, 2e-4), _losses({"apo_zero": 1.0, "sft": 1.0})),
    "mpo": Method("dpo", (1e-4, 2e-4), _losses({"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0})),
    "simpo": Method("dpo", (5e-5, 1e-4), _losses({"simpo": 1.0, "sft": 1.0}, dpo__beta=2.0)),
    "orpo": Method("dpo", (1e-4, 2e-4), _losses({"sft": 1.0, "orpo": 1.0})),
    "kto": Method("kto", (1e-4, 2e-4), {"kto.per_device_batch_size": 32}),
    "online_dpo": Method(
        "online_dpo", (5e-5, 1e-4),
        {"online_dpo.rounds": 3, "online_dpo.prompts": 800, "online_dpo.max_new_tokens": 48},
        "dpo",
    ),
    "rloo": Method("rloo", (1e-4, 3e-4), {"rloo.max_steps": 40}),
    "grpo": Method("grpo", (1e-4, 3e-4), {"grpo.max_steps": 40}),
}  # fmt: skip
REWARDED = ("online_dpo", "rloo", "grpo")


def config_of(name: str, seed: int, rate: float, asked: argparse.Namespace) -> Config:
    """The config of one training.

    Args:
        name: Name of the method.
        seed: Seed of the run.
        rate: Learning rate.
        asked: The command's options.
    """
    method = METHODS[name]
    settings = method.settings | {f"{method.section or method.stage}.learning_rate": rate}
    if asked.profile == "smoke":  # tries the script: as short as the profile says
        settings = {k: v for k, v in settings.items() if not k.endswith(("_steps", "prompts"))}
    if asked.choose:
        settings["data.measure_on"] = "development"
    if method.stage in REWARDED:
        reward = Run(load_config(asked.profile)).stage("reward").path / "model"
        settings[f"{method.stage}.reward_model"] = str(reward)
    kind = "choose" if asked.choose else "method"
    return load_config(
        asked.profile, settings, seed=seed, run_name=f"{kind}-{name}-{rate:g}-{seed}"
    )


def make(name: str, seed: int, rate: float, asked: argparse.Namespace) -> dict[str, Any]:
    """Make what is not complete of one training, and return its rates and its seconds."""
    config = config_of(name, seed, rate, asked)
    run, stage = Run(config), METHODS[name].stage
    for each in (stage, "inference", "evaluation"):
        if not run.stage(each).done:
            launcher.make(each, config, run.stage(each))
    cells = read_json(run.path / "metrics.json")["models"][stage]
    found = {metric.key: cells[metric.key] for metric in METRICS}
    found["harmless_refused"] = cells["harmless_refused"]["all"]
    seconds = read_json(run.stage(stage).path / "manifest.json")["wall_time_s"]
    return found | {"seconds": seconds}


def cost(rates: dict[str, Any]) -> float:
    """Mean of four rates of error: unsafe, not helpful, harmless refused, twins wrong."""
    value = {key: rates[key]["value"] for key in rates if key != "seconds"}
    errors = (value["unsafe_rate"], 1 - value["helpful_rate"], value["harmless_refused"],
              1 - value["twin_accuracy"])  # fmt: skip
    return sum(errors) / len(errors)


def main() -> None:
    """Make the trainings that the command names, and write the file."""
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("methods", nargs="*", help=f"{', '.join(METHODS)}; none for all")
    options.add_argument("--profile", default="demo", help="smoke tries the script")
    options.add_argument("--choose", action="store_true", help="choose rates on development rows")
    options.add_argument("--workers", type=int, default=1, help="processes side by side")
    options.add_argument("--output", type=Path, default=common.RESULTS / "methods.json")
    options.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # method, seed, rate
    asked = options.parse_args()
    if asked.one:
        make(asked.one[0], int(asked.one[1]), float(asked.one[2]), asked)
        return
    if unknown := [name for name in asked.methods if name not in METHODS]:
        options.error(f"unknown method {unknown[0]!r} (known: {', '.join(METHODS)})")
    page = read_json(asked.output)["metrics"] if asked.output.is_file() else {}
    names = asked.methods or list(METHODS)
    if asked.choose:
        arms = [(name, 0, rate) for name in names for rate in METHODS[name].rates]
    else:
        arms = [(n, seed, page[n]["chosen"]) for seed in SEEDS for n in names]
    command = ["benchmarks.methods", "--profile", asked.profile, *["--choose"] * asked.choose]
    common.side_by_side([[*command, "--one", *map(str, arm)] for arm in arms], asked.workers)
    found = {arm: make(*arm, asked) for arm in arms}
    for name in names:
        own = {arm: rates for arm, rates in found.items() if arm[0] == name}
        if asked.choose:
            trials = [{"rate": a[2], "cost": round(cost(r), 4)} | r for a, r in own.items()]
            best = min(trials, key=lambda trial: trial["cost"])
            page[name] = {"chosen": best["rate"], "trials": trials}
        else:
            page[name]["seeds"] = {str(arm[1]): rates for arm, rates in own.items()}
            page[name]["settings"] = METHODS[name].settings
    common.finish("methods", page, results=asked.output.parent)
    print(json.dumps({name: page[name].get("chosen") for name in names}))


if __name__ == "__main__":
    main()
