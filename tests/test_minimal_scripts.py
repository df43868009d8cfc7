"""The one-file trainers in `scripts/` take the steps that the library's trainers take."""

import ast
import json
from pathlib import Path

import pytest

from spavl_lib.config import load_config
from spavl_lib.data.load import load_preferences
from spavl_lib.runs.stage import Run
from spavl_lib.trainers.ppo import PPOTrainer
from tests.golden.record import path_of, sets_of
from tests.helpers import load_script

SCRIPTS = Path(__file__).parents[1] / "scripts"
STEPS = 8  # beyond the warm-up


def test_dpo_takes_the_recorded_steps() -> None:
    """The recording is the library's own; `tests/golden` holds it to the library."""
    recorded = json.loads(path_of("dpo_full").read_text(encoding="utf-8"))["steps"]
    config = load_config("smoke", sets_of("dpo_full"), seed=0)
    _, log = load_script("dpo_minimal").train(config, stop_after=STEPS)
    for key in ("loss", "grad_norm"):
        found = [row[key] for row in log]
        assert found == pytest.approx(recorded[key][:STEPS], rel=2e-4), key
    assert log[0]["rewards/margins"] == 0


def test_ppo_updates_as_the_library_does(reward_folders: dict[str, Path], tmp_path: Path) -> None:
    """Two rollouts, with the responses that the library sampled."""
    sets = {
        "model.adapter": "full", "data.train_rows": 12, "ppo.rollout_batch_size": 6,
        "ppo.per_device_batch_size": 6, "ppo.max_new_tokens": 10, "ppo.max_steps": 2,
        "ppo.warmup_steps": 2, "ppo.reward_model": str(reward_folders["full"]),
    }  # fmt: skip
    config = load_config("smoke", sets, run_name="p")
    rows = load_preferences(config.data, "train")
    stage = Run(config, root=tmp_path).stage("ppo")
    library = PPOTrainer(config, stage, rows, reward_folders["full"], False)
    ours = load_script("ppo_minimal").PPO(config, reward_folders["full"])
    for step in range(2):
        with library.tower_cache().rollout() as cache:
            rollout = library.roll_out(step, cache)
            expected = library.update(rollout, cache)
        library.step += 1
        records, prompts = ours.prompts_of(step)
        assert [r["id"] for r in records] == [p.row_id for p in rollout.prompts]
        found = ours.update(step, records, prompts, rollout.responses)
        for name, value in found.items():
            assert value == pytest.approx(expected[name], rel=1e-4, abs=1e-5), (step, name)
        answers = ours.sample(prompts)
        assert all(0 < len(a) <= 10 and not set(a[:-1]) & {*ours.never, ours.end} for a in answers)


@pytest.mark.parametrize("name", ["dpo_minimal", "ppo_minimal"])
def test_only_rows_and_models_come_from_the_library(name: str) -> None:
    tree = ast.parse((SCRIPTS / f"{name}.py").read_text(encoding="utf-8"))
    found = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    ours = {name for name in found if name.startswith("spavl_lib")}
    allowed = (
        "spavl_lib.config",
        "spavl_lib.data.",
        "spavl_lib.modelling.load",
        "spavl_lib.modelling.heads",
    )
    assert {name for name in ours if not name.startswith(allowed)} == set()
