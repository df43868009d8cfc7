"""The loss sft over all of the assistant's turns of a conversation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from spavl_lib.data.schema import TURN
from spavl_lib.errors import InputError
from spavl_lib.objectives.logps import token_logps
from spavl_lib.runs.stage import Run
from spavl_lib.trainers import dpo
from spavl_lib.trainers.dpo import train_dpo
from spavl_lib.trainers.reference_cache import cache_key
from tests.helpers import UNUSED, embedded_processor, mini_rows, smoke

ALL = {"dpo.assistant_turns": "all"}


def conversations(count: int = 4) -> Dataset:
    """Rows whose odd prompts have an earlier question and answer."""
    rows = mini_rows().select(range(count))

    def talk(row: dict[str, Any], number: int) -> dict[str, Any]:
        asked = ["What do you see?", "I see a drawing.", row["prompt"]]
        return {"prompt": TURN.join(asked) if number % 2 else row["prompt"]}

    return rows.map(talk, with_indices=True)


def loss_of(settings: dict[str, Any], rows: Dataset) -> tuple[float, torch.Tensor, float]:
    """A moved policy's loss, its gradient, and the loss sft over the assistant's turns by hand."""
    config = smoke({"model.adapter": "frozen"} | settings, run_name="r")
    stage = Run(config, root=UNUSED).stage("dpo")
    trainer = dpo.build_trainer(config, stage, embedded_processor(), rows, rows)
    if not config.dpo.with_reference:
        dpo.leave_out_reference(trainer)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.03 * torch.randn_like(parameter)
    batch = trainer._prepare_inputs(trainer.data_collator(list(rows)))
    found = trainer.compute_loss(trainer.model, dict(batch))
    found.backward()
    gradient = torch.cat(
        [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    )
    mask = batch["completion_mask"][:, 1:].bool()
    inputs = {k: v for k, v in batch.items() if k not in ("completion_mask", "row_ids")}
    with torch.no_grad():
        logps = token_logps(trainer.model(**inputs).logits, batch["input_ids"])
    chosen = slice(0, len(rows))
    by_hand = -logps[chosen][mask[chosen]].mean().item()
    return found.item(), gradient, by_hand


@pytest.mark.parametrize("share", ["auto", "off"])
def test_sft_is_the_mean_over_all_of_the_assistants_tokens(share: str) -> None:
    rows, sft = conversations(), {"dpo.loss_type": ("sft",), "dpo.loss_weights": (1.0,)}
    found, _, by_hand = loss_of(sft | ALL | {"model.share_prefix": share}, rows)
    assert found == pytest.approx(by_hand, rel=1e-5)
    last, _, of_last = loss_of(sft | {"model.share_prefix": share}, rows)
    assert last == pytest.approx(of_last, rel=1e-5)
    assert abs(found - last) > 1e-3


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "cdpo"])
def test_losses_of_differences_do_not_change(name: str) -> None:
    """Earlier turns are the same on both sides, so only the part of sft may differ."""
    rows = conversations()
    more = {"dpo.label_smoothing": 0.1} if name == "cdpo" else {}

    def part(turns: dict[str, str]) -> tuple[float, torch.Tensor]:
        mixed = {"dpo.loss_type": (name, "sft"), "dpo.loss_weights": (1.0, 1.0)} | more
        alone = {"dpo.loss_type": ("sft",), "dpo.loss_weights": (1.0,)}
        (whole, gradient, _), (sft, of_sft, _) = (loss_of(s | turns, rows) for s in (mixed, alone))
        return whole - sft, gradient - of_sft

    (last, of_last), (found, gradient) = part({}), part(ALL)
    assert found == pytest.approx(last, abs=1e-5)
    assert of_last.norm() > 1e-3
    assert (gradient - of_last).norm() < 1e-4 * of_last.norm()


def test_a_training_checks_its_masks_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = conversations(6)
    monkeypatch.setattr(dpo, "load_rows", lambda *_args: [rows, rows.select(range(2))])
    config = smoke(ALL | {"dpo.max_steps": 2}, run_name="r")
    summary = train_dpo(config, Run(config, root=tmp_path).stage("dpo"))
    assert summary["steps"] == 2


def test_the_cached_reference_belongs_to_the_turns() -> None:
    processor, rows = embedded_processor(), conversations()
    keys = [cache_key(smoke(changes), processor, rows) for changes in ({}, ALL)]
    assert keys[0] != keys[1]


def test_losses_that_would_change_are_refused() -> None:
    with pytest.raises(InputError, match="has no effect without the loss sft"):
        smoke(ALL | {"dpo.loss_type": ("sigmoid",), "dpo.loss_weights": (1.0,)})
    with pytest.raises(InputError, match="would change ipo and orpo"):
        smoke(ALL | {"dpo.loss_type": ("orpo", "ipo", "sft"), "dpo.loss_weights": (1.0,) * 3})
