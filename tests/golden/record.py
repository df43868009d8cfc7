"""Golden trajectories: what a test holds on to, step by step.

    python -m tests.golden.record dpo_lora --reason "cosine instead of linear: docs/log.md, ..."

To be recorded anew only where numbers are meant to move: without a reason nothing is written, and
the reasons stay in the file.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from spavl_lib.config import load_config
from spavl_lib.modelling.load import weights_sha256
from spavl_lib.runs import provenance
from spavl_lib.runs.files import read_jsonl
from spavl_lib.runs.maker import maker_of
from spavl_lib.runs.stage import Run
from tests.helpers import SUPERVISED

FOLDER = Path(__file__).parent
STEPS = 50
# One line an algorithm: its trainer, and what is set over the smoke profile.
OVERRIDES = {
    **SUPERVISED,
    "ppo": (
        "ppo",
        {"ppo.rollout_batch_size": 2, "ppo.max_new_tokens": 8, "ppo.num_minibatches": 1},
    ),
}
KEPT = ("loss", "grad_norm", "objective/scores", "objective/kl", "loss/policy_avg")


def path_of(name: str) -> Path:
    """Where a recording lies."""
    return FOLDER / f"{name}.json"


def sets_of(name: str) -> dict:
    """What is set for it: 50 steps of 2 pairs, or as many rollouts."""
    kind, more = OVERRIDES[name]
    section = {"max_steps": STEPS, "save_steps": STEPS, "per_device_batch_size": 2}
    section |= {"warmup_steps": 5, "learning_rate": 2e-4}
    sets = {"data.train_rows": 32, "data.validation_rows": 4}
    return sets | {f"{kind}.{k}": v for k, v in section.items()} | more


def conditions() -> dict:
    """What must be equal for bits to be: versions, processor, threads."""
    machine = provenance.machine()
    keys = ("architecture", "cpu", "cpu_flags_sha256", "num_threads", "gpu")
    return {"versions": provenance.versions()} | {k: machine[k] for k in keys}


def trajectory(name: str, root: Path) -> dict:
    """Train: the kept numbers by step, and what they rest on.

    Raises:
        KeyError: `name` is no trainer that is recorded.
    """
    torch.set_num_threads(1)  # as many on every machine
    kind = OVERRIDES[name][0]
    config = load_config("smoke", sets_of(name), seed=0, run_name="golden")
    run = Run(config, root=root)
    if kind == "ppo":
        short = load_config("smoke", {"reward.max_steps": 2}, seed=0, run_name="golden")
        maker_of("reward")(short, Run(short, root=root).stage("reward"))
    maker_of(kind)(config, run.stage(kind))
    rows = read_jsonl(run.stage(kind).metrics_path)
    rows = [row for row in rows if any(k in row for k in KEPT)]
    return {
        "sets": sets_of(name),
        "inputs": weights_sha256(config.model),
        "conditions": conditions(),
        "steps": {k: [r[k] for r in rows if k in r] for k in KEPT if any(k in r for r in rows)},
        "row_ids": [r["row_ids"] for r in rows if "row_ids" in r],
        "weights_sha256": run.stage(kind).summary["weights_sha256"],
    }


def record(name: str, reason: str) -> Path:
    """Train, and write the recording with the reason for it."""
    with tempfile.TemporaryDirectory() as root:
        page = trajectory(name, Path(root))
    path = path_of(name)
    before = json.loads(path.read_text(encoding="utf-8"))["reasons"] if path.is_file() else []
    page["reasons"] = [*before, f"{time.strftime('%Y-%m-%d')}: {reason}"]
    page["sealed"] = provenance.canonical_sha256(page)
    path.write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
    return path


def main() -> None:
    """Record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="+", choices=sorted(OVERRIDES))
    parser.add_argument("--reason", required=True, help="why the numbers move; kept in the file")
    words = parser.parse_args()
    if len(words.reason.split()) < 3:
        parser.error("--reason: say in a few words why the numbers move")
    for name in words.names:
        print(f"{record(name, words.reason)}: {STEPS} steps")


if __name__ == "__main__":
    main()
