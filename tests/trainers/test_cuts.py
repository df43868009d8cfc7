"""A step's loss and gradient do not depend on how its pairs are cut into micro-batches."""

import functools
import math
import typing
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from spavl_lib.config.sections import SMOOTHED, DPOLoss
from spavl_lib.runs.stage import Run
from spavl_lib.trainers import dpo, reward
from tests.helpers import UNUSED, embedded_processor, mini_rows, smoke

pytestmark = pytest.mark.filterwarnings("ignore")
PAIRS = 4
# Sizes of the micro-batches. The last one of an epoch can be smaller than the others.
CUTS = [(4,), (2, 2), (1, 1, 1, 1), (3, 1)]
LOSSES = {
    "sigmoid+sft": (("sigmoid", "sft"), (1.0, 1.0)),
    "ipo+sft": (("ipo", "sft"), (0.5, 2.0)),
    "orpo+sft": (("orpo", "sft"), (0.3, 1.0)),
}


def step(trainer: Any, rows: list[dict], cut: Sequence[int]) -> tuple[float, Tensor]:
    """Loss and gradient of one optimizer step, as transformers' loop adds them up."""
    ends = [sum(cut[: n + 1]) for n in range(len(cut))]
    batches = [
        trainer.data_collator(rows[end - size : end]) for size, end in zip(cut, ends, strict=True)
    ]
    batches, _ = trainer.get_batch_samples(iter(batches), len(cut), torch.device("cpu"))
    trainer.model.train()
    trainer.model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)) / len(cut)
        loss.backward()
        total += loss.item()
    gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return total, torch.cat(gradients)


def built(kind: str, **settings: Any) -> Any:
    config = smoke({"model.adapter": "frozen"} | settings, run_name="r")
    stage = Run(config, root=UNUSED).stage(kind)
    rows = mini_rows().select(range(PAIRS))
    if kind == "reward":
        return reward.build_trainer(config, stage, embedded_processor(), rows)
    trainer = dpo.build_trainer(config, stage, embedded_processor(), rows, rows)
    torch.manual_seed(0)
    with torch.no_grad():  # away from the reference
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return trainer


def unlike_rows() -> list[dict]:
    """Pairs whose chosen answers differ much in length."""
    rows = [dict(row) for row in mini_rows().select(range(PAIRS))]
    for n, row in enumerate(rows):
        row["chosen"] = " ".join(row["chosen"].split()[: 2 + 3 * n])
    return rows


def assert_one_step(trainer: Any) -> None:
    rows = unlike_rows()
    loss, gradient = step(trainer, rows, CUTS[0])
    assert gradient.norm() > 1e-3
    for cut in CUTS[1:]:
        other_loss, other = step(trainer, rows, cut)
        assert other_loss == pytest.approx(loss, rel=1e-5), cut
        assert (other - gradient).norm() < 1e-4 * gradient.norm(), cut


@pytest.mark.parametrize("name", LOSSES)
def test_dpo_takes_one_step_however_it_is_cut(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, weights = LOSSES[name]
    trainer = built("dpo", **{"dpo.loss_type": losses, "dpo.loss_weights": weights})
    assert_one_step(trainer)
    # The same without the weights: what the tolerance must catch.
    monkeypatch.setattr(type(trainer), "shares", lambda *_: (1.0, 1.0))
    whole, parts = (step(trainer, unlike_rows(), cut)[1] for cut in (CUTS[0], CUTS[2]))
    assert (parts - whole).norm() > 1e-2 * whole.norm()


@functools.cache
def loss_of_one_step(name: str) -> tuple[float, float]:
    """Loss and norm of the gradient of one step with one of DPO's losses."""
    trainer = built("dpo", **{
        "dpo.loss_type": (name,), "dpo.loss_weights": (1.0,),
        "dpo.label_smoothing": 0.1 if name in SMOOTHED else 0.0,
    })  # fmt: skip
    loss, gradient = step(trainer, unlike_rows(), CUTS[0])
    return loss, gradient.norm().item()


@pytest.mark.parametrize("name", typing.get_args(DPOLoss))
def test_every_loss_of_dpo_trains(name: str) -> None:
    loss, norm = loss_of_one_step(name)
    assert math.isfinite(loss) and 1e-6 < norm < math.inf


def test_a_smoothed_loss_is_not_the_plain_one() -> None:
    assert abs(loss_of_one_step("robust")[0] - loss_of_one_step("sigmoid")[0]) > 1e-4


def test_the_reward_model_takes_one_step_however_it_is_cut() -> None:
    assert_one_step(built("reward", **{"reward.center_coef": 0.1, "reward.sft_coef": 0.2}))


def test_a_step_in_one_piece_is_weighted_by_exactly_one() -> None:
    trainer = built("dpo")
    batch = trainer.data_collator(unlike_rows())
    trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert trainer.shares(batch, True) == (1.0, 1.0) == trainer.shares(batch, False)
    assert trainer.loss_weights == [1.0, 1.0]
    trainer.get_batch_samples(iter([]), 1, torch.device("cpu"))
    assert trainer.in_step is None
