"""The reference's log-probabilities of every pair, computed once and stored in the runs folder.

trl's own argument for this purpose does not support images. Instead, the trainer's attribute
`precompute_ref_logps` is set after the trainer is built. The trainer then reads `ref_chosen_logps`
and `ref_rejected_logps` from the collator's batch.
"""

import hashlib
import json
import os
import time
import warnings
from pathlib import Path

import torch
import transformers
import trl
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import ProcessorMixin
from trl import DPOTrainer

from spavl_lib import machine
from spavl_lib.config import Config
from spavl_lib.data.fingerprint import row_digests
from spavl_lib.data.grouping import image_groups
from spavl_lib.modelling.load import model_hashes
from spavl_lib.runs.bar import Bar
from spavl_lib.runs.files import writing
from spavl_lib.trainers.checkpoint import tensors_sha256

NAMES = ("ref_chosen_logps", "ref_rejected_logps")
SAVED_EVERY_S = 120.0


def cache_key(config: Config, processor: ProcessorMixin, rows: Dataset) -> dict:
    """Collect everything that the log-probabilities depend on.

    A change of any of these things leads to another cache file.

    Args:
        config: Config of the run.
        processor: Processor of the model.
        rows: Preference rows.

    Returns:
        Name -> value, as JSON values.
    """
    tokenizer = processor.tokenizer.backend_tokenizer.to_str()
    model, turns = config.model, config.dpo.assistant_turns
    # The default is left out, so that files from before there was this setting stay valid.
    return ({} if turns == "last" else {"assistant_turns": turns}) | {
        "model": {"name": model.name, "revision": model.revision, "files": model_hashes(model)},
        "adapter": "4-bit base" if model.adapter == "qlora" else "base",
        "dtype": machine.dtype_name(),
        "template": processor.chat_template,
        "tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest(),
        "image_processor": processor.image_processor.to_dict(),
        "rows": row_digests(rows),
        "max_length": config.dpo.max_length,
        "batch_size": config.dpo.per_device_batch_size,
        "share_prefix": model.share_prefix,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl)},
    }


def with_reference(
    trainer: DPOTrainer, rows: Dataset, folder: Path, key: dict, batch_size: int, desc: str
) -> Dataset:
    """Add the reference's log-probabilities to rows, as two columns.

    The rows are always divided into the same batches, so every run computes the same numbers. After
    an interruption, the next call computes only the missing values.

    Args:
        trainer: A trainer whose reference is its `ref_model`, or its policy with disabled adapters.
        rows: Preference rows.
        folder: Folder of the cache files.
        key: `cache_key` of config, processor and rows.
        batch_size: Number of pairs in a batch.
        desc: Name of the progress bar.

    Returns:
        The rows with the columns `NAMES`: log-probabilities summed over a response, in nats.
    """
    text = json.dumps(key, sort_keys=True, default=str)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"
    values = read_cache(path, text, len(rows))
    order = [i for group in image_groups(rows["image_name"]) for i in group]
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    missing = [b for b in batches if any(values[n][b].isnan().any() for n in NAMES)]
    if missing:
        _fill(trainer, rows, values, missing, path, text, desc)
    columns = {n: values[n].tolist() for n in NAMES}
    for name, column in columns.items():
        rows = rows.add_column(name, column)
    return rows


def _fill(
    trainer: DPOTrainer,
    rows: Dataset,
    values: dict[str, Tensor],
    missing: list[list[int]],
    path: Path,
    text: str,
    desc: str,
) -> None:
    accelerator = trainer.accelerator
    reference = trainer.ref_model or trainer.model
    training, saved = reference.training, time.monotonic()
    reference.eval()
    world, rank = accelerator.num_processes, accelerator.process_index
    try:
        bar = Bar(range(0, len(missing), world), desc=desc, leave=False, disable=rank > 0)
        for start in bar:
            own_batches = missing[start : start + world][rank : rank + 1]
            computed = []
            for indices in own_batches:
                batch = trainer.data_collator([rows[i] for i in indices])
                pair = trainer.compute_ref_log_probs(reference, trainer._prepare_inputs(batch))
                computed.append((indices, [side.float().tolist() for side in pair]))
            for indices, pair in gather_object(computed) if world > 1 else computed:
                for name, side in zip(NAMES, pair, strict=True):
                    values[name][indices] = torch.tensor(side)
            if rank == 0 and time.monotonic() - saved > SAVED_EVERY_S:
                write_cache(path, text, values)
                saved = time.monotonic()
    finally:
        reference.train(training)
        if rank == 0:  # also after an interruption, to keep the values that were computed so far
            write_cache(path, text, values)


def read_cache(path: Path, key: str, count: int) -> dict[str, Tensor]:
    """Read a cache file.

    Args:
        path: The cache file.
        key: JSON of `cache_key`.
        count: Number of rows.

    Returns:
        A tensor (count,) for each of `NAMES`. A missing value is NaN. If the file is missing,
        damaged or of other settings, all values are NaN.
    """
    empty = {n: torch.full((count,), torch.nan) for n in NAMES}
    if not path.is_file():
        return empty
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            values = {n: file.get_tensor(n) for n in NAMES}
    except (SafetensorError, OSError, ValueError) as error:
        warnings.warn(f"{path} is damaged ({error}): computed again", stacklevel=2)
        return empty
    if metadata.get("sha256") != tensors_sha256(values) or metadata.get("key") != key:
        warnings.warn(
            f"{path} does not match its hash or its settings: computed again", stacklevel=2
        )
        return empty
    return values if all(len(v) == count for v in values.values()) else empty


def write_cache(path: Path, key: str, values: dict[str, Tensor]) -> None:
    """Write a cache file through a temporary file, so that no incomplete file is left.

    Args:
        path: The cache file.
        key: JSON of `cache_key`.
        values: A tensor (rows,) for each of `NAMES`. An unknown value is NaN.

    Raises:
        DiskError: There is no space, or no permission to write.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(values, temporary, {"key": key, "sha256": tensors_sha256(values)})
        temporary.replace(path)
