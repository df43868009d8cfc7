"""SimPO, ORPO and cDPO in the trainer: equal to their formulas, and without a reference."""

from pathlib import Path

import pytest
import torch

from spavl_lib.errors import InputError
from spavl_lib.objectives.dpo import dpo_loss
from spavl_lib.objectives.logps import sequence_logps
from spavl_lib.objectives.preference import cdpo_loss, orpo_loss, simpo_loss
from spavl_lib.runs.files import read_jsonl
from spavl_lib.runs.stage import Run
from spavl_lib.trainers import dpo
from spavl_lib.trainers.dpo import train_dpo
from tests.helpers import UNUSED, embedded_processor, mini_rows, smoke

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = 6  # two images with three questions each
SETTINGS = {
    "simpo": {"dpo.loss_type": ("simpo",), "dpo.loss_weights": (0.7,), "dpo.beta": 2.0},
    "orpo": {"dpo.loss_type": ("sft", "orpo"), "dpo.loss_weights": (1.0, 0.3)},
    "cdpo": {"dpo.loss_type": ("cdpo",), "dpo.loss_weights": (0.5,), "dpo.label_smoothing": 0.1},
}


def expected(name: str, logps: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor) -> float:
    """The loss of a batch, from summed log-probabilities (responses,)."""
    tokens = mask[:, 1:].sum(1)
    means = (logps / tokens).chunk(2)
    if name == "simpo":
        return 0.7 * simpo_loss(*means, beta=2.0, margin=0.5).mean().item()
    if name == "orpo":
        chosen, of_chosen = logps.chunk(2)[0], tokens.chunk(2)[0]
        return (-chosen.sum() / of_chosen.sum() + 0.3 * orpo_loss(*means).mean()).item()
    terms = dpo_loss(*logps.chunk(2), *reference.chunk(2), beta=0.1)
    margins = terms.chosen_rewards - terms.rejected_rewards
    return 0.5 * cdpo_loss(margins, label_smoothing=0.1).mean().item()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("adapter", ["frozen", "lora"])
@pytest.mark.parametrize("share", ["auto", "off"])
def test_the_loss_is_the_formulas(name: str, adapter: str, share: str) -> None:
    config = smoke(
        {"model.adapter": adapter, "model.share_prefix": share} | SETTINGS[name], run_name="r"
    )
    stage, rows = Run(config, root=UNUSED).stage("dpo"), mini_rows().select(range(ROWS))
    trainer = dpo.build_trainer(config, stage, embedded_processor(), rows, rows)
    batch = trainer._prepare_inputs(trainer.data_collator([rows[i] for i in range(ROWS)]))
    inputs = {k: v for k, v in batch.items() if k != "completion_mask"}
    mask = batch["completion_mask"].bool()
    with torch.no_grad():
        reference = sequence_logps(trainer.model(**inputs).logits, batch["input_ids"], mask)
        torch.manual_seed(0)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.03 * torch.randn_like(parameter)
        logps = sequence_logps(trainer.model(**inputs).logits, batch["input_ids"], mask)
    assert (logps - reference).abs().max() > 0.1
    if name != "cdpo":
        dpo.leave_out_reference(trainer)
    calls: list[int] = []
    trainer.model.register_forward_hook(lambda *_: calls.append(1))
    found = trainer.compute_loss(trainer.model, dict(batch))
    assert len(calls) == 1 + (name == "cdpo" and adapter == "lora")  # with the adapters off
    wanted = expected(name, logps, reference, mask)
    assert found.item() == pytest.approx(wanted, rel=1e-5)
    found.backward()
    assert sum(p.grad.norm() for p in trainer.model.parameters() if p.grad is not None) > 1e-3


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("adapter", ["frozen", "lora"])
def test_a_training_ends_and_learns(name: str, adapter: str, tmp_path: Path) -> None:
    settings = {
        "dpo.max_steps": 8, "dpo.learning_rate": 1e-3, "model.adapter": adapter,
        "data.train_rows": 4, "dpo.per_device_batch_size": 4,
    }  # fmt: skip
    config = smoke(settings | SETTINGS[name], run_name="r")
    stage = Run(config, root=tmp_path).stage("dpo")
    summary = train_dpo(config, stage)
    losses = [row["loss"] for row in read_jsonl(stage.metrics_path) if "loss" in row]
    card = (stage.path / "model/README.md").read_text(encoding="utf-8")
    assert ("no reference model" in card) == (name != "cdpo")
    assert summary["steps"] == 8 and losses[-1] < losses[0]  # every step sees the same pairs
    assert "eval_loss" in summary["validation"]


def test_rewards_without_a_reference_are_means(tmp_path: Path) -> None:
    """trl itself would log sums over the tokens."""
    config = smoke({"dpo.max_steps": 1, "data.train_rows": 2} | SETTINGS["simpo"], run_name="r")
    stage = Run(config, root=tmp_path).stage("dpo")
    train_dpo(config, stage)
    row = read_jsonl(stage.metrics_path)[0]
    margin = row["rewards/chosen"] - row["rewards/rejected"]
    assert row["rewards/margins"] == pytest.approx(margin, abs=1e-5)
    # The responses have more than two tokens, so sums times beta would be far lower.
    assert row["logps/chosen"] < row["rewards/chosen"] < 0


def test_plans_know_that_there_is_no_reference() -> None:
    cdpo, orpo = (smoke({"model.adapter": "full"} | SETTINGS[n]).dpo for n in ("cdpo", "orpo"))
    assert cdpo.runs_reference and not orpo.runs_reference


def test_settings_that_nothing_reads_are_refused() -> None:
    with pytest.raises(InputError, match="simpo_margin has no effect"):
        smoke({"dpo.simpo_margin": 0.3} | SETTINGS["orpo"])
    with pytest.raises(InputError, match="cache_reference has no effect"):
        smoke({"dpo.cache_reference": True} | SETTINGS["orpo"])
    assert smoke(SETTINGS["cdpo"] | {"dpo.cache_reference": True}).dpo.with_reference
