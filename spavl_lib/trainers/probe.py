"""The reference probe: log-probabilities of eight pairs under the reference.

The probe is stored in every checkpoint. A resumed run computes the probe again with the loaded
reference, and compares it with the stored probe. Without this check a changed reference would go
unnoticed, because the losses still fall.
"""

import contextlib
import warnings
from collections.abc import Sequence

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import ProcessorMixin

from spavl_lib.data.collate import PreferenceCollator
from spavl_lib.data.sampling import spread
from spavl_lib.errors import InputError
from spavl_lib.modelling.load import autocast
from spavl_lib.objectives.logps import sequence_logps

PROBE_ROWS = 8
GREY = 0.5  # a pixel of a blank image, in the units of the image processor's output
# Smallest change of a log-probability, in nats, by which blank images must show that the model uses
# images. A model that uses its images shows a change of 0.1 or more.
IMAGE_EFFECT = 1e-3


@torch.no_grad()
def reference_probe(
    model: nn.Module,
    processor: ProcessorMixin,
    rows: Dataset,
    *,
    as_reference: contextlib.AbstractContextManager,
) -> dict[str, list]:
    """Compute log-probabilities of eight pairs under the reference, one pair at a time.

    The function also checks that the model uses its images: at least one log-probability must
    change if the images are replaced by blank ones.

    Args:
        model: The reference, or a policy whose base is the reference.
        processor: Processor of the model.
        rows: Training rows. Eight of them, spread evenly, are used.
        as_reference: A context in which `model` is the reference, such as
            `model.disable_adapter()`.

    Returns:
        `ids` of the rows, and `logps` in nats. Each pair has two values in `logps`: first the
        chosen response's, then the rejected response's.

    Raises:
        InputError: The model ignores the images.
    """
    picked = spread(rows, PROBE_ROWS)
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
                    blank = {k: _blank(v) if k == "pixel_values" else v for k, v in batch.items()}
                    effects.append((_logps(model, blank) - values).abs().max().item())
    finally:
        model.train(training)
    if effects and max(effects) < IMAGE_EFFECT:
        raise InputError(
            f"the model ignores the images: blank images for {len(effects)} pairs changed no "
            f"response's log-probability by {IMAGE_EFFECT} nats; check that the projector's "
            "weights were loaded and that the processor belongs to the model"
        )
    return {"ids": [row["id"] for row in picked], "logps": logps}


def _blank(pixels: Tensor) -> Tensor:
    """Replace images (images, ...) by uniform grey. Zeros stay, as some families pad with zeros."""
    return torch.where(pixels == 0, pixels, GREY)


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
    """Compare a checkpoint's probe with the probe of the loaded reference.

    On a CPU the two must be equal. With a GPU they may differ by 0.05 nats.

    Args:
        stored: The checkpoint's probe. None if the checkpoint has no probe.
        current: `reference_probe` of the loaded reference.
        allowed_changes: Names of inputs that the user allowed to change. If the data or the base
            model are among them, the probes are not compared.

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
