"""What the trainers built on transformers' loop share: exact checkpoints, gates, and reporting."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import ProcessorMixin, Trainer, TrainerCallback, TrainerState

from spavl_lib import machine
from spavl_lib.config import LaunchConfig
from spavl_lib.data.collate import PreferenceCollator
from spavl_lib.data.grouping import ImageGroupedSampler
from spavl_lib.data.lengths import check_lengths
from spavl_lib.distributed import group, settings
from spavl_lib.errors import NonFiniteError, Preempted
from spavl_lib.machine import peak_memory_gib
from spavl_lib.runs.files import read_jsonl, write_text
from spavl_lib.runs.signals import StopFlag
from spavl_lib.runs.stage import Stage
from spavl_lib.trainers import checkpoint as ckpt
from spavl_lib.trainers.guards import (
    Movement,
    check_batch,
    gate_gradients,
    gate_loss,
    gate_weights,
)
from spavl_lib.trainers.probe import check_reference_unmoved
from spavl_lib.trainers.reference_cache import NAMES
from spavl_lib.trainers.zero_state import load_optimizer_share, optimizer_share

LONGEST_UNSAVED_S = 600.0  # a runtime may vanish: whatever save_steps says, no more is lost


class RowCollator(PreferenceCollator):
    """The preference collator, with the rows' ids beside the tensors for error messages."""

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        """As `PreferenceCollator`, plus `row_ids`, and the reference's log-probs if given."""
        known = {name: torch.tensor([r[name] for r in rows]) for name in NAMES if name in rows[0]}
        return super().__call__(rows) | {"row_ids": [r["id"] for r in rows]} | known


