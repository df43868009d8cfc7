"""Train the studies that the notebooks show but do not train: seeds, beta, KL and RLOO.

    python -m benchmarks.studies                  # all of them, into reports/demo/studies.json
    python -m benchmarks.studies beta --workers 2

Every training is a run in the runs folder; complete stages are kept, so the command can be stopped
and repeated. `seeds` uses the run `demo` as its first seed.
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
from spavl_lib.notebook.studies import PUBLISHED
from spavl_lib.runs.files import read_json, read_jsonl, write_json
from spavl_lib.runs.paths import repo_root
from spavl_lib.runs.stage import Run

BETAS = (0.02, 0.05, 0.1, 0.3, 1.0)
SEEDS = (0, 1, 2)
FREE = {"ppo.kl_coef": 0.0, "ppo.sft_coef": 0.0}
RLOO_STEPS = 40  # a step takes as long as ten of DPO
QUICK = {"evaluation.held_out_drawings": False}


@dataclass(frozen=True)
class Arm:
    """One training of a study."""

    study: str
    name: str
    """Name under which the notebooks show it."""
    run_name: str
    trainers: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    needs_reward: bool = False
    """Whether it uses the reward model of the first seed."""


def arms(profile: str) -> list[Arm]:
    """All arms, those first that others need.

    Args:
        profile: `demo`, or `smoke` to try the script.
    """
    whole = ("reward", "ppo", "dpo")
    first = profile
    return [
        *(Arm("seeds", str(s), f"seed{s}" if s else first, whole, seed=s) for s in SEEDS),
        *(Arm("beta", f"{b:g}", f"beta{b:g}", ("dpo",), QUICK | {"dpo.beta": b}) for b in BETAS),
        Arm("kl", "as in the demo", first, whole, seed=0),
        Arm(
            "kl",
            "no KL penalty, no cross-entropy",
            "free_kl",
            ("ppo",),
            QUICK | FREE,
            needs_reward=True,
        ),
        Arm(
            "rloo",
            f"RLOO, {RLOO_STEPS} steps",
            "rloo",
            ("rloo",),
            QUICK | {"rloo.max_steps": RLOO_STEPS},
            needs_reward=True,
        ),
    ]


def config_of(arm: Arm, profile: str) -> Config:
    """The config of an arm."""
    settings = dict(arm.settings)
    if arm.needs_reward:
        reward = Run(load_config(profile)).stage("reward").path / "model"
        settings[f"{arm.trainers[0]}.reward_model"] = str(reward)
    return load_config(profile, settings, seed=arm.seed, run_name=arm.run_name)


def make(arm: Arm, profile: str) -> None:
    """Make every stage of an arm that is not complete."""
    config = config_of(arm, profile)
    run = Run(config)
    for stage in (*arm.trainers, "inference", "evaluation"):
        if not run.stage(stage).done:
            print(f"{arm.study} {arm.name}: {stage}", flush=True)
            launcher.make(stage, config, run.stage(stage))


def collected(arm: Arm, profile: str) -> dict[str, Any]:
    """What the notebooks show of an arm: rates by model (`seeds`), or of its model; curves."""
    run = Run(config_of(arm, profile))
    models = read_json(run.path / "metrics.json")["models"]
    keys = [metric.key for metric in METRICS]

    def rates(model: str) -> dict[str, Any]:
        cells = models[model]
        return {k: cells[k] for k in keys} | {"harmless_refused": cells["harmless_refused"]["all"]}

    if arm.study == "seeds":
        return {"rates": {name: rates(name) for name in models}}
    trainer = "ppo" if arm.study == "kl" else arm.trainers[-1]
    page: dict[str, Any] = {"rates": rates(trainer)}
    if arm.study == "kl":
        log = read_jsonl(run.stage("ppo").metrics_path)
        page["steps"] = [row["step"] for row in log]
        page |= {k: [round(row[f"objective/{k}"], 4) for row in log] for k in ("kl", "scores")}
    return page


def main() -> None:
    """Make the studies that the command names, and write the file."""
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("studies", nargs="*", help="seeds, beta, kl, rloo; none for all")
    options.add_argument("--profile", default="demo", help="smoke tries the script")
    options.add_argument("--workers", type=int, default=1, help="processes side by side")
    options.add_argument("--output", type=Path, default=repo_root() / PUBLISHED)
    options.add_argument("--one", type=int, help=argparse.SUPPRESS)  # an arm, for a worker
    asked = options.parse_args()
    every = arms(asked.profile)
    if asked.one is not None:
        make(every[asked.one], asked.profile)
        return
    known = list(dict.fromkeys(arm.study for arm in every))
    if unknown := [name for name in asked.studies if name not in known]:
        options.error(f"unknown study {unknown[0]!r} (known: {', '.join(known)})")
    wanted = [i for i, arm in enumerate(every) if arm.study in (asked.studies or known)]
    # The run of the first seed has the reward model that others use.
    needed = [0] if any(every[i].needs_reward for i in wanted) else []
    runs = {every[i].run_name: i for i in reversed([*needed, *wanted])}
    command = ["benchmarks.studies", "--profile", asked.profile, "--one"]
    for needing in (False, True):
        part = sorted(i for i in runs.values() if every[i].needs_reward == needing)
        common.side_by_side([[*command, str(i)] for i in part], asked.workers)
    page = read_json(asked.output) if asked.output.is_file() else {}
    for index in wanted:
        arm = every[index]
        page.setdefault(arm.study, {})[arm.name] = collected(arm, asked.profile)
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(asked.output, page)
    print(json.dumps({"studies": {name: list(part) for name, part in page.items()}}))


if __name__ == "__main__":
    main()
