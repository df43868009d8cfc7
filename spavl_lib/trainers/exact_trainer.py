"""Checkpoints and checks that all trainers built on transformers' `Trainer` share.

A run that resumes from one of these checkpoints gives the same results as an uninterrupted run.

`CheckedMixin` overrides private methods of `Trainer`. `tests/trainers/test_private_methods.py`
lists these methods. If transformers renames a method or changes its signature, the test fails and
names the method.
"""

import math
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import ProcessorMixin, Trainer, TrainerState

from spavl_lib import machine
from spavl_lib.config import LaunchConfig
from spavl_lib.data.collate import PreferenceCollator
from spavl_lib.data.grouping import ImageGroupedSampler
from spavl_lib.data.sampling import spread
from spavl_lib.distributed import group, settings
from spavl_lib.errors import NonFiniteError
from spavl_lib.modelling.adapters import separate_projector
from spavl_lib.runs.signals import StopFlag
from spavl_lib.runs.stage import Stage
from spavl_lib.trainers import checkpoint as ckpt
from spavl_lib.trainers.guards import (
    OWN_SCALE,
    check_batch,
    check_steps_taken,
    gate_gradients,
    gate_loss,
    gate_weights,
)
from spavl_lib.trainers.probe import check_reference_unmoved
from spavl_lib.trainers.progress import StageCallback, stopped
from spavl_lib.trainers.reference_cache import NAMES
from spavl_lib.trainers.reporters import set_folder
from spavl_lib.trainers.zero_state import load_optimizer_share, optimizer_share


class RowCollator(PreferenceCollator):
    """The preference collator. Its batches also hold the rows' ids, for error messages."""

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        """Collate preference rows.

        Args:
            rows: Preference rows. They may have cached log-probabilities of the reference as
                columns.

        Returns:
            The tensors of `PreferenceCollator`, and `row_ids`. If the rows have cached
            log-probabilities of the reference, also these (pairs,), in nats.
        """
        cached = {name: torch.tensor([r[name] for r in rows]) for name in NAMES if name in rows[0]}
        return super().__call__(rows) | {"row_ids": [r["id"] for r in rows]} | cached


