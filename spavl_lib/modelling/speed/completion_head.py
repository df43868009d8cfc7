"""Apply the language-model head only at positions that predict a response token.

With Triton, trl's fused head already does this. Without Triton, trl's head computes logits at
every position, including prompt and image positions.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

POSITIONS = "scored_positions"  # keyword that carries the positions to the backbone
PER_TOKEN = (
    "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask",
)  # fmt: skip


def score_completions_only(model: nn.Module) -> Callable[[], None]:
    """Make trl's fused head skip the positions without a label. The outputs are equal.

    The backbone's hidden states at the other positions are packed into one row. trl's head gets
    this row together with labels that are already shifted.

    Args:
        model: A model with `trl.trainer.utils.add_fused_lm_head`; changed in place.

    Returns:
        A function that undoes the change.
    """
    backbone = model.base_model
    if getattr(backbone, "_selects_positions", False):
        return lambda: None
    run_backbone, run_fused = backbone.forward, model.forward

    @functools.wraps(run_backbone)
    def backbone_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        positions = kwargs.pop(POSITIONS, None)
        output = run_backbone(*args, **kwargs)
        if positions is not None:
            hidden = output.last_hidden_state.flatten(0, 1)
            output.last_hidden_state = hidden.index_select(0, positions).unsqueeze(0)
        return output

    @functools.wraps(run_fused)
    def forward(
        self: nn.Module,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        with_labels = {} if labels is None else {"labels": labels}
        if not fused_lm_head or labels is None or "shift_labels" in kwargs:
            return run_fused(*args, fused_lm_head=fused_lm_head, **with_labels, **kwargs)
        next_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        positions = (next_labels != -100).nonzero().squeeze(1)
        if not len(positions):
            # The batch has no labels. Keep position 0, which the loss ignores, so that the loss is
            # 0 and still has a grad_fn: backward() then runs as usual.
            positions = positions.new_zeros(1)
        output = run_fused(
            *args,
            fused_lm_head=True,
            shift_labels=next_labels[positions].unsqueeze(0),
            **{POSITIONS: positions},
            **kwargs,
        )
        for name in PER_TOKEN:
            if (value := getattr(output, name)) is not None:
                scattered = value.new_zeros(labels.numel())
                scattered = scattered.index_copy(0, positions, value.squeeze(0))
                setattr(output, name, scattered.view(labels.shape)[:, :-1])
        return output

    backbone.forward = types.MethodType(backbone_forward, backbone)
    backbone._selects_positions = True
    model.forward = types.MethodType(forward, model)

    def restore() -> None:
        backbone.forward, model.forward = run_backbone, run_fused
        del backbone._selects_positions

    return restore
