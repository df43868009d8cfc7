"""Log-probabilities where a completion token stands, and nowhere else.

trl's fused head picks those positions out on Triton; elsewhere it multiplies every position, prompt
and image included, with the whole vocabulary.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

KEEP = "kept_positions"
PER_TOKEN = (
    "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask",
)  # fmt: skip


def score_completions_only(model: nn.Module) -> Callable[[], None]:
    """Make a model with trl's fused head score labelled positions alone; equal outputs.

    The backbone's hidden states at these positions go to trl's head as one row, with labels that
    are shifted already, a form it takes.

    Args:
        model: With `trl.trainer.utils.add_fused_lm_head` on it; changed in place.

    Returns:
        What takes it off again.
    """
    backbone = model.base_model
    if getattr(backbone, "_keeps_positions", False):
        return lambda: None
    run_backbone, run_fused = backbone.forward, model.forward

    @functools.wraps(run_backbone)
    def backbone_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kept = kwargs.pop(KEEP, None)
        output = run_backbone(*args, **kwargs)
        if kept is not None:
            hidden = output.last_hidden_state.flatten(0, 1)
            output.last_hidden_state = hidden.index_select(0, kept).unsqueeze(0)
        return output

    @functools.wraps(run_fused)
    def forward(
        self: nn.Module,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        given = {} if labels is None else {"labels": labels}
        if not fused_lm_head or labels is None or "shift_labels" in kwargs:
            return run_fused(*args, fused_lm_head=fused_lm_head, **given, **kwargs)
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        kept = (following != -100).nonzero().squeeze(1)
        if not len(kept):  # one position without label: a zero that still has a gradient
            kept = kept.new_zeros(1)
        output = run_fused(
            *args,
            fused_lm_head=True,
            shift_labels=following[kept].unsqueeze(0),
            **{KEEP: kept},
            **kwargs,
        )
        for name in PER_TOKEN:
            if (value := getattr(output, name)) is not None:
                spread = value.new_zeros(labels.numel()).index_copy(0, kept, value.squeeze(0))
                setattr(output, name, spread.view(labels.shape)[:, :-1])
        return output

    backbone.forward = types.MethodType(backbone_forward, backbone)
    backbone._keeps_positions = True
    model.forward = types.MethodType(forward, model)

    def restore() -> None:
        backbone.forward, model.forward = run_backbone, run_fused
        del backbone._keeps_positions

    return restore
