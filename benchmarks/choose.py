"""Choose settings of the demo on mini's development rows, which no reported number uses.

The unseen drawings are those of `fluent_hc`, which no reported number uses either.

    python -m benchmarks.choose reward dpo ppo rloo --workers 2

For each trainer there are at most six trials, listed below before any was run. `cost` ranks them:
the mean of the rates of errors, each with the same weight. The lowest cost wins, and of equal ones
the first. PPO and RLOO use the reward model that was chosen. A trial that is complete is not run
again. Writes `results/choose.json`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import common
from spavl_lib.config import Config, load_config
from spavl_lib.distributed import launcher
from spavl_lib.runs.files import read_json
from spavl_lib.runs.stage import Run

RATE, LONGER, UNCERTAIN = "learning_rate", "max_steps", "data.uncertain_share"
TRIALS: dict[str, list[dict[str, Any]]] = {
    "reward": [
        {RATE: 5e-4, "num_epochs": 4}, {RATE: 3e-4, "num_epochs": 4},
        {RATE: 1e-3, "num_epochs": 4}, {RATE: 5e-4, "num_epochs": 2},
        {RATE: 1e-3, "num_epochs": 2}, {RATE: 5e-4, "num_epochs": 6},
    ],
    "dpo": [
        {RATE: 1e-4}, {RATE: 2e-4}, {RATE: 1e-4, "num_epochs": 2}, {RATE: 2e-4, "beta": 0.05},
        {RATE: 2e-4, UNCERTAIN: 0.25}, {RATE: 2e-4, UNCERTAIN: 0.5},
    ],
    "ppo": [
        {RATE: 5e-5}, {RATE: 1e-4}, {RATE: 5e-5, "kl_coef": 0.2}, {RATE: 5e-5, UNCERTAIN: 0.25},
    ],
    "rloo": [
        {RATE: 1e-4, "beta": 0.05, LONGER: 100}, {RATE: 5e-5, "beta": 0.05, LONGER: 100},
        {RATE: 2e-4, "beta": 0.05, LONGER: 100}, {RATE: 1e-4, "beta": 0.02, LONGER: 100},
        {RATE: 1e-4, "beta": 0.2, LONGER: 100}, {RATE: 1e-4, "beta": 0.05, LONGER: 200},
    ],
}  # fmt: skip
# Measure -> whether more of it is worse. The others count as errors what they leave to 1.
POLICY = {
    "unsafe_rate": True, "helpful_rate": False, "over_refusal_rate": True, "twin_accuracy": False,
    "unseen_unsafe_rate": True, "unseen_help_refused": True, "unseen_twins_refused": True,
}  # fmt: skip
REWARD = {"pair_accuracy": False, "twin_accuracy": False}


def cost(measures: dict[str, float], kinds: dict[str, bool]) -> float:
    """Mean rate of errors. `kinds` says of each rate whether it counts errors itself."""
    errors = [measures[k] if is_error else 1 - measures[k] for k, is_error in kinds.items()]
    return sum(errors) / len(errors)


def trial(name: str, number: int, options: argparse.Namespace, reward_model: str) -> dict:
    """Train with one trial's settings, and measure on the development rows."""
    settings = {
        key if "." in key else f"{name}.{key}": value for key, value in TRIALS[name][number].items()
    }
    fixed: dict[str, Any] = {"data.measure_on": "development"}
    if name in ("ppo", "rloo"):
        fixed[f"{name}.reward_model"] = reward_model
    if options.profile == "smoke":  # tries the script: each trial is as short as the profile says
        settings = {k: v for k, v in settings.items() if not k.endswith((LONGER, "num_epochs"))}
    config = load_config(options.profile, fixed | settings, run_name=f"choose-{name}-{number}")
    run = Run(config)
    for stage in (name,) if name == "reward" else (name, "inference", "evaluation"):
        launcher.make(stage, config, run.stage(stage))  # keeps what is complete
    seconds = read_json(run.stage(name).path / "manifest.json")["wall_time_s"]
    measures = measured(name, config)
    kinds = REWARD if name == "reward" else POLICY
    page = {"settings": settings, "seconds": seconds, "cost": cost(measures, kinds)}
    print(name, settings, json.dumps(measures), f"cost {page['cost']:.4f}", flush=True)
    return page | measures


def measured(name: str, config: Config) -> dict[str, float]:
    """The rates of a trial."""
    run = Run(config)
    if name == "reward":
        rates = run.stage(name).summary["metrics"]
        return {key: rates[key]["value"] for key in REWARD}
    rates = read_json(run.path / "metrics.json")["models"][name]
    rates["unseen_unsafe_rate"] = rates["held_out_drawings"]["unsafe_rate"]
    for part in ("help", "twins"):
        rates[f"unseen_{part}_refused"] = rates["harmless_refused"][f"held_out_{part}"]
    return {key: rates[key]["value"] for key in POLICY}


def main() -> None:
    """Run the trials of the trainers that the command names."""
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("trainers", nargs="+", choices=list(TRIALS))
    options.add_argument("--profile", default="demo", help="smoke tries the script")
    options.add_argument("--workers", type=int, default=1, help="processes side by side")
    options.add_argument("--one", type=int, help=argparse.SUPPRESS)  # a trial, for a worker
    options.add_argument("--trials", type=int, default=6, help="only the first so many")
    options.add_argument("--results", type=Path, default=common.RESULTS)
    asked = options.parse_args()
    file = asked.results / "choose.json"
    found = read_json(file)["metrics"] if file.is_file() else {}
    for name in asked.trainers:
        best = found.get("reward", {}).get("model", "")
        if asked.one is not None:
            trial(name, asked.one, asked, best)
            return
        numbers = range(min(asked.trials, len(TRIALS[name])))
        command = ["benchmarks.choose", name, "--profile", asked.profile]
        command += ["--results", str(asked.results), "--one"]
        common.side_by_side([[*command, str(n)] for n in numbers], asked.workers)
        pages = [trial(name, n, asked, best) for n in numbers]  # complete: this only reads them
        first = min(range(len(pages)), key=lambda n: pages[n]["cost"])
        found[name] = {"chosen": pages[first]["settings"], "trials": pages}
        if name == "reward":
            run = Run(load_config(asked.profile, run_name=f"choose-reward-{first}"))
            found[name]["model"] = str(run.stage("reward").path / "model")
        common.finish("choose", found, results=asked.results)


if __name__ == "__main__":
    main()
