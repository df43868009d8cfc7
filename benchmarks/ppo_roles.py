"""PPO's policy and value model at the same time, and one after another, on the demo's model.

    python -m benchmarks.ppo_roles

Takes the same steps of the demo with and without the second thread, from the same weights, in turns
in one process. Compares every logged number and every weight. Writes `results/ppo_roles.json`.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import common
from spavl_lib.config import Config, load_config
from spavl_lib.data.load import load_preferences
from spavl_lib.modelling.heads import save_reward_model
from spavl_lib.runs.stage import Run
from spavl_lib.trainers.ppo import PPOTrainer
from spavl_lib.trainers.reward import build_model

STEPS = 6  # the first one warms up


def new_trainer(config: Config, folder: Path, together: bool) -> PPOTrainer:
    """A PPO trainer of the demo against an untrained reward model."""
    stage = Run(config, root=folder / str(together)).stage("ppo")
    rows = load_preferences(config.data, "train")
    trainer = PPOTrainer(config, stage, rows, folder / "reward", False)
    trainer.side_by_side.allowed = together
    return trainer


def timed_step(trainer: PPOTrainer, step: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a step's rollout and updates, and the logged numbers."""
    trainer.step = step
    with trainer.tower_cache().rollout() as cache:
        started = time.perf_counter()
        rollout = trainer.roll_out(step, cache)
        sampled = time.perf_counter()
        stats = trainer.update(rollout, cache)
    times = {"rollout": sampled - started, "updates": time.perf_counter() - sampled}
    return times | {"step": sum(times.values())}, stats


def main() -> None:
    """Time both ways and compare."""
    torch.set_num_threads(1)
    config = load_config("demo")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        save_reward_model(build_model(config), folder / "reward", config.model)
        trainers = {together: new_trainer(config, folder, together) for together in (False, True)}
        if not trainers[True].side_by_side.works:
            raise SystemExit("two threads need two cores and no GPU")
        taken: dict[bool, list] = {False: [], True: []}
        for step in range(STEPS):
            for together, trainer in trainers.items():
                taken[together].append(timed_step(trainer, step))
    seconds = {
        way: {
            part: statistics.median(times[part] for times, _ in taken[together][1:])
            for part in ("rollout", "updates", "step")
        }
        for way, together in (("one_after_another", False), ("side_by_side", True))
    }
    weights = [list(trainer.model.parameters()) for trainer in trainers.values()]
    common.finish(
        "ppo_roles",
        {
            "seconds": seconds,
            "times_faster": seconds["one_after_another"]["step"] / seconds["side_by_side"]["step"],
            "numbers_equal": [s for _, s in taken[False]] == [s for _, s in taken[True]],
            "weights_equal": all(map(torch.equal, *weights)),
        },
    )


if __name__ == "__main__":
    main()
