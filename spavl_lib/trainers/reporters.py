"""The experiment trackers that `report_to` names: transformers' own callbacks, for every trainer.

The trainers built on transformers' `Trainer` get the callbacks from their `TrainingArguments`.
`Reporter` calls the same callbacks from PPO's own loop.
"""

import sys
from typing import Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.integration_utils import get_available_reporting_integrations

from spavl_lib import machine
from spavl_lib.config import Config
from spavl_lib.distributed import settings
from spavl_lib.errors import InputError
from spavl_lib.runs.stage import Stage

# Trackers whose callback leaves its run open, and logs a later stage of this process into it.
STAY_OPEN = ("wandb", "swanlab")
_left_open: set[str] = set()


def reporter_arguments(config: Config, stage: Stage) -> dict[str, Any]:
    """The fields of transformers' `TrainingArguments` that depend on `report_to`.

    Runs of trackers that an earlier stage of this process left open are ended first.

    Args:
        config: Config of the run.
        stage: Stage that is trained. The tracker's run is named after it.

    Raises:
        InputError: The package of a tracker is not installed.
    """
    installed = get_available_reporting_integrations()
    if missing := [name for name in config.report_to if name not in installed]:
        raise InputError(
            f"report_to names {', '.join(missing)}, which is not installed here; install the "
            "package, or take the name out of report_to"
        )
    for name in sorted(_left_open):
        if name in sys.modules:
            sys.modules[name].finish()
    _left_open.clear()
    _left_open.update(set(STAY_OPEN) & set(config.report_to))
    return {
        "report_to": list(config.report_to),
        "run_name": f"{stage.run.name}-{stage.name}" if config.report_to else None,
    }


def set_folder(callbacks: list[Any], stage: Stage) -> None:
    """Let TensorBoard write into the stage's folder `tensorboard`, unless its variable is set.

    Args:
        callbacks: Callbacks of a training; those of other trackers stay as they are.
        stage: Stage that is trained.
    """
    for callback in callbacks:
        if type(callback).__name__ == "TensorBoardCallback" and callback.logging_dir is None:
            callback.logging_dir = str(stage.path / "tensorboard")


class Reporter:
    """Calls the callbacks of `report_to` from a loop that is no transformers `Trainer`.

    Only the main process reports. Without `report_to` nothing happens.

    Args:
        config: Config of the run.
        stage: Stage that is trained.
        section: Section of the config with the training's settings, such as "ppo".
        model: The trained model.
        step: Number of finished steps; above 0 in a resumed run.
        total: Number of steps of the whole run.

    Raises:
        InputError: The package of a tracker is not installed.
    """

    def __init__(
        self, config: Config, stage: Stage, section: str, model: nn.Module, *, step: int, total: int
    ):
        self.model = model
        self.state = TrainerState(global_step=step, max_steps=total)
        self.control, self.callbacks = TrainerControl(), []
        if not config.report_to:
            return
        trainer = config.section(section)
        # In every process, because under DeepSpeed they set up accelerate's state together.
        self.arguments = TrainingArguments(
            **reporter_arguments(config, stage),
            output_dir=str(stage.path / "checkpoints"),
            use_cpu=settings.plain_cpu(config.launch),
            max_steps=total,
            per_device_train_batch_size=trainer.per_device_batch_size,
            learning_rate=trainer.learning_rate,
            lr_scheduler_type=trainer.lr_scheduler,
            warmup_steps=trainer.warmup_steps,
            weight_decay=trainer.weight_decay,
            max_grad_norm=trainer.max_grad_norm,
            seed=config.seed,
            save_steps=trainer.save_steps,
        )
        if not machine.is_main():
            return
        classes = get_reporting_integration_callbacks(list(config.report_to))
        self.callbacks = [cls() for cls in classes]
        set_folder(self.callbacks, stage)
        self._call("on_train_begin")

    def log(self, row: dict[str, Any]) -> None:
        """Report a logged step.

        Args:
            row: A row of metrics.jsonl. Values that are None are left out.
        """
        self.state.global_step = row["step"]
        values = {k: v for k, v in row.items() if k != "step" and v is not None}
        self._call("on_log", logs=values)

    def close(self) -> None:
        """End the reports."""
        self._call("on_train_end")

    def _call(self, event: str, **values: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(
                self.arguments, self.state, self.control, model=self.model, **values
            )