class CheckedMixin:
    """Mixed into a transformers `Trainer`: our checkpoints, and gates before every update.

    The stock checkpoints resume a fully fine-tuned LLaVA with none of its weights loaded.
    """

    checkpoints: Path
    launch_config: LaunchConfig = LaunchConfig()
    found: dict[str, Any]
    row_ids: list[str] = []
    group_by_image: bool = False
    grouped: ImageGroupedSampler | None = None
    reporter: "StageCallback | None" = None
    reference: dict | None = None

    def report_to_stage(self: Trainer, stage: Stage, flag: StopFlag, **options: Any) -> None:
        """Log, check and stop through a `StageCallback`, which may ask for a checkpoint."""
        self.reporter = StageCallback(stage, flag, self.model, trainer=self, **options)
        self.add_callback(self.reporter)

    def train_from(self: Trainer, newest: Path | None) -> None:
        """`train`, taken up at a checkpoint; one of the last step is loaded and no more.

        Raises:
            InputError: The checkpoint does not fit, or its reference is another.
            NonFiniteError: A loss, gradient or weight is no number.
            Preempted: Stopped after a whole step; the checkpoint stands.
        """
        state = ckpt.load_state(newest) if newest else {}
        if newest and self.reference is not None:
            changed = [k for k in self.reporter.stage.allowed if k.startswith(("data/", "model/"))]
            check_reference_unmoved(state.get("reference"), self.reference, waived=bool(changed))
        if newest and state.get("finished") == self._length():
            self.state = TrainerState.load_from_json(str(newest / "trainer_state.json"))
            if self.is_deepspeed_enabled:  # the weights come back through its optimizer
                steps = self.state.max_steps
                self._prepare_for_training(steps, self.get_train_dataloader(), str(newest))
            else:
                self._load_from_checkpoint(str(newest))
                self.found = state["launch"]
            self.reporter.take_up(self.state.global_step)
            return
        try:
            self.train(resume_from_checkpoint=str(newest) if newest else None)
        finally:
            self.reporter.close()
        flag = self.reporter.flag
        if flag and self.state.global_step < self.state.max_steps:
            raise Preempted(
                f"stopped by {flag.reason} after step {self.state.global_step} of "
                f"{self.state.max_steps}; checkpoint written, run the same command to go on"
            )

    def _length(self: Trainer) -> list:
        return [self.args.max_steps, self.args.num_train_epochs]

    def _get_train_sampler(self: Trainer, train_dataset: Dataset | None = None) -> Any:
        if not self.group_by_image:
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        together = self.args.per_device_train_batch_size
        self.grouped = ImageGroupedSampler(rows["image_name"], together, self.args.data_seed)
        return self.grouped

    def _prepare_inputs(self: Trainer, inputs: dict) -> dict:
        self.row_ids = inputs.pop("row_ids", self.row_ids)
        return super()._prepare_inputs(inputs)

    def training_step(
        self: Trainer, model: nn.Module, inputs: dict, num_items_in_batch: Any = None
    ) -> Tensor:
        """One micro-batch, its rows noted."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.reporter:
            self.reporter.step_rows.append(self.row_ids)
        return loss

    def gated(self: Trainer, model: nn.Module, loss: Tensor) -> Tensor:
        """The loss, if it is a number; before the backward pass, which under DeepSpeed updates.

        Raises:
            NonFiniteError: It is none; nothing was updated.
        """
        if model.training:
            gate_loss(loss, self.state.global_step + 1, self.row_ids)
        return loss

    def _clip_grad_norm(self: Trainer, model: nn.Module) -> Any:
        # A loss scaler meets infinities while it looks for its scale, and skips those steps.
        if getattr(self.accelerator, "scaler", None) is None:
            gate_gradients(self.model, self.state.global_step + 1, self.row_ids)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self: Trainer, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # DeepSpeed holds the gradients, and has stepped by now; only its norm can be asked.
        if self.is_deepspeed_enabled and not self.args.fp16 and not math.isfinite(norm or 0.0):
            raise NonFiniteError(
                f"step {self.state.global_step + 1}: the gradient is not finite on rows "
                f"{', '.join(self.row_ids)}; the model in memory is spoilt, the last checkpoint "
                "stands"
            )
        return norm

    @property
    def sharing(self: Trainer) -> str:
        """How the optimizer's state is held: whole in every process, or in shares."""
        if not self.is_deepspeed_enabled:
            return "whole"
        return f"by {self.launch_config.engine} in {machine.world_size()} processes"

    def _prepare_for_training(
        self: Trainer, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        # Under DeepSpeed transformers would look for DeepSpeed's own checkpoint, a pickle.
        theirs = None if self.is_deepspeed_enabled else resume_from_checkpoint
        prepared = super()._prepare_for_training(max_steps, train_dataloader, theirs)
        self.found = settings.check_engine(self.model_wrapped, self.launch_config)
        if self.is_deepspeed_enabled and resume_from_checkpoint:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._take_up(ckpt.load_state(Path(resume_from_checkpoint)))
        return prepared

    def _save_checkpoint(self: Trainer, model: nn.Module, trial: Any = None) -> None:
        trained = ckpt.trainable_tensors(self.model)
        gate_weights(trained, self.state.global_step, self.row_ids)
        optimizer, plain = optimizer_share(self.optimizer)
        rng, rng_plain = ckpt.rng_state()
        tensors = {"trainable": trained, "optimizer": optimizer, "rng": rng}
        if not machine.is_main():  # what this process alone holds
            del tensors["trainable"]
            if not self.is_deepspeed_enabled:
                del tensors["optimizer"]
        aside = self.checkpoints.parent / f".trainer_state.{machine.rank()}.json"
        self.state.save_to_json(str(aside))
        state = {
            "step": self.state.global_step,
            "optimizer": plain,
            "scheduler": self.lr_scheduler.state_dict(),
            "rng": rng_plain,
            "sharing": self.sharing,
            "launch": self.found,
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
            texts={"trainer_state.json": aside.read_text(encoding="utf-8")},
        )
        aside.unlink()
        if self.reporter:
            self.reporter.saved = time.monotonic()

    def _load_from_checkpoint(
        self: Trainer, resume_from_checkpoint: str, model: Any = None
    ) -> None:
        source = Path(resume_from_checkpoint)
        ckpt.load_trainable(self.model, ckpt.load_tensors(source, "trainable"), source)
        self._take_up(ckpt.load_state(source))

    def _take_up(self: Trainer, state: dict) -> None:
        self._total_train_tokens = state["total_train_tokens"]
        if self.reporter:
            self.reporter.keep = state["logged_rows"]

    def _load_optimizer_and_scheduler(self: Trainer, checkpoint: str | None) -> None:
        if checkpoint is not None:
            source = Path(checkpoint)
            state = ckpt.load_state(source)
            ckpt.check_sharing(source, state["sharing"], self.sharing)
            rank = machine.rank() if self.is_deepspeed_enabled else 0
            tensors = ckpt.load_tensors(source, "optimizer", rank)
            with keeping_settings(self.optimizer, self.lr_scheduler):
                load_optimizer_share(self.optimizer, tensors, state["optimizer"])
                self.lr_scheduler.load_state_dict(state["scheduler"])

    def _load_rng_state(self: Trainer, checkpoint: str | None) -> None:
        if checkpoint is not None:
            source, rank = Path(checkpoint), machine.rank()
            state = ckpt.load_state(source, rank)
            if state:  # a process that was not there when it was written keeps the seed's
                ckpt.load_rng(ckpt.load_tensors(source, "rng", rank), state["rng"])


class StageCallback(TrainerCallback):
    """Progress bar, metrics.jsonl, live plot, stop flag, and the first steps' checks."""

    def __init__(
        self,
        stage: Stage,
        flag: StopFlag,
        model: nn.Module,
        *,
        logged: tuple[str, ...],
        trainer: Trainer,
        live: Any = None,
        accuracy: str = "rewards/accuracies",
        check_first: Callable[[dict], None] | None = None,
    ):
        self.stage, self.flag, self.live, self.trainer = stage, flag, live, trainer
        self.logged, self.accuracy, self.check_first = logged, accuracy, check_first
        self.model = model
        self.movement: Movement | None = None
        self.bar: tqdm | None = None
        self.started = self.saved = time.monotonic()
        self.rows = read_jsonl(stage.metrics_path)
        self.keep = 0
        self.step_rows: list[list[str]] = []
        self.training = False

    def take_up(self, step: int) -> None:
        """Keep the log up to the checkpoint; its clock goes on where it stood."""
        self.rows = self.rows[: self.keep] if step else []
        if machine.is_main():
            write_text(self.stage.metrics_path, "".join(json.dumps(r) + "\n" for r in self.rows))
        self.saved = time.monotonic()
        self.started = self.saved - (self.rows[-1].get("time_s", 0.0) if self.rows else 0.0)

    def close(self) -> None:
        """End the bar's line, so that what is said next has its own."""
        if self.bar is not None:
            self.bar.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar, and drop logged steps that were never checkpointed."""
        self.take_up(state.global_step)
        self.training = True
        if state.global_step == 0 and state.max_steps >= 3:
            self.movement = Movement(self.model)  # now: ZeRO has taken the model apart
        if machine.is_main():
            name, total = self.stage.name, state.max_steps
            self.bar = tqdm(total=total, initial=state.global_step, desc=name, unit="step")
            group.report("progress", {"step": state.global_step, "total": total})

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Choose the epoch's order; accelerate's own call does not reach a resumed loader."""
        if self.trainer.grouped is not None:
            self.trainer.grouped.set_epoch(int((state.epoch or 0.0) + 1e-6))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any
    ) -> None:
        """One line a logged step."""
        kept = {k: v for k, v in (logs or {}).items() if k in self.logged}
        if not kept:
            return
        if state.global_step == 1 and "loss" in kept:
            if self.check_first:
                self.check_first(kept)
            if not float(kept.get("grad_norm", 1.0)) > 0:
                raise NonFiniteError(
                    "step 1: the gradient is 0: nothing would be learnt; does the mask leave any "
                    "answer token, does anything train?"
                )
        row = {"step": state.global_step} | {k: number(v) for k, v in kept.items()}
        if "loss" in kept:
            seen = _in_order(group.gathered(self.step_rows))
            row["row_ids"], self.step_rows = list(dict.fromkeys(seen)), []
        row["time_s"] = round(time.monotonic() - self.started, 2)
        row["peak_memory_gib"] = round(peak_memory_gib(), 3)
        self.stage.log(row)
        self.rows.append(row)
        if self.live:
            self.live.update(self.rows)
        if self.bar is not None and "loss" in kept:
            shown = f"{kept.get(self.accuracy, 0):.2f}"
            name = self.accuracy.rsplit("/", 1)[-1]
            self.bar.set_postfix({"loss": f"{kept['loss']:.3f}", name: shown})

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> Any:
        """Advance the bar; stop where asked, after a whole step."""
        if self.bar is not None:
            self.bar.update(1)
        if self.movement and state.global_step == 3:
            self.movement.check(self.model)
            self.movement = None
        if self._asked_to_stop():
            control.should_save = control.should_training_stop = True
        if group.any_of(time.monotonic() - self.saved > LONGEST_UNSAVED_S):
            control.should_save = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Asked while it was saving: that is the checkpoint, and no further step is made."""
        if self._asked_to_stop():
            control.should_training_stop = True
        return control

    def _asked_to_stop(self) -> bool:
        """Whether any process was; all then stop after the same step."""
        stop = group.any_of(bool(self.flag))
        if stop and not self.flag:
            self.flag.reason = "a stop in another process"
        return stop

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Between batches of an evaluation: stop where asked, the last step saved."""
        if not self._asked_to_stop():
            return
        if self.training:
            self.trainer._save_checkpoint(model)
        raise Preempted(
            f"stopped by {self.flag.reason} while evaluating after step {state.global_step}; "
            "checkpoint written, run the same command to go on"
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar; the plot's last drawing shows every step."""
        self.training = False
        self.close()
        if self.live and self.rows:
            self.live.update(self.rows, force=True)


@contextlib.contextmanager
def keeping_settings(optimizer: Any, scheduler: Any) -> Iterator[None]:
    """Within it a checkpoint is loaded; rates and decay that were allowed to change take effect."""
    rates = list(scheduler.base_lrs)
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    yield
    if rates != scheduler.base_lrs:
        scheduler.base_lrs = rates
        scheduler._last_lr = scheduler.get_lr()
        now = scheduler.get_last_lr()
        for group, rate, new in zip(optimizer.param_groups, rates, now, strict=True):
            group["initial_lr"], group["lr"] = rate, new
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay


def _in_order(by_rank: list[list[list[str]]]) -> list[str]:
    """Rows of a step as one process would have met them: batches go to the processes in turn."""
    return [row for turn in zip(*by_rank, strict=True) for batch in turn for row in batch]


def number(value: Any) -> float | None:
    """A figure for a log line; None where it is not finite."""
    value = float(value)
    return round(value, 6) if math.isfinite(value) else None


def drop_stock_callbacks(trainer: Trainer) -> None:
    """Remove transformers' own printers: `StageCallback` reports."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in (
            "PrinterCallback",
            "ProgressCallback",
            "NotebookProgressCallback",
        ):
            trainer.remove_callback(callback)


def check_rows_fit(trainer: Trainer, rows: Dataset, processor: ProcessorMixin) -> None:
    """Before the first step: every row's length, and a few collated rows read back.

    Raises:
        InputError: A row is too long.
        AssertionError: A mask, BOS, EOS or image slot is not as it must be.
    """
    check_lengths(processor, rows, trainer.data_collator.max_length)
    sample = [rows[i] for i in range(0, len(rows), max(1, len(rows) // 8))][:8]
    config = getattr(trainer.model, "config", None) or trainer.model.vlm.config
    check_batch(
        trainer.data_collator(sample), sample, processor, getattr(config, "image_token_id", None)
    )
