"""Golden trajectories: `python -m tests.golden.record dpo` writes the numbers a test holds on to.

To be recorded anew only where numbers are meant to move; the commit says why.
"""

import argparse
import importlib.metadata
import json
import platform
import tempfile
from pathlib import Path

from spavl_lib.config import load_config
from spavl_lib.modelling.load import weights_sha256
from spavl_lib.run import Run, read_jsonl
from spavl_lib.trainers.dpo import train_dpo

FOLDER = Path(__file__).parent
STEPS = 10
OVERRIDES = {"dpo": {"dpo.max_steps": STEPS, "dpo.save_steps": STEPS, "dpo.warmup_steps": 2,
                     "dpo.learning_rate": 1e-3}}  # fmt: skip
KEPT = ("loss", "grad_norm")


def path_of(name: str) -> Path:
    """Where a recording lies."""
    return FOLDER / f"{name}.json"


def trajectory(name: str, root: Path) -> dict:
    """Run a trainer at smoke scale: its kept numbers by step, and what they rest on.

    Raises:
        KeyError: `name` is no trainer that is recorded.
    """
    config = load_config("smoke", OVERRIDES[name], seed=0, run_name="golden")
    stage = Run(config, root=root).stage(name)
    {"dpo": train_dpo}[name](config, stage)
    rows = [row for row in read_jsonl(stage.metrics_path) if "loss" in row]
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "numpy", "pillow")
    return {
        "overrides": OVERRIDES[name],
        "inputs": weights_sha256(config.model),
        "versions": {p: importlib.metadata.version(p) for p in packages},
        "machine": platform.machine(),
        **{key: [row[key] for row in rows] for key in KEPT},
    }


def main() -> None:
    """Record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("name", choices=sorted(OVERRIDES))
    name = parser.parse_args().name
    with tempfile.TemporaryDirectory() as root:
        page = trajectory(name, Path(root))
    path_of(name).write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
    print(f"{path_of(name)}: {STEPS} steps")


if __name__ == "__main__":
    main()
