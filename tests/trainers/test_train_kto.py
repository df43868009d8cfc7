"""KTO: single responses from pairs, a loss equal to its formula, and runs that resume."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import sigmoid

from spavl_lib.config import Config
from spavl_lib.errors import InputError, Preempted
from spavl_lib.modelling.load import load_policy
from spavl_lib.runs.stage import Run
from spavl_lib.stages import policies
from spavl_lib.trainers import kto
from spavl_lib.trainers.progress import StageCallback
from tests.helpers import UNUSED, embedded_processor, logps_of, metric_rows, mini_rows, smoke

pytestmark = pytest.mark.filterwarnings("ignore")
PAIRS = 3


def settings(adapter: str, **changes: object) -> Config:
    section = {
        "max_steps": 6, "per_device_batch_size": 4, "gradient_accumulation_steps": 2,
        "save_steps": 2, "warmup_steps": 0, "learning_rate": 1e-3, "desirable_weight": 1.3,
    }  # fmt: skip
    named = {f"kto.{key}": value for key, value in (section | changes).items()}
    rows = {"data.train_rows": 6, "data.validation_rows": 4, "model.adapter": adapter}
    return smoke(rows | named, run_name="r")


def test_pairs_become_single_responses() -> None:
    rows = mini_rows().select(range(PAIRS))
    single = kto.unpaired(rows)
    assert single["id"] == [*rows["id"], *rows["id"]]
    assert single["completion"] == [*rows["chosen"], *rows["rejected"]]
    assert single["label"] == [True] * PAIRS + [False] * PAIRS
    assert single["image"] == [*rows["image"], *rows["image"]]


@pytest.mark.parametrize("adapter", ["frozen", "lora"])
@pytest.mark.parametrize("share", ["auto", "off"])
def test_the_loss_is_the_formula(adapter: str, share: str) -> None:
    config = smoke(
        {
            "model.adapter": adapter, "model.share_prefix": share, "kto.desirable_weight": 1.3,
            "kto.undesirable_weight": 0.6, "kto.beta": 0.2,
        },
        run_name="r",
    )  # fmt: skip
    rows, processor = mini_rows().select(range(PAIRS)), embedded_processor()
    trainer = kto.build_trainer(
        config, Run(config, root=UNUSED).stage("kto"), processor, rows, rows
    )
    single = [trainer.train_dataset[i] for i in (0, 4, 1, 5, 2)]  # two images; both labels
    batch = trainer._prepare_inputs(trainer.data_collator(single))
    turned = [single[i - 1]["completion"] for i in range(len(single))]
    own = processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    other = processor.tokenizer.batch_decode(batch["KL_input_ids"], skip_special_tokens=True)
    for row, late, text, second in zip(single, turned, own, other, strict=True):
        assert text.endswith(row["completion"]) and second.endswith(late)
        assert row["prompt"] in text and row["prompt"] in second

    def measured() -> tuple[torch.Tensor, torch.Tensor]:
        names = ("input_ids", "attention_mask", "completion_mask")
        plain = {n: batch[n] for n in names} | {"pixel_values": batch["pixel_values"]}
        kl = {n: batch[f"KL_{n}"] for n in names} | {"pixel_values": batch["pixel_values"]}
        return logps_of(trainer.model, plain), logps_of(trainer.model, kl)

    with torch.no_grad():
        reference, reference_kl = measured()
        torch.manual_seed(0)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.03 * torch.randn_like(parameter)
        logps, logps_kl = measured()
    assert (logps - reference).abs().max() > 0.1
    kl = (logps_kl - reference_kl).mean().clamp(min=0)
    signs = torch.tensor([1.0 if row["label"] else -1.0 for row in single])
    weights = torch.where(signs > 0, 1.3, 0.6)
    losses = weights * (1 - sigmoid(0.2 * signs * (logps - reference - kl)))
    found = trainer.compute_loss(trainer.model, dict(batch))
    assert found.item() == pytest.approx(losses.mean().item(), rel=1e-5)
    found.backward()
    assert sum(p.grad.norm() for p in trainer.model.parameters() if p.grad is not None) > 1e-3


def test_micro_batches_of_different_sizes_count_by_their_responses() -> None:
    config = settings("lora")
    stage, rows = Run(config, root=UNUSED).stage("kto"), mini_rows().select(range(PAIRS))
    trainer = kto.build_trainer(config, stage, embedded_processor(), rows, rows)
    single = [trainer.train_dataset[i] for i in range(2 * PAIRS)]
    parts = [trainer.data_collator(single[:4]), trainer.data_collator(single[4:])]
    trainer.get_batch_samples(iter(parts), 2, "cpu")
    assert [trainer.shares(p, training=True)[0] for p in parts] == [4 / 3, 2 / 3]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_stopped_run_goes_on_to_the_same_end(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(adapter)
    straight = Run(config, root=tmp_path / "straight").stage("kto")
    expected = kto.train_kto(config, straight)
    old = StageCallback.on_step_end

    def stop(self: object, args: object, state: object, *rest: object, **more: object):  # noqa: ANN202
        if state.global_step == 3:
            self.flag.reason = "SIGTERM"
        return old(self, args, state, *rest, **more)

    monkeypatch.setattr(StageCallback, "on_step_end", stop)
    stage = Run(config, root=tmp_path / "stopped").stage("kto")
    with pytest.raises(Preempted):
        kto.train_kto(config, stage)
    monkeypatch.setattr(StageCallback, "on_step_end", old)
    assert kto.train_kto(config, stage)["weights_sha256"] == expected["weights_sha256"]
    assert metric_rows(stage) == metric_rows(straight)


def test_a_training_ends_learns_and_leaves_a_policy(tmp_path: Path) -> None:
    config = settings("lora", gradient_accumulation_steps=1, max_steps=8)
    stage = Run(config, root=tmp_path).stage("kto")
    summary = kto.train_kto(config, stage)
    first, last = metric_rows(stage)[0], metric_rows(stage)[7]
    assert abs(first.get("rewards/chosen", 0)) < 1e-4 > abs(first.get("rewards/rejected", 0))
    assert last["loss"] < first["loss"]
    assert summary["steps"] == 8 and "eval_loss" in summary["validation"]
    assert "kto" in policies() and load_policy(config.model, stage.path / "model")
    assert "as single responses" in (stage.path / "model/README.md").read_text()


def test_settings() -> None:
    with pytest.raises(InputError, match=r"kto.per_device_batch_size"):
        smoke({"kto.per_device_batch_size": 1})
    with pytest.raises(InputError, match="nothing would be trained"):
        smoke({"kto.num_epochs": 0})
