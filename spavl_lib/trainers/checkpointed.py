"""What the trainers built on transformers' loop share: exact checkpoints, gates, and reporting."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import ProcessorMixin, Trainer, TrainerCallback

from spavl_lib import checkpoint as ckpt
from spavl_lib.data.collate import PreferenceCollator, check_lengths
from spavl_lib.run import Stage, peak_memory_gib, read_jsonl, write_text
from spavl_lib.stop import StopFlag
from spavl_lib.trainers.guards import (
    Movement,
    check_batch,
    gate_gradients,
    gate_loss,
)


class RowCollator(PreferenceCollator):
    """The preference collator, with the rows' ids beside the tensors for error messages."""

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        """As `PreferenceCollator`, plus `row_ids`."""
        return super().__call__(rows) | {"row_ids": [r["id"] for r in rows]}


class CheckedMixin:
    """Mixed into a transformers `Trainer`: our checkpoints, and gates before every update.

    The stock checkpoints resume a fully fine-tuned LLaVA with none of its weights loaded.
    """

    checkpoints: Path
    row_ids: list[str] = []

    def _prepare_inputs(self: Trainer, inputs: dict) -> dict:
        self.row_ids = inputs.pop("row_ids", self.row_ids)
        return super()._prepare_inputs(inputs)

    def training_step(
        self: Trainer, model: nn.Module, inputs: dict, num_items_in_batch: Any = None
    ) -> Tensor:
        """One micro-batch; a loss that is no number ends the run."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        gate_loss(loss, self.state.global_step + 1, self.row_ids)
        return loss

    def _clip_grad_norm(self: Trainer, model: nn.Module) -> Any:
        gate_gradients(self.model, self.state.global_step + 1, self.row_ids)
        return super()._clip_grad_norm(model)

    def _save_checkpoint(self: Trainer, model: nn.Module, trial: Any = None) -> None:
        optimizer, plain = ckpt.optimizer_tensors(self.optimizer)
        rng, rng_plain = ckpt.rng_state()
        aside = self.checkpoints.parent / ".trainer_state.json"
        self.state.save_to_json(str(aside))
        state = {
            "step": self.state.global_step,
            "optimizer": plain,
            "scheduler": self.lr_scheduler.state_dict(),
            "rng": rng_plain,
            "total_train_tokens": float(getattr(self, "_total_train_tokens", 0)),
        }
        ckpt.save_checkpoint(
            self.checkpoints,
            self.state.global_step,
            {"trainable": ckpt.trainable_tensors(self.model), "optimizer": optimizer, "rng": rng},
            state,
            texts={"trainer_state.json": aside.read_text(encoding="utf-8")},
        )
        aside.unlink()

    def _load_from_checkpoint(
        self: Trainer, resume_from_checkpoint: str, model: Any = None
    ) -> None:
        source = Path(resume_from_checkpoint)
        ckpt.load_trainable(self.model, ckpt.load_tensors(source, "trainable"), source)
        self._total_train_tokens = ckpt.load_state(source)["total_train_tokens"]

    def _load_optimizer_and_scheduler(self: Trainer, checkpoint: str | None) -> None:
        if checkpoint is not None:
            source = Path(checkpoint)
            state = ckpt.load_state(source)
            tensors = ckpt.load_tensors(source, "optimizer")
            ckpt.load_optimizer(self.optimizer, tensors, state["optimizer"])
            self.lr_scheduler.load_state_dict(state["scheduler"])

    def _load_rng_state(self: Trainer, checkpoint: str | None) -> None:
        if checkpoint is not None:
            source = Path(checkpoint)
            ckpt.load_rng(ckpt.load_tensors(source, "rng"), ckpt.load_state(source)["rng"])


class StageCallback(TrainerCallback):
    """Progress bar, metrics.jsonl, live plot, stop flag, and the first steps' checks."""

    def __init__(
        self,
        stage: Stage,
        flag: StopFlag,
        model: nn.Module,
        logged: tuple[str, ...],
        *,
        live: Any = None,
        accuracy: str = "rewards/accuracies",
        check_first: Callable[[dict], None] | None = None,
    ):
        self.stage, self.flag, self.live = stage, flag, live
        self.logged, self.accuracy, self.check_first = logged, accuracy, check_first
        self.movement: Movement | None = Movement(model)
        self.bar: tqdm | None = None
        self.started = time.perf_counter()
        self.rows = read_jsonl(stage.metrics_path)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar, and drop logged steps that were never checkpointed."""
        self.rows = [r for r in self.rows if r["step"] <= state.global_step]
        write_text(self.stage.metrics_path, "".join(json.dumps(r) + "\n" for r in self.rows))
        name, total = self.stage.name, state.max_steps
        self.bar = tqdm(total=total, initial=state.global_step, desc=name, unit="step")
        self.fresh = state.global_step == 0

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any
    ) -> None:
        """One line a logged step."""
        kept = {k: v for k, v in (logs or {}).items() if k in self.logged}
        if not kept:
            return
        if self.check_first and state.global_step == 1 and "loss" in kept:
            self.check_first(kept)
        row = {"step": state.global_step} | {k: number(v) for k, v in kept.items()}
        row["time_s"] = round(time.perf_counter() - self.started, 2)
        row["peak_memory_gib"] = round(peak_memory_gib(), 3)
        self.stage.log(row)
        self.rows.append(row)
        if self.live:
            self.live.update(self.rows)
        if self.bar is not None and "loss" in kept:
            shown = f"{kept.get(self.accuracy, 0):.2f}"
            self.bar.set_postfix(loss=f"{kept['loss']:.3f}", accuracy=shown)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> Any:
        """Advance the bar; stop where asked, after a whole step."""
        if self.bar is not None:
            self.bar.update(1)
        if self.movement and self.fresh and state.global_step == min(3, state.max_steps):
            if state.max_steps >= 3:
                self.movement.check(model)
            self.movement = None
        if self.flag:
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar; the plot's last drawing shows every step."""
        if self.bar is not None:
            self.bar.close()
        if self.live and self.rows:
            self.live.update(self.rows, force=True)


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
