"""Progress of a training: the bar, metrics.jsonl, live plot, stop flag, checks of early steps."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback

from spavl_lib import machine
from spavl_lib.distributed import group
from spavl_lib.errors import NonFiniteError, Preempted
from spavl_lib.machine import peak_memory_gib
from spavl_lib.runs.bar import Bar
from spavl_lib.runs.files import read_jsonl, write_jsonl
from spavl_lib.runs.signals import RESUME, StopFlag
from spavl_lib.runs.stage import Stage
from spavl_lib.trainers.guards import Movement

# Longest time between checkpoints, in seconds, even if `save_steps` asks for fewer checkpoints. A
# hosted runtime, such as Colab, can end without warning.
LONGEST_UNSAVED_S = 600.0


class StageCallback(TrainerCallback):
    """A callback that logs a transformers `Trainer`, and stops it when the stop flag is set.

    Args:
        stage: The stage that is trained. Its metrics.jsonl gets the log.
        flag: Stop flag, polled after every step, checkpoint and evaluation batch.
        model: The model. After three steps the callback checks which of its parameters changed.
        logged: Names of the values that are written to metrics.jsonl.
        trainer: The trainer that this callback is added to.
        live: Object with `update(rows, force=...)`, such as `plotting.LivePlot`, or None.
        accuracy: Name of the logged value that the bar shows beside the loss.
        check_first: Function that is called with the logged values of step 1.
    """

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
        self.bar: Bar | None = None
        self.started = self.saved = time.monotonic()
        self.rows = read_jsonl(stage.metrics_path)
        self.rows_at_checkpoint = 0
        self.step_rows: list[list[str]] = []
        self.training = False
        self.taken = 0  # optimizer steps of this call that the loss scaler did not skip
        self.skipped = False  # whether the loss scaler skipped the last step
        self.scale = 1.0

    def resume_log(self, step: int) -> None:
        """Drop log rows that are newer than the checkpoint, and resume the log's clock.

        Args:
            step: Step of the checkpoint; 0 for a new run.
        """
        self.rows = self.rows[: self.rows_at_checkpoint] if step else []
        if machine.is_main():
            write_jsonl(self.stage.metrics_path, self.rows)
        self.saved = time.monotonic()
        self.started = self.saved - (self.rows[-1].get("time_s", 0.0) if self.rows else 0.0)

    def _loss_scale(self) -> float:
        scaler = self.trainer.accelerator.scaler
        return scaler.get_scale() if scaler else 1.0

    def close(self) -> None:
        """Close the bar, so that the next printed text starts on a new line."""
        if self.bar is not None:
            self.bar.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar, and drop logged steps that are newer than the checkpoint."""
        self.resume_log(state.global_step)
        self.training, self.scale = True, self._loss_scale()
        if state.global_step == 0 and state.max_steps >= 3:
            # ZeRO-3 has partitioned the model by now, so the check compares shards.
            self.movement = Movement(self.model)
        if machine.is_main():
            name, total = self.stage.title, state.max_steps
            self.bar = Bar(total=total, initial=state.global_step, desc=name, unit="step")
            group.report("progress", {"step": state.global_step, "total": total})

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the image sampler's epoch, which accelerate does not set when a run is resumed."""
        if self.trainer.image_sampler is not None:
            self.trainer.image_sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any
    ) -> None:
        """Write one line to metrics.jsonl for each logged step.

        Raises:
            NonFiniteError: The gradient's norm is 0 or NaN at the first step that the loss scaler
                did not skip, so nothing would be learnt.
        """
        values = {k: v for k, v in (logs or {}).items() if k in self.logged}
        if not values:
            return
        if state.global_step == 1 and "loss" in values:
            if self.check_first:
                self.check_first(values)
        if self.taken == 1 and not self.skipped and "loss" in values:
            norm = float(values.get("grad_norm", 1.0))
            if not norm > 0:
                raise NonFiniteError(
                    f"step {state.global_step}: the gradient's norm is {norm:g}, so nothing would "
                    "be learnt; check that the mask covers the response tokens, and that the "
                    "learning rate and the trainable parts of the model are as intended"
                )
        row = {"step": state.global_step} | {k: number(v) for k, v in values.items()}
        if "loss" in values:
            row_ids = _in_order(group.gathered(self.step_rows))
            row["row_ids"], self.step_rows = list(dict.fromkeys(row_ids)), []
            row |= {"skipped": 1} if self.skipped else {}
        row["time_s"] = round(time.monotonic() - self.started, 2)
        row["peak_memory_gib"] = round(peak_memory_gib(), 3)
        self.stage.log(row)
        self.rows.append(row)
        if self.live:
            self.live.update(self.rows)
        if self.bar is not None and "loss" in values:
            accuracy = f"{values.get(self.accuracy, 0):.2f}"
            name = self.accuracy.rsplit("/", 1)[-1]
            self.bar.set_postfix({"loss": f"{values['loss']:.3f}", name: accuracy})

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> Any:
        """Advance the bar. If the stop flag is set, save and stop after this step."""
        if self.bar is not None:
            self.bar.update(1)
        before, self.scale = self.scale, self._loss_scale()
        # accelerate does not notice if a fused optimizer skips a step, but the loss scale falls.
        reported = self.trainer.accelerator.optimizer_step_was_skipped
        self.skipped = bool(reported) or self.scale < before
        self.taken += not self.skipped
        if self.movement and self.taken >= 3:
            images = group.any_of(self.trainer.images_seen)
            if images or self.taken == 3:
                self.movement = self.movement.check(self.model, images)
        if asked_to_stop(self.flag):
            control.should_save = control.should_training_stop = True
        if group.any_of(time.monotonic() - self.saved > LONGEST_UNSAVED_S):
            control.should_save = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Stop after this step if the flag was set while the checkpoint was written."""
        if asked_to_stop(self.flag):
            control.should_training_stop = True
        return control

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Stop between evaluation batches if the stop flag is set.

        During training, the last finished step is saved first.

        Raises:
            Preempted: The stop flag is set.
        """
        if not asked_to_stop(self.flag):
            return
        if self.training:
            self.trainer._save_checkpoint(model)
        raise stopped(self.flag, f"while evaluating after step {state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar, and update the live plot with every step."""
        self.training = False
        self.close()
        if self.live and self.rows:
            self.live.update(self.rows, force=True)


def _in_order(by_rank: list[list[list[str]]]) -> list[str]:
    """Put the row ids of a step in the order in which a single process would use them.

    Processes take batches in turn, so the first batches of all processes come first.

    Args:
        by_rank: For each process, the row ids of each of its batches.
    """
    return [row for turn in zip(*by_rank, strict=True) for batch in turn for row in batch]


def drop_stock_callbacks(trainer: Trainer) -> None:
    """Remove transformers' own progress printers, because `StageCallback` replaces them."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in (
            "PrinterCallback",
            "ProgressCallback",
            "NotebookProgressCallback",
        ):
            trainer.remove_callback(callback)


def asked_to_stop(flag: Any) -> bool:
    """Return whether the stop flag is set in any process. All processes get the same result."""
    stop = group.any_of(bool(flag))
    if stop and not flag:
        flag.reason = "a stop in another process"
    return stop


def stopped(flag: Any, where: str) -> Preempted:
    """Build the error to raise after a training was stopped and its checkpoint was saved.

    Args:
        flag: The stop flag, whose `reason` the message names.
        where: Place in the training, such as "after step 3 of 6".
    """
    return Preempted(f"stopped by {flag.reason} {where}; checkpoint written, {RESUME}")


def number(value: Any) -> float | None:
    """Round a value to six decimals for the log. NaN and infinity become None."""
    value = float(value)
    return round(value, 6) if math.isfinite(value) else None


def keep_steps(path: Path, step: int) -> None:
    """Drop a JSONL file's rows of steps after `step`.

    Args:
        path: The file. Each of its rows has a `step`.
        step: Step of the newest checkpoint.
    """
    write_jsonl(path, [row for row in read_jsonl(path) if row["step"] <= step])


def best_step(rows: Sequence[dict], key: str) -> dict | None:
    """Find the step of a training after which a value on held-out rows was lowest.

    Args:
        rows: Rows of metrics.jsonl.
        key: Name of the value, such as `eval_loss`. Rows without the value, or with None, are left
            out.

    Returns:
        The first such step, as a dict of `step`, `metric` and `value`; None if no row has a value.
    """
    measured = [row for row in rows if row.get(key) is not None]
    if not measured:
        return None
    best = min(measured, key=lambda row: row[key])
    return {"step": best["step"], "metric": key, "value": best[key]}


def first_and_last_tenth(rows: Sequence[dict], key: str) -> dict[str, float | None]:
    """Compute a logged value's means over the first and the last tenth of the rows.

    Args:
        rows: Rows of metrics.jsonl.
        key: Name of the value. Rows without the value, or with None, are left out of a mean.

    Returns:
        The means, under `first_steps` and `last_steps`. A mean is None if none of its rows has the
        value.
    """
    tenth = max(1, len(rows) // 10)

    def mean(part: Sequence[dict]) -> float | None:
        values = [row[key] for row in part if row.get(key) is not None]
        return round(sum(values) / len(values), 6) if values else None

    return {"first_steps": mean(rows[:tenth]), "last_steps": mean(rows[-tenth:])}
