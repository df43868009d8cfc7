"""Arguments that all trainers built on transformers' `Trainer` have in common."""

from typing import Any

import torch

from spavl_lib.config import Config
from spavl_lib.distributed import settings
from spavl_lib.modelling.load import compute_dtype
from spavl_lib.runs.stage import Stage
from spavl_lib.trainers.reporters import reporter_arguments


def common_arguments(section: str, config: Config, stage: Stage) -> dict[str, Any]:
    """Keyword arguments for `TrainingArguments` and for trl's subclasses of it.

    Build the `TrainingArguments` before the model is loaded: under ZeRO-3 they make transformers
    load the model in shards.

    Args:
        section: Section of the config, such as "dpo".
        config: Config of the run.
        stage: Stage that is trained. Checkpoints are written into its folder.

    Returns:
        Keyword arguments.

    Raises:
        InputError: A tracker of `report_to` is not installed, or the number of processes does not
            divide the section's `gradient_accumulation_steps`.
    """
    trainer, dtype = config.section(section), compute_dtype()
    return {
        "output_dir": str(stage.path / "checkpoints"),
        "max_steps": trainer.max_steps or -1,
        "num_train_epochs": trainer.num_epochs,
        "per_device_train_batch_size": trainer.per_device_batch_size,
        **settings.launch_arguments(section, trainer.gradient_accumulation_steps, config.launch),
        "learning_rate": trainer.learning_rate,
        "lr_scheduler_type": trainer.lr_scheduler,
        "warmup_steps": trainer.warmup_steps,
        "weight_decay": trainer.weight_decay,
        "max_grad_norm": trainer.max_grad_norm,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "seed": config.seed,
        "data_seed": config.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_steps": trainer.save_steps,
        "remove_unused_columns": False,
        "dataloader_num_workers": config.data.num_workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **reporter_arguments(config, stage),
        "disable_tqdm": True,
    }
