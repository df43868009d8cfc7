"""trl's own trainer over shared prefixes, and ours: the same losses with and without."""

import copy

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from spavl_lib.data.collate import PreferenceCollator
from spavl_lib.modelling.speed.completion_head import score_completions_only
from spavl_lib.modelling.speed.shared_prefix import share_prefix
from tests.helpers import embedded_model, embedded_processor, mini_rows

# MPO's mix is sigmoid, bco_pair and sft (Wang et al. 2024, arXiv:2411.10442).
LOSSES = {
    "sigmoid": (["sigmoid"], [1.0]),
    "ipo": (["ipo"], [1.0]),
    "hinge": (["hinge"], [1.0]),
    "robust": (["robust"], [1.0]),
    "apo_zero": (["apo_zero"], [1.0]),
    "mpo": (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def trl_trainer(folder: str, loss: str, rows: Dataset) -> DPOTrainer:
    """trl's trainer as it comes, a moved policy against the base."""
    names, weights = LOSSES[loss]
    policy = embedded_model(own=True)
    policy.model.vision_tower.requires_grad_(False)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.model.language_model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    arguments = DPOConfig(
        output_dir=folder, loss_type=names, loss_weights=weights, max_length=None, use_cpu=True,
        per_device_train_batch_size=6, report_to=[], disable_tqdm=True, bf16=False, max_steps=3,
        remove_unused_columns=False, gradient_checkpointing=False, learning_rate=1e-3,
        label_smoothing=0.1, logging_steps=1,
    )  # fmt: skip
    return DPOTrainer(
        model=policy, ref_model=embedded_model(own=True).requires_grad_(False), args=arguments,
        data_collator=PreferenceCollator(embedded_processor()), train_dataset=rows,
        processing_class=embedded_processor(),
    )  # fmt: skip


def loss_and_gradient(trainer: DPOTrainer, batch: dict) -> tuple[float, torch.Tensor]:
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradients)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_trls_losses_are_equal_with_and_without(loss: str, tmp_path: object) -> None:
    rows = mini_rows().select(range(6))  # two images with three questions each
    trainer = trl_trainer(str(tmp_path), loss, rows)
    batch = trainer.data_collator(list(rows))
    plain, plain_gradient = loss_and_gradient(trainer, batch)
    handles = [share_prefix(m, strict=True) for m in (trainer.model, trainer.ref_model)]
    shared, shared_gradient = loss_and_gradient(trainer, batch)
    assert [h.stats["shared"] for h in handles] == [1, 1]
    for model in (trainer.model, trainer.ref_model):
        score_completions_only(model)
    ours, our_gradient = loss_and_gradient(trainer, batch)
    assert plain_gradient.norm() > 1e-3
    for value, gradient in ((shared, shared_gradient), (ours, our_gradient)):
        assert value == pytest.approx(plain, rel=1e-4)
        assert (gradient - plain_gradient).norm() < 1e-4 * plain_gradient.norm()


def test_trls_training_goes_the_same_way(tmp_path: object) -> None:
    """Whole updates, optimizer and all, and the metrics trl logs."""
    rows = mini_rows().select(range(12))
    logs = []
    for shared in (False, True):
        trainer = trl_trainer(str(tmp_path), "mpo", rows)
        if shared:
            for model in (trainer.model, trainer.ref_model):
                share_prefix(model, strict=True)
                score_completions_only(model)
        trainer.train()
        logs.append([row for row in trainer.state.log_history if "loss" in row])
    assert len(logs[0]) == 3
    same = [k for k in logs[0][0] if k.partition("/")[0] not in ("step_time",)]
    assert "logits/chosen" in same and "entropy" in same and "mean_token_accuracy" in same
    for plain, ours in zip(*logs, strict=True):
        assert {k: ours[k] for k in same} == pytest.approx({k: plain[k] for k in same}, rel=2e-3)


def test_the_head_gives_every_field_where_labels_are_and_zero_elsewhere() -> None:
    from trl.trainer.utils import add_fused_lm_head

    fields = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    model = embedded_model(own=True)
    add_fused_lm_head(model, outputs=fields)
    batch = PreferenceCollator(embedded_processor(), padding_side="left")(
        list(mini_rows().select(range(4)))
    )
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    other = copy.deepcopy(model)
    plain = model(**batch, labels=labels, fused_lm_head=True)
    score_completions_only(other)
    score_completions_only(other)  # twice is once
    seen = []
    other.lm_head.register_forward_pre_hook(lambda *_: seen.append(1))
    ours = other(**batch, labels=labels, fused_lm_head=True)
    for name in (*fields, "label_mask"):
        one, two = getattr(plain, name), getattr(ours, name)
        assert one.shape == two.shape and torch.allclose(one.float(), two.float(), atol=1e-5), name
    assert ours.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    nothing = other(**batch, labels=torch.full_like(labels, -100), fused_lm_head=True)
    assert nothing.log_probs.abs().sum() == 0 and nothing.loss.item() == 0
    nothing.loss.backward()
    assert other(**batch).logits.shape[:2] == labels.shape  # the usual forward is untouched
