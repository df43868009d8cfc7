"""Notebooks 01 to 06 of the smoke profile in bf16 on the CPU: LoRA, full fine-tuning and QLoRA.

The cells run in this process, in their order, without a kernel: importing the libraries anew would
take longer than most notebooks. `tests/notebooks` executes them with papermill.
"""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from torch import nn

from spavl_lib import machine
from spavl_lib.config import load_config
from spavl_lib.modelling import roles
from spavl_lib.notebook.execute import list_notebooks, stage_of
from spavl_lib.planning import memory, shapes
from spavl_lib.planning.devices import DEVICES
from spavl_lib.runs.files import read_json
from spavl_lib.trainers import ppo_rollout

NOTEBOOKS = [p for p in list_notebooks(Path(__file__).parents[2] / "notebooks")][:6]
IN_ORDER = [(adapter, path) for adapter in ("lora", "full", "qlora") for path in NOTEBOOKS]
DEFAULT = ("02_reward_model", "03_ppo", "04_dpo")
CASES = [
    pytest.param(
        adapter, path, id=f"{adapter}-{path.stem}",
        marks=[] if adapter == "lora" and path.stem in DEFAULT else [pytest.mark.slow],
    )
    for adapter, path in [*IN_ORDER, ("frozen", NOTEBOOKS[2])]
]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore")
# A CPU multiplies bf16 many times slower than fp32.
SHORT = {
    "data.train_rows": 24, "data.validation_rows": 8, "data.test_rows": 8,
    "reward.max_steps": 2, "reward.per_device_batch_size": 4,
    "dpo.max_steps": 2, "dpo.per_device_batch_size": 4,
    "ppo.max_steps": 1, "ppo.max_new_tokens": 8, "ppo.rollout_batch_size": 4,
    "ppo.per_device_batch_size": 4, "rloo.max_steps": 1, "rloo.max_new_tokens": 8,
    "rloo.per_device_batch_size": 8, "rloo.temperature": 2.0, "generation.max_new_tokens": 8,
}  # fmt: skip


def run_cells(path: Path, **parameters: Any) -> None:
    """Run a notebook's code cells, the parameters put in after their cell, as papermill does."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{path.name}[{number}]", "exec"), names)
            if "parameters" in cell.metadata.get("tags", []):
                names.update(parameters)
    plt.close("all")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs, which the notebooks of one adapter share in whatever order they come."""
    return tmp_path_factory.mktemp("half")


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """Types of what the models' matrix products gave; the scalar heads are in fp32 by design."""
    seen, forward = set(), nn.Linear.forward

    def noted(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        out = forward(self, x)
        if self.out_features > 1:
            seen.add(out.dtype)
        return out

    monkeypatch.setattr(nn.Linear, "forward", noted)
    return seen


@pytest.fixture
def one_set_of_roles(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """Fails when roles are loaded while others are in memory."""
    alive: list[weakref.ref] = []
    load = roles.load_roles

    def loaded(*args: Any, **options: Any) -> roles.Roles:
        gc.collect()
        assert not [kept for kept in alive if kept() is not None], "two sets of roles in memory"
        made = load(*args, **options)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(roles, "load_roles", loaded)
    monkeypatch.setattr(ppo_rollout, "load_roles", loaded)
    return alive


@pytest.mark.parametrize(("adapter", "path"), CASES)
def test_a_notebook_runs_in_bf16(
    adapter: str, path: Path, root: Path, products: set, one_set_of_roles: list,
    monkeypatch: pytest.MonkeyPatch, repo: Path,
) -> None:  # fmt: skip
    if adapter == "qlora":
        pytest.importorskip("bitsandbytes", reason="4 bit needs bitsandbytes")
    monkeypatch.setenv(machine.DTYPE, "bf16")
    monkeypatch.setenv("SPAVL_RUNS", str(root))
    monkeypatch.chdir(repo)
    overrides = SHORT | {"model.adapter": adapter}
    stage = root / adapter / stage_of(path)
    made_before = (stage / "summary.json").is_file()  # by a later notebook that came first
    run_cells(path, profile="smoke", seed=1, run_name=adapter, overrides=overrides)
    assert read_json(stage / "manifest.json")["dtype"] == "bf16"
    assert (stage / "summary.json").is_file()
    if stage.name in DEFAULT:
        assert products == {torch.bfloat16}
    # 03: the first rollout, and the run. 03b: section 1, and three variants of PPO.
    assert made_before or len(one_set_of_roles) >= {"ppo": 2, "practice": 4}.get(stage.name, 0)


def test_one_set_of_roles_fits_a_t4_and_two_do_not() -> None:
    config = load_config("colab")
    shape = shapes.shape_of(shapes.model_config(config.model), config.model.lora_targets)
    batch = memory.longest_batch("ppo", config, shape, 0)
    parts = memory.peak_bytes("ppo", config, shape, batch, cpu=False)
    peak = sum(parts.values()) * (1 + memory.ALLOCATOR_SLACK) / machine.GIB
    held = (parts["weights"] + parts["adapters"]) / machine.GIB
    assert peak < DEVICES["t4"].memory_gib < peak + held
