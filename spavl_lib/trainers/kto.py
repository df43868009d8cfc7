"""Train a policy by KTO (Ethayarajh et al. 2024), with trl's `KTOTrainer`.

    spavl train kto --profile demo

KTO needs no pairs: each response is good or bad by itself. The chosen and the rejected responses of
the preference rows become rows of their own, and are shuffled separately.
"""

from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from transformers import ProcessorMixin
from trl import KTOConfig as TRLConfig
from trl import KTOTrainer

from spavl_lib.config import Config
from spavl_lib.data.collate import PreferenceCollator
from spavl_lib.data.schema import image_columns
from spavl_lib.modelling.adapters import assert_freeze_plan, lora_config
from spavl_lib.modelling.load import load_processor, quiet_libraries
from spavl_lib.runs.maker import stage_maker
from spavl_lib.runs.signals import StopFlag
from spavl_lib.runs.stage import Stage
from spavl_lib.trainers import checkpoint as ckpt
from spavl_lib.trainers.arguments import common_arguments
from spavl_lib.trainers.dpo import (
    check_reference,
    finish_trainer,
    policy_and_reference,
    probe_reference,
    save_trained,
    summary_of,
)
from spavl_lib.trainers.exact_trainer import CheckedMixin, WholeStepMixin, check_rows_fit
from spavl_lib.trainers.export_card import model_card
from spavl_lib.trainers.inputs import limit_of, load_rows, training_inputs

LOGGED = (
    "loss", "grad_norm", "learning_rate", "kl", "rewards/chosen", "rewards/rejected",
    "rewards/margins", "logps/chosen", "logps/rejected", "entropy", "num_tokens", "eval_loss",
    "eval_kl", "eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins",
    "eval_logps/chosen", "eval_logps/rejected",
)  # fmt: skip


class ResponseCollator(PreferenceCollator):
    """Makes batches of single responses in the layout of trl's collator for KTO."""

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        """Make a batch of rows as `unpaired` makes them.

        Returns:
            `input_ids`, `attention_mask` and `completion_mask` (rows, length), int64; the same with
            the prefix `KL_`, in which each prompt has the response of the row before; the image
            tensors; `label` (rows,), true for a chosen response; and `row_ids`.

        Raises:
            InputError: As in `batch_of`.
        """
        others = [rows[i - 1]["completion"] for i in range(len(rows))]
        mismatched = [row | {"completion": other} for row, other in zip(rows, others, strict=True)]
        batch: dict[str, Any] = self.batch_of(rows, "completion")
        tokens = ("input_ids", "attention_mask", "completion_mask", "token_type_ids",
                  "mm_token_type_ids")  # fmt: skip
        second = self.batch_of(mismatched, "completion")
        batch |= {f"KL_{name}": second[name] for name in tokens if name in second}
        batch["label"] = torch.tensor([row["label"] for row in rows])
        return batch | {"row_ids": [row["id"] for row in rows]}


