"""The same notebooks with two processes: the same files, and the losses of one process."""

import pytest

from spavl_lib.config import load_config
from spavl_lib.notebook import execute
from spavl_lib.runs.files import read_jsonl
from spavl_lib.runs.stage import Run

OVERRIDES = {
    "reward.per_device_batch_size": 4, "reward.gradient_accumulation_steps": 2,
    "dpo.per_device_batch_size": 4, "dpo.gradient_accumulation_steps": 2,
    "ppo.per_device_batch_size": 2,
}  # fmt: skip
LOSSES = (
    ("reward", 6, "loss"), ("dpo", 6, "loss"),
    ("ppo", 3, "loss/policy_avg"), ("ppo", 3, "loss/value_avg"),
)  # fmt: skip
# Written by one way of running and not by the other, or of this run alone.
OWN = {"executed.ipynb", "manifest.json", "source.diff", "status.json"}


def run_all_of(names: tuple[str, ...], processes: int) -> Run:
    overrides = OVERRIDES | {"launch.num_processes": processes}
    config = load_config("smoke", overrides, run_name=f"notebooks-{processes}")
    run = Run(config)
    for name in names:
        execute.run_notebook(name, config, overrides, run)
    return run


@pytest.mark.slow
@pytest.mark.notebooks
def test_notebooks_execute_headless_with_two_processes() -> None:
    names = ("02_reward_model", "03_ppo", "04_dpo", "05_inference")
    alone, two = (run_all_of(names, n) for n in (1, 2))
    for stage in ("reward", "ppo", "dpo", "inference"):
        files = [
            {str(p.relative_to(run.path)) for p in (run.path / stage).rglob("*") if p.is_file()}
            for run in (alone, two)
        ]
        shown = [{f for f in names if not f.rpartition("/")[2].startswith(".")} for names in files]
        assert {f for f in shown[0] if f.rpartition("/")[2] not in OWN and "rank-" not in f} == {
            f for f in shown[1] if f.rpartition("/")[2] not in OWN and "rank-" not in f
        }
    for stage, steps, key in LOSSES:
        logs = [read_jsonl(run.stage(stage).metrics_path) for run in (alone, two)]
        losses = [{r["step"]: r[key] for r in log if key in r} for log in logs]
        assert losses[0].keys() == losses[1].keys() and len(losses[0]) == steps
        for step, loss in losses[0].items():
            assert losses[1][step] == pytest.approx(loss, abs=1e-5), f"{stage}, step {step}"
        assert two.stage(stage).summary["launch"]["world_size"] == 2
