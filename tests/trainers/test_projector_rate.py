"""`model.projector_learning_rate`: the projector's own rate, in every trainer."""

from pathlib import Path

import pytest
import torch

from spavl_lib.config import Config
from spavl_lib.errors import InputError
from spavl_lib.modelling.adapters import separate_projector
from spavl_lib.modelling.families import family_of
from spavl_lib.runs.maker import maker_of
from spavl_lib.runs.stage import Run
from tests.helpers import embedded_model, smoke

pytestmark = pytest.mark.filterwarnings("ignore")
TRAINERS = ("reward", "dpo", "kto", "grpo", "ppo")


def settings(name: str, adapter: str, rate: float, **changes: object) -> Config:
    section = {"max_steps": 3, "learning_rate": 1e-3, "warmup_steps": 0}
    sampling = {"grpo.per_device_batch_size": 8, "grpo.temperature": 3.0}
    return smoke(
        {
            "model.adapter": adapter, "data.train_rows": 8, "data.validation_rows": 4,
            "model.projector_learning_rate": rate,
        }
        | {f"{name}.{key}": value for key, value in section.items()}
        | (sampling if name == "grpo" else {})
        | changes,
        run_name="r",
    )  # fmt: skip


def test_the_projector_moves_to_a_group_of_its_own() -> None:
    model = embedded_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    separate_projector(optimizer, model, 0.25)
    first, own = optimizer.param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert (first["lr"], own["lr"]) == (0.5, 0.25)
    assert {family_of(model).part_of(names[id(p)]) for p in own["params"]} == {"projector"}
    assert "projector" not in {family_of(model).part_of(names[id(p)]) for p in first["params"]}
    assert len(first["params"]) + len(own["params"]) == len(names)
    plain = torch.optim.AdamW(model.parameters(), lr=0.5)
    separate_projector(plain, model, 0.0)
    assert len(plain.param_groups) == 1


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_uses_the_rate(
    name: str, reward_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its first step AdamW moves a parameter by its rate."""
    against = {f"{name}.reward_model": str(reward_folders["lora"])}
    config = settings(name, "lora", 1e-5, **(against if name in ("grpo", "ppo") else {}))
    seen: list[list[tuple[float, float]]] = []  # of each step and group: rate, largest change
    old = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *args: object, **options: object) -> object:
        before = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]
        result = old(self, *args, **options)
        changes = [
            max(
                (float((p - b).abs().max()) for p, b in zip(g["params"], was, strict=True)),
                default=0,
            )
            for g, was in zip(self.param_groups, before, strict=True)
        ]
        seen.append([(g["lr"], c) for g, c in zip(self.param_groups, changes, strict=True)])
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    maker_of(name)(config, Run(config, root=tmp_path).stage(name))
    own = [change for rate, change in seen[0] if rate == 1e-5]
    others = [change for rate, change in seen[0] if rate == 1e-3]
    assert len(own) + len(others) == len(seen[0])
    assert max(own) == pytest.approx(1e-5, rel=0.05)
    assert max(others) == pytest.approx(1e-3, rel=0.05)


def test_settings_that_nothing_reads_are_refused() -> None:
    with pytest.raises(InputError, match="no effect without train_projector"):
        settings("dpo", "lora", 1e-4, **{"model.train_projector": False})