class CheckedKTOTrainer(WholeStepMixin, CheckedMixin, KTOTrainer):
    """trl's trainer with this package's checkpoints, and with checks before every update.

    The loss is a mean over the step's responses. Only the estimate of the KL divergence is a mean
    over the responses of a micro-batch.
    """

    @staticmethod
    def count(inputs: dict) -> tuple[int, int]:
        """Count a batch's responses, and their scored tokens."""
        return len(inputs["label"]), int(inputs["completion_mask"][:, 1:].sum())

    def compute_loss(self, model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        """Compute this micro-batch's part of the step's loss.

        Raises:
            NonFiniteError: In training, the part is NaN or infinite.
        """
        of_responses, _ = self.shares(inputs, model.training)
        loss: Tensor = super().compute_loss(model, inputs, *args, **kwargs)
        return self.check_loss(model, of_responses * loss)


def unpaired(rows: Dataset) -> Dataset:
    """Rows of single responses: first all chosen responses, then all rejected ones.

    Args:
        rows: Preference rows.

    Returns:
        Twice as many rows, with `completion` and `label` instead of `chosen` and `rejected`.
    """
    parts = []
    for side, label in (("chosen", True), ("rejected", False)):
        part = rows.select_columns(["id", "prompt", *image_columns(rows), side]).rename_column(
            side, "completion"
        )
        parts.append(part.add_column("label", [label] * len(rows)))
    return concatenate_datasets(parts)


@stage_maker("kto", inputs=training_inputs, polls_stop=True)
def train_kto(config: Config, stage: Stage, flag: StopFlag, *, live: Any = None) -> dict:
    """Train the policy, evaluate it on the held-out responses, and save it with its model card.

    Args:
        config: Uses `data`, `model`, `kto` and `seed`.
        stage: See `train_reward`.
        flag: See `train_reward`.
        live: See `train_reward`.

    Returns:
        The stage's summary.

    Raises:
        SpavlError: For the reasons that `train_reward` lists.
    """
    quiet_libraries()
    processor = load_processor(config.model)
    train_rows, held_out = load_rows(config, stage, processor, "train", "validation")
    trainer = build_trainer(config, stage, processor, train_rows, held_out)
    parts = assert_freeze_plan(trainer.model, config.model)
    check_rows_fit(trainer, trainer.train_dataset, processor)
    ckpt.check_room(trainer.checkpoints, trainer.model)
    probe_reference(trainer, processor, train_rows)
    trainer.report_to_stage(stage, flag, logged=LOGGED, live=live, check_first=check_reference)
    trainer.train_from(ckpt.newest_checkpoint(trainer.checkpoints))
    summary = summary_of(trainer, LOGGED) | {
        "global_batch_size": config.kto.global_batch_size,
        "train_rows": len(train_rows), "validation_rows": len(held_out),
        "trainable_parameters": parts,
    }  # fmt: skip
    save_trained(trainer.model, processor, stage, config, _card(config, summary))
    return summary


def build_trainer(
    config: Config, stage: Stage, processor: ProcessorMixin, train_rows: Dataset, held_out: Dataset
) -> CheckedKTOTrainer:
    """Build trl's trainer with `ResponseCollator` as its collator.

    Args:
        config: Config of the run.
        stage: Stage to write into.
        processor: Processor of the model.
        train_rows: Preference rows to train on.
        held_out: Preference rows to evaluate on.
    """
    kto, lora = config.kto, config.model.with_lora
    arguments = TRLConfig(
        **common_arguments("kto", config, stage),
        per_device_eval_batch_size=kto.per_device_batch_size,
        beta=kto.beta,
        desirable_weight=kto.desirable_weight,
        undesirable_weight=kto.undesirable_weight,
        max_length=None,
        gradient_checkpointing=config.model.gradient_checkpointing,
    )
    policy, reference = policy_and_reference(config)
    trainer = CheckedKTOTrainer(
        model=policy,
        ref_model=reference,
        args=arguments,
        data_collator=ResponseCollator(processor, limit_of(config, "kto").longest),
        train_dataset=unpaired(train_rows),
        eval_dataset=unpaired(held_out),
        processing_class=processor,
        peft_config=lora_config(policy, config.model) if lora else None,
    )
    finish_trainer(trainer, config, stage, processor)
    return trainer


def _card(config: Config, summary: dict) -> str:
    kto = config.kto
    return model_card(
        config, "kto", tags=("trl",), source="responses of ", table="held-out responses",
        facts=[
            f"{summary['train_rows']} pairs as single responses",
            f"{summary['steps']} steps of {summary['global_batch_size']}",
            f"weights {kto.desirable_weight} and {kto.undesirable_weight}",
            f"beta {kto.beta}",
            f"peak rate {kto.learning_rate}",
        ],
        results=summary["validation"],
    )  # fmt: skip
