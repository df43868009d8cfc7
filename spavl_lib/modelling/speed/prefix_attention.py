"""Attention over a packed tree: a segment attends only to its ancestors and to itself.

With `sdpa` and `eager` the segments are computed one after another, so no mask (packed, packed) is
built and no unneeded score is computed. With `flex_attention` one kernel call gets the tree as a
block mask.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from spavl_lib.modelling.speed.prefix_tree import PrefixTree

PLANS = "shared_prefix_plan"  # name of the keyword argument that passes the plan to the layers
PREFIX = "shared_prefix_"  # starts the name of each attention implementation that takes plans


@dataclass(frozen=True)
class AttentionPlan:
    """How to compute the attention of one packed row."""

    tree: PrefixTree
    kernel: str
    """sdpa, eager or flex_attention."""
    masks: tuple[Tensor | None, ...]
    """For each segment a mask (length, depth + length), True where a token attends. None for a root
    segment, whose attention is plain causal. Empty with flex_attention."""

    @classmethod
    def of(
        cls, tree: PrefixTree, config: PreTrainedConfig, device: torch.device
    ) -> "AttentionPlan":
        """The plan for a tree.

        Args:
            tree: Layout of the packed row.
            config: The text model's config, which names the attention implementation.
            device: Device of the masks.
        """
        kernel = config._attn_implementation.removeprefix(PREFIX)
        masks = []
        for segment in tree.segments if kernel != "flex_attention" else ():
            shape = (segment.length, segment.depth + segment.length)
            whole = torch.ones(shape, dtype=torch.bool, device=device)
            masks.append(None if not segment.depth else whole.tril(segment.depth))
        return cls(tree, kernel, tuple(masks))

    def mask(self, ids: Tensor, dtype: torch.dtype) -> Any:
        """The `attention_mask` argument of the text model.

        With sdpa and eager it is a placeholder of four dimensions, because transformers passes such
        a mask on without building its own.

        Args:
            ids: Token ids (1, packed).
            dtype: The text model's dtype.
        """
        if self.kernel == "flex_attention":
            return block_mask(self.tree, ids.device)
        return torch.zeros(1, 1, 1, 1, dtype=dtype, device=ids.device)


def install(config: PreTrainedConfig) -> None:
    """Make a text model's attention accept plans. Without a plan it computes as before."""
    kernel = config._attn_implementation
    if kernel in ("sdpa", "eager"):
        config._attn_implementation = PREFIX + kernel


def uninstall(config: PreTrainedConfig) -> None:
    """Undo `install`."""
    config._attn_implementation = config._attn_implementation.removeprefix(PREFIX)


def block_mask(tree: PrefixTree, device: torch.device) -> Any:
    """The tree as a block mask of FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(
        mask_function(tree, device), None, None, tree.size, tree.size, device=device
    )


def mask_function(tree: PrefixTree, device: torch.device) -> Any:
    """FlexAttention's `mask_mod`: whether a query position attends to a key position.

    Args:
        tree: Layout of the packed row.
        device: Device of the lookup tables.
    """
    count = len(tree.segments)
    related = torch.eye(count, dtype=torch.bool)
    owner = torch.empty(tree.size, dtype=torch.long)
    for i, segment in enumerate(tree.segments):
        related[i, list(segment.ancestors)] = True
        owner[segment.start : segment.stop] = i
    related, owner = related.to(device), owner.to(device)

    def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # Ancestors precede their segment, so the second condition is True for all their keys.
        return related[owner[query], owner[key]] & (key <= query)

    return attends


def _by_segment(
    plan: AttentionPlan, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
) -> Tensor:
    """Compute attention one segment at a time.

    Args:
        plan: Layout, masks and kernel.
        query: (1, heads, packed, head_dim).
        key: (1, heads, packed, head_dim).
        value: (1, heads, packed, head_dim).
        scaling: Factor of the scores; None for 1 / sqrt(head_dim).

    Returns:
        (1, heads, packed, head_dim).
    """
    lengths = [s.length for s in plan.tree.segments]
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    attend = functional.scaled_dot_product_attention if plan.kernel == "sdpa" else _eager
    out = []
    for i, segment in enumerate(plan.tree.segments):
        branch = (*segment.ancestors, i)
        k = torch.cat([keys[j] for j in branch], 2) if segment.ancestors else keys[i]
        v = torch.cat([values[j] for j in branch], 2) if segment.ancestors else values[i]
        mask = plan.masks[i]
        out.append(attend(queries[i], k, v, attn_mask=mask, is_causal=mask is None, scale=scaling))
    return torch.cat(out, 2)


def _eager(
    query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None, is_causal: bool,
    scale: float | None,
) -> Tensor:  # fmt: skip
    """Compute attention as transformers' eager implementations do, with the softmax in fp32.

    Args:
        query: (1, heads, length, head_dim).
        key: (1, heads, depth + length, head_dim).
        value: (1, heads, depth + length, head_dim).
        attn_mask: (length, depth + length), True where a token attends. None if `is_causal`.
        is_causal: Whether a token attends to itself and to earlier tokens.
        scale: Factor of the scores; None for 1 / sqrt(head_dim).
    """
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        size = query.shape[2]
        attn_mask = torch.ones(size, size, dtype=torch.bool, device=query.device).tril()
    assert attn_mask is not None
    scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return weights @ value


def _attention(kernel: str) -> Any:
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        plan = kwargs.pop(PLANS, None)
        if plan is None:
            plain = (
                sdpa_attention_forward
                if kernel == "sdpa"
                else sys.modules[type(module).__module__].eager_attention_forward
            )
            return plain(
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout,
                **kwargs,
            )  # fmt: skip
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        out = _by_segment(plan, query, key, value, scaling)
        return out.transpose(1, 2).contiguous(), None

    return forward


for _kernel in ("sdpa", "eager"):
    AttentionInterface.register(PREFIX + _kernel, _attention(_kernel))
    AttentionMaskInterface.register(PREFIX + _kernel, ALL_MASK_ATTENTION_FUNCTIONS[_kernel])
