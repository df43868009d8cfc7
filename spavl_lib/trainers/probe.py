"""Eight pairs under the reference: stored with every checkpoint, and looked at before going on.

A reference that moves is the quietest fault of preference training: losses still fall.
"""

import contextlib
import warnings

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import ProcessorMixin

from spavl_lib.data.collate import PreferenceCollator
from spavl_lib.errors import InputError
from spavl_lib.objectives.logps import sequence_logps

PROBE_ROWS = 8
IMAGE_EFFECT = 1e-3  # nats; blanking a picture moves a model that looks by tenths and more


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
        model: The reference, or the policy whose base it is.
        processor: Its processor.
        rows: Training rows; eight spread evenly over them are taken.
        as_reference: Within it `model` is the reference, such as `model.disable_adapter()`.

    Returns:
        `ids`, and `logps` in nats, chosen and rejected of each pair.

    Raises:
        InputError: The model does not look at the pictures.
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
            f"the model does not look: blanking the pictures of {len(effects)} pairs moved no "
            f"answer's log-probability by {IMAGE_EFFECT} nats; is the projector loaded, is it the "
            "right processor?"
        )
    return {"ids": [row["id"] for row in picked], "logps": logps}


def _logps(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    mask = inputs.pop("completion_mask").bool()
    logits = model(**inputs).logits
    return sequence_logps(logits, batch["input_ids"], mask).double().cpu()


def check_reference_unmoved(
    stored: dict[str, list] | None, now: dict[str, list], *, waived: bool = False
) -> None:
    """Compare a checkpoint's probe with the reference at hand: on a CPU to the bit.

    Args:
        stored: What the checkpoint holds, None if it was written without.
        now: `reference_probe`.
        waived: Whether data or base were allowed to change.

    Raises:
        InputError: The reference is not the one the run began with.
    """
    if stored is None or waived:
        if waived:
            warnings.warn("the reference was allowed to change: not compared", stacklevel=2)
        return
    tolerance = 0.0 if not torch.cuda.is_available() else 0.05
    pairs = zip(stored["logps"], now["logps"], strict=False)
    furthest = max((abs(a - b) for a, b in pairs), default=0.0)
    if stored["ids"] != now["ids"] or not furthest <= tolerance:
        raise InputError(
            f"the reference is not the one this run began with: over {len(now['ids'])} probe pairs "
            f"its log-probabilities are up to {furthest:.6g} nats off; use the same base model and "
            "data, or begin anew under another run_name"
        )