class CheckedMixin:
    """A mixin for a transformers `Trainer`: checkpoints, and checks before every update.

    transformers' own checkpoints are not used, because for a fully fine-tuned LLaVA transformers
    loads none of their weights when the run resumes.
    """

    checkpoints: Path
    launch_config: LaunchConfig = LaunchConfig()
    engine_found: dict[str, Any]
    row_ids: list[str] = []
    images_seen: bool = False
    """Whether a batch of this process held an image."""
    group_by_image: bool = False
    image_sampler: ImageGroupedSampler | None = None
    reporter: StageCallback | None = None
    reference: dict | None = None
    projector_rate: float = 0.0
    """Peak learning rate of the projector; 0 for that of the other parameters."""

    def create_optimizer(self: Trainer, model: nn.Module | None = None) -> Any:
        """Create transformers' optimizer, in which the projector may have its own rate."""
        optimizer = super().create_optimizer(model)
        separate_projector(optimizer, self.model, self.projector_rate)
        return optimizer

    def create_accelerator_and_postprocess(self: Trainer) -> None:
        """On a CPU, add the loss scaler that fp16 needs. accelerate adds none there, silently."""
        super().create_accelerator_and_postprocess()
        if self.args.fp16 and not self.is_deepspeed_enabled and self.accelerator.scaler is None:
            self.accelerator.scaler = torch.amp.GradScaler(self.args.device.type)
            self.accelerator.native_amp = True  # enable autocast too

    def report_to_stage(self: Trainer, stage: Stage, flag: StopFlag, **options: Any) -> None:
        """Add a `StageCallback`. It logs and checks the training, and stops it on the stop flag.

        Args:
            stage: The stage that is trained.
            flag: Stop flag.
            options: Further arguments of `StageCallback`.
        """
        self.reporter = StageCallback(stage, flag, self.model, trainer=self, **options)
        self.add_callback(self.reporter)
        set_folder(self.callback_handler.callbacks, stage)

    def train_from(self: Trainer, newest: Path | None) -> None:
        """Train from the beginning, or resume from a checkpoint.

        If the checkpoint was written after the last step, this method only loads it.

        Args:
            newest: The checkpoint. None starts a new run.

        Raises:
            InputError: The checkpoint does not fit the model, or the reference has changed.
            NonFiniteError: A loss, gradient or weight is NaN or infinite.
            Preempted: The stop flag is set. The last complete step has a checkpoint.
        """
        state = ckpt.load_state(newest) if newest else {}
        if newest and self.reference is not None:
            allowed = self.reporter.stage.allowed
            check_reference_unmoved(state.get("reference"), self.reference, allowed_changes=allowed)
        if newest and state.get("finished") == self._length():
            self.state = TrainerState.load_from_json(str(newest / "trainer_state.json"))
            if self.is_deepspeed_enabled:  # DeepSpeed's optimizer restores the weights
                steps = self.state.max_steps
                self._prepare_for_training(steps, self.get_train_dataloader(), str(newest))
            else:
                self._load_from_checkpoint(str(newest))
                self.engine_found = state["launch"]
            self.reporter.resume_log(self.state.global_step)
            return
        try:
            self.train(resume_from_checkpoint=str(newest) if newest else None)
        finally:
            self.reporter.close()
        flag = self.reporter.flag
        if flag and self.state.global_step < self.state.max_steps:
            place = f"after step {self.state.global_step} of {self.state.max_steps}"
            raise stopped(flag, place)
        if newest is None:
            check_steps_taken(self.reporter.taken, self.state.global_step)

    def _length(self: Trainer) -> list:
        """Return the configured length of the training: its steps and its epochs.

        The checkpoint of the last step stores this length. If a run with the same settings of
        length finds that checkpoint, the run is already finished.
        """
        return [self.args.max_steps, self.args.num_train_epochs]

    def _get_train_sampler(self: Trainer, train_dataset: Dataset | None = None) -> Any:
        if not self.group_by_image:
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        size, seed = self.args.per_device_train_batch_size, self.args.data_seed
        self.image_sampler = ImageGroupedSampler(rows["image_name"], size, seed)
        return self.image_sampler

    def _prepare_inputs(self: Trainer, inputs: dict) -> dict:
        self.row_ids = inputs.pop("row_ids", self.row_ids)
        self.images_seen |= "pixel_values" in inputs
        return super()._prepare_inputs(inputs)

    def training_step(
        self: Trainer, model: nn.Module, inputs: dict, num_items_in_batch: Any = None
    ) -> Tensor:
        """Run one micro-batch, and record its rows for the log.

        Args:
            model: The model, as accelerate prepared it.
            inputs: The collator's batch.
            num_items_in_batch: Passed on to transformers' `training_step`.

        Returns:
            The loss (), detached.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.reporter:
            self.reporter.step_rows.append(self.row_ids)
        return loss

    def check_loss(self: Trainer, model: nn.Module, loss: Tensor) -> Tensor:
        """Return a loss () unchanged; raise if it is a training loss and NaN or infinite.

        Call it before the backward pass, because under DeepSpeed the optimizer step is part of the
        backward pass.

        Raises:
            NonFiniteError: The loss is NaN or infinite. Nothing was updated.
        """
        if model.training:
            gate_loss(loss, self.state.global_step + 1, self.row_ids)
        return loss

    def _clip_grad_norm(self: Trainer, model: nn.Module) -> Any:
        # A large loss scale can make fp16 gradients infinite. The loss scaler then skips the step
        # and lowers the scale. At `OWN_SCALE` or below, the scale cannot be the cause.
        scaler = self.accelerator.scaler
        if scaler is None or scaler.get_scale() <= OWN_SCALE:
            gate_gradients(self.model, self.state.global_step + 1, self.row_ids)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self: Trainer, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # DeepSpeed keeps the gradients to itself and has already taken the step, so only the norm
        # of the gradients can be checked here.
        if self.is_deepspeed_enabled and not self.args.fp16 and not math.isfinite(norm or 0.0):
            raise NonFiniteError(
                f"step {self.state.global_step + 1}: the gradient is not finite on rows "
                f"{', '.join(self.row_ids)}; the model in memory is unusable, so resume from the "
                "last checkpoint, with a lower learning rate if it happens again"
            )
        return norm

    @property
    def sharing(self: Trainer) -> str:
        """How processes hold the optimizer state: `whole`, or a description of the shards."""
        if not self.is_deepspeed_enabled:
            return "whole"
        return f"by {self.launch_config.engine} in {machine.world_size()} processes"

    def _prepare_for_training(
        self: Trainer, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        # Under DeepSpeed transformers would look for DeepSpeed's own checkpoint, which is a pickle
        # and does not exist. So transformers gets no checkpoint, and ours is loaded below.
        stock_checkpoint = None if self.is_deepspeed_enabled else resume_from_checkpoint
        prepared = super()._prepare_for_training(max_steps, train_dataloader, stock_checkpoint)
        self.engine_found = settings.check_engine(self.model_wrapped, self.launch_config)
        if self.is_deepspeed_enabled and resume_from_checkpoint:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._restore_counters(ckpt.load_state(Path(resume_from_checkpoint)))
        return prepared

    def _save_checkpoint(self: Trainer, model: nn.Module, trial: Any = None) -> None:
        trained = ckpt.trainable_tensors(self.model)
        gate_weights(trained, self.state.global_step, self.row_ids)
        optimizer, plain = optimizer_share(self.optimizer)
        rng, rng_plain = ckpt.rng_state()
        tensors = {"trainable": trained, "optimizer": optimizer, "rng": rng}
        if not machine.is_main():  # this process writes only tensors that no other process holds
            del tensors["trainable"]
            if not self.is_deepspeed_enabled:
                del tensors["optimizer"]
        # transformers can only write its state to a file, so the text is read back from the file.
        state_file = self.checkpoints.parent / f".trainer_state.{machine.rank()}.json"
        self.state.save_to_json(str(state_file))
        state = {
            "step": self.state.global_step,
            "optimizer": plain,
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
            "rng": rng_plain,
            "sharing": self.sharing,
            "launch": self.engine_found,
            "reference": self.reference,
            "logged_rows": len(self.reporter.rows) if self.reporter else 0,
            "finished": self._length() if self.state.global_step >= self.state.max_steps else None,
            "total_train_tokens": float(getattr(self, "_total_train_tokens", 0)),
        }
        ckpt.save_checkpoint(
            self.checkpoints,
            self.state.global_step,
            tensors,
            state,
            texts={"trainer_state.json": state_file.read_text(encoding="utf-8")},
        )
        state_file.unlink()
        if self.reporter:
            self.reporter.saved = time.monotonic()

    def _load_from_checkpoint(
        self: Trainer, resume_from_checkpoint: str, model: Any = None
    ) -> None:
        source = Path(resume_from_checkpoint)
        ckpt.load_trainable(self.model, ckpt.load_tensors(source, "trainable"), source)
        self._restore_counters(ckpt.load_state(source))

    def _restore_counters(self: Trainer, state: dict) -> None:
        self._total_train_tokens = state["total_train_tokens"]
        if self.reporter:
            self.reporter.rows_at_checkpoint = state["logged_rows"]

    def _load_optimizer_and_scheduler(self: Trainer, checkpoint: str | None) -> None:
        if checkpoint is not None:
            source = Path(checkpoint)
            state = ckpt.load_state(source)
            ckpt.check_sharing(source, state["sharing"], self.sharing)
            rank = machine.rank() if self.is_deepspeed_enabled else 0
            tensors = ckpt.load_tensors(source, "optimizer", rank)
            with ckpt.keeping_settings(self.optimizer, self.lr_scheduler):
                load_optimizer_share(self.optimizer, tensors, state["optimizer"])
                self.lr_scheduler.load_state_dict(state["scheduler"])
            if self.accelerator.scaler and state.get("scaler"):
                self.accelerator.scaler.load_state_dict(state["scaler"])

    def _load_rng_state(self: Trainer, checkpoint: str | None) -> None:
        if checkpoint is not None:
            ckpt.restore_rng(Path(checkpoint))


class WholeStepMixin:
    """A mixin for a `Trainer` on preference pairs, which weights the losses of micro-batches.

    With the weights, a step's loss does not depend on how the step is divided into micro-batches.
    transformers computes the step's loss as the mean of its micro-batches' losses. Each of these
    losses is a mean over the pairs or tokens of a micro-batch. Micro-batches have different numbers
    of tokens, and can have different numbers of pairs. Without weights the step's loss would
    therefore not be the mean over the step's pairs or tokens. With a single micro-batch the weights
    are exactly 1.
    """

    in_step: list[int] | None = None
    """Numbers of micro-batches, pairs and chosen tokens in the current step, over all processes.
    Chosen tokens are the scored tokens of chosen responses."""

    def get_batch_samples(self: Trainer, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Draw the micro-batches of a step, and count their pairs and chosen tokens.

        Args:
            epoch_iterator: Iterator over micro-batches, which transformers passes.
            num_batches: Number of micro-batches to draw.
            device: Device, which transformers passes.
        """
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.tensor([(1, *self.count(batch)) for batch in batches])
        self.in_step = group.sum_of(counts.sum(0)).tolist() if batches else None
        return batches, items

    def shares(self: Trainer, inputs: dict, training: bool) -> tuple[float, float]:
        """Compute the weights of a micro-batch's losses.

        Args:
            inputs: The micro-batch.
            training: False in an evaluation, in which both weights are 1.

        Returns:
            The weight of a mean over the micro-batch's pairs, and the weight of a mean over its
            chosen tokens.
        """
        if self.in_step is None or not training:
            return 1.0, 1.0
        batches, *totals = self.in_step
        own = self.count(inputs)
        of_pairs, of_tokens = (n * batches / max(t, 1) for n, t in zip(own, totals, strict=True))
        return of_pairs, of_tokens

    @staticmethod
    def count(inputs: dict) -> tuple[int, int]:
        """Count a batch's pairs, and the scored tokens in the chosen half of `completion_mask`."""
        mask = inputs["completion_mask"]
        return len(mask) // 2, int(mask[: len(mask) // 2, 1:].sum())


def check_rows_fit(trainer: Trainer, rows: Dataset, processor: ProcessorMixin) -> None:
    """Before the first step, collate up to eight rows, decode them, and compare texts and masks.

    Args:
        trainer: The trainer. Its collator and its model's image token are used.
        rows: Training rows.
        processor: The processor that the collator uses.

    Raises:
        InputError: A row is too long.
        AssertionError: A mask, BOS, EOS or image slot is wrong.
    """
    sample = spread(rows, 8)
    config = getattr(trainer.model, "config", None) or trainer.model.vlm.config
    collate = trainer.data_collator
    check_batch(
        collate(sample), sample, processor, getattr(config, "image_token_id", None),
        all_turns=collate.all_turns,
    )  # fmt: skip
