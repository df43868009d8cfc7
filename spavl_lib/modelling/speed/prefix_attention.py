"""Attention over a packed tree: a segment attends only to its ancestors and to itself.

With `sdpa` and `eager` the segments are computed one after another by the family's own attention
function, so no mask (packed, packed) is built and no unneeded score is computed. With
`flex_attention` one kernel call gets the tree as a block mask.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from spavl_lib.modelling.speed.prefix_tree import PrefixTree, Segment

PLANS = "shared_prefix_plan"  # name of the keyword argument that passes the plan to the layers
PREFIX = "shared_prefix_"  # starts the name of each attention implementation that takes plans
FULL, SLIDING = "full_attention", "sliding_attention"


def kernel_of(config: PreTrainedConfig) -> str:
    """The attention implementation of a text model's config, wrapped or not."""
    return config._attn_implementation.removeprefix(PREFIX)


def layer_kinds(config: PreTrainedConfig) -> tuple[str, ...]:
    """The kind of each layer of a text model, as transformers names kinds."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return tuple(kinds)
    # Other text models without `layer_types` ignore a `sliding_window` in their config.
    window = config.model_type == "mistral" and config.sliding_window
    return (SLIDING if window else FULL,) * getattr(config, "num_hidden_layers", 0)


@dataclass(frozen=True)
class AttentionPlan:
    """How to compute the attention of one packed row."""

    tree: PrefixTree
    kernel: str
    """sdpa, eager or flex_attention."""
    kinds: tuple[str, ...]
    """The kind of each layer."""
    masks: dict[str, tuple[Tensor | None, ...]]
    """For each kind of layer, and for each segment, a mask (1, 1, length, depth + length): bool
    for sdpa (True where a token attends), of the model's dtype for eager (0 where a token attends,
    else the smallest number). None if the attention is plain causal and the kernel knows that.
    Empty with flex_attention."""

    @classmethod
    def of(
        cls,
        tree: PrefixTree,
        config: PreTrainedConfig,
        given: Callable[[str, Segment, int], Tensor | None],
        embeddings: Tensor,
    ) -> "AttentionPlan":
        """The plan for a tree.

        Args:
            tree: Layout of the packed row.
            config: The text model's config.
            given: For a kind of layer, a segment, and the number of a row that contains it: the
                mask (length, depth + length) that the backbone gave, True where a token attends.
                None if the kind is causal.
            embeddings: The packed row (1, packed, hidden), of the masks' device and dtype.
        """
        kernel, kinds = kernel_of(config), layer_kinds(config)
        masks: dict[str, tuple[Tensor | None, ...]] = {}
        for kind in set(kinds) if kernel != "flex_attention" else ():
            window = config.sliding_window if kind == SLIDING else None
            of_kind: list[Tensor | None] = []
            for segment in tree.segments:
                seen = given(kind, segment, int(tree.sources[segment.start, 0]))
                if seen is None:
                    seen = _causal(segment, window, kernel, embeddings.device)
                of_kind.append(None if seen is None else _in_form_of(kernel, seen, embeddings))
            masks[kind] = tuple(of_kind)
        return cls(tree, kernel, kinds, masks)

    def placeholder(self, embeddings: Tensor, given: Any) -> Any:
        """The `attention_mask` argument of the text model.

        With sdpa and eager it is a placeholder of four dimensions, because transformers passes such
        a mask on without building its own.

        Args:
            embeddings: The packed row (1, packed, hidden).
            given: The argument for the batch. A dictionary has a mask for each kind of layer.
        """
        if self.kernel == "flex_attention":
            return block_mask(self.tree, embeddings.device)
        mask = embeddings.new_zeros(1, 1, 1, 1)
        return dict.fromkeys(given, mask) if isinstance(given, dict) else mask


def _causal(
    segment: Segment, window: int | None, kernel: str, device: torch.device
) -> Tensor | None:
    """A causal mask (length, depth + length); None if the kernel needs none.

    Args:
        segment: The segment of the queries.
        window: Number of last tokens to which a token attends, itself included; None for all.
        kernel: sdpa or eager.
        device: Device of the mask.
    """
    stop = segment.depth + segment.length
    narrow = window is not None and stop > window
    if kernel == "sdpa" and not segment.depth and not narrow:
        return None
    seen = torch.ones(segment.length, stop, dtype=torch.bool, device=device).tril(segment.depth)
    return seen.triu(segment.depth - window + 1) if narrow and window is not None else seen


def _in_form_of(kernel: str, seen: Tensor, embeddings: Tensor) -> Tensor:
    """A mask in the form that a kernel takes.

    Args:
        kernel: sdpa or eager.
        seen: (length, depth + length), True where a token attends.
        embeddings: Hidden states of the dtype in which eager adds a mask to scores.
    """
    if kernel == "eager":
        blocked = embeddings.new_zeros(seen.shape)
        seen = blocked.masked_fill(~seen, torch.finfo(blocked.dtype).min)
    return seen[None, None]


def install(config: PreTrainedConfig) -> None:
    """Make a text model's attention accept plans. Without a plan it computes as before."""
    kernel = config._attn_implementation
    if kernel in ("sdpa", "eager"):
        config._attn_implementation = PREFIX + kernel


def uninstall(config: PreTrainedConfig) -> None:
    """Undo `install`."""
    config._attn_implementation = kernel_of(config)


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


def _attention(kernel: str) -> Any:
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        # Scaling, caps of the scores and grouped keys are left to the family's own function.
        plain = (
            sdpa_attention_forward
            if kernel == "sdpa"
            else sys.modules[type(module).__module__].eager_attention_forward
        )
        plan = kwargs.pop(PLANS, None)
        if plan is None:
            return plain(module, query, key, value, attention_mask, **kwargs)
        masks = plan.masks[plan.kinds[module.layer_idx]]
        lengths = [s.length for s in plan.tree.segments]
        queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
        out = []
        for i, segment in enumerate(plan.tree.segments):
            branch = (*segment.ancestors, i)
            k = torch.cat([keys[j] for j in branch], 2) if segment.ancestors else keys[i]
            v = torch.cat([values[j] for j in branch], 2) if segment.ancestors else values[i]
            out.append(plain(module, queries[i], k, v, masks[i], **kwargs)[0])
        return torch.cat(out, 1), None

    return forward


for _kernel in ("sdpa", "eager"):
    AttentionInterface.register(PREFIX + _kernel, _attention(_kernel))
    AttentionMaskInterface.register(PREFIX + _kernel, ALL_MASK_ATTENTION_FUNCTIONS[_kernel])
