"""Log-probabilities of eight pairs under the reference, stored with every checkpoint.

A run that is resumed compares them with the reference that it loaded. Without this check a changed
reference would go unnoticed, because the losses still fall.
"""

import contextlib
import warnings
from collections.abc import Sequence

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import ProcessorMixin

from spavl_lib.data.collate import PreferenceCollator
from spavl_lib.errors import InputError
from spavl_lib.modelling.load import autocast
from spavl_lib.objectives.logps import sequence_logps

PROBE_ROWS = 8
IMAGE_EFFECT = 1e-3  # nats; a model that uses the image changes by 0.1 and more


@torch.no_grad()
def reference_probe(
    model: nn.Module,
    processor: ProcessorMixin,
    rows: Dataset,
    *,
    as_reference: contextlib.AbstractContextManager,
) -> dict[str, list]:
    """Log-probabilities of eight pairs under the reference, one pair at a time.

    Args:
        model: The reference, or the policy whose base is the reference.
        processor: The model's processor.
        rows: Training rows; eight of them are taken, spread evenly.
        as_reference: A context in which `model` is the reference, such as
            `model.disable_adapter()`.

    Returns:
        `ids` of the rows, and `logps` in nats: chosen and rejected answer of each pair.

    Raises:
        InputError: The model ignores the images.
    """
    picked = [rows[i] for i in range(0, len(rows), max(1, len(rows) // PROBE_ROWS))][:PROBE_ROWS]
    collate, device = PreferenceCollator(processor), next(model.parameters()).device
    training, logps, effects = model.training, [], []
    model.eval()
    try:
        with as_reference:
            for row in picked:
                batch = {k: v.to(device) for k, v in collate([row]).items()}
                values = _logps(model, batch)
                logps += values.tolist()
                if row.get("image") is not None:
                    blank = {
                        k: torch.zeros_like(v) if v.is_floating_point() else v
                        for k, v in batch.items()
                    }
                    effects.append((_logps(model, blank) - values).abs().max().item())
    finally:
        model.train(training)
    if effects and max(effects) < IMAGE_EFFECT:
        raise InputError(
            f"the model ignores the images: blanking those of {len(effects)} pairs changed no "
            f"answer's log-probability by {IMAGE_EFFECT} nats; check that the projector's weights "
            "were loaded and that the processor belongs to the model"
        )
    return {"ids": [row["id"] for row in picked], "logps": logps}


def _logps(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    mask = inputs.pop("completion_mask").bool()
    with autocast():
        logits = model(**inputs).logits
    return sequence_logps(logits, batch["input_ids"], mask).double().cpu()


def check_reference_unmoved(
    stored: dict[str, list] | None,
    current: dict[str, list],
    *,
    allowed_changes: Sequence[str] = (),
) -> None:
    """Compare a checkpoint's probe with that of the loaded reference; on a CPU they must be equal.

    Args:
        stored: The probe in the checkpoint, None if it holds none.
        current: `reference_probe` of the loaded reference.
        allowed_changes: Inputs that the user allowed to change. If data or base model are among
            them, nothing is compared.

    Raises:
        InputError: The reference is not the one that the run started with.
    """
    if any(name.startswith(("data/", "model/")) for name in allowed_changes):
        warnings.warn("the reference was allowed to change, so it is not compared", stacklevel=2)
        return
    if stored is None:
        return
    tolerance = 0.0 if not torch.cuda.is_available() else 0.05
    pairs = zip(stored["logps"], current["logps"], strict=False)
    furthest = max((abs(a - b) for a, b in pairs), default=0.0)
    if stored["ids"] != current["ids"] or not furthest <= tolerance:
        raise InputError(
            f"the reference is not the one that this run started with: over "
            f"{len(current['ids'])} probe pairs its log-probabilities differ by up to "
            f"{furthest:.6g} nats; use the same base model and data, or start under another "
            "run_name"
        )
